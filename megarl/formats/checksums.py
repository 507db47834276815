"""Checksums of files, and the sharing of that work. XXH3 by the xxhash package: as fast as memory, so that it never
decides how long a save takes. It tells damage from data; it is no proof against somebody who forges files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import xxhash

_BLOCK = 1 << 23


class StoredFile(NamedTuple):
    """What is noted of a file: its size and its XXH3-64, in hexadecimal."""

    bytes: int
    checksum: str


def measure(file: Path) -> StoredFile:
    """Read a file from end to end. Raises `OSError` where it cannot be read."""
    found, size = xxhash.xxh3_64(), 0
    with open(file, "rb", buffering=0) as handle:
        while block := handle.read(_BLOCK):
            found.update(block)
            size += len(block)
    return StoredFile(size, found.hexdigest())


def of_text(text: str) -> str:
    """The XXH3-64 of a text's bytes in UTF-8, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(text.encode())


def share(names: Iterable[str], rank: int, ranks: int) -> list[str]:
    """The files of a checkpoint that one of `ranks` reads: its own (`__RANK_n.distcp`), which its host may still have
    in memory, and every so many of the rest."""
    mine = []
    for number, name in enumerate(sorted(names)):
        writer = re.match(r"__(\d+)_", name)
        if (int(writer[1]) if writer else number) % ranks == rank:
            mine.append(name)
    return mine
