"""A directory that appears under its name only when it is complete, and whose making can be continued."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

from megarl.errors import Refusal
from megarl.formats import durable


class Staging:
    """The directory `out` in the making, as `out.partial`.

    Finished pieces are recorded, so that one killed in between goes on where it stopped, if it makes the same from the
    same: `identity` is anything JSON can hold that says so.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        self._records = self.path / ".records"
        self._identity = json.dumps(identity)
        self._lock: TextIO | None = None

    def begin(self, needed_bytes: int) -> bool:
        """Make the partial directory; returns whether pieces of an earlier attempt are there. One process calls it.

        It stays locked until that process ends. Raises `Refusal` where `out` exists, where `out.partial` is another
        process's or was not made here, and where the disk has less than `needed_bytes` left.
        """
        check_absent(self.out)
        if os.path.lexists(self.path) and not self._records.is_dir():
            raise Refusal(str(self.path), "exists, and was not made by a conversion", "remove it, or rename the output")
        try:
            self._records.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refusal(str(self.out), f"cannot be made ({error.strerror})", "give another directory") from None
        self._take_lock()
        identity = self._records / "identity.json"
        again = identity.is_file() and identity.read_text(encoding="utf-8") == self._identity
        if not again:
            self._clear()
        present = sum(file.stat().st_blocks * 512 for file in self.path.iterdir() if file.is_file())
        free = shutil.disk_usage(self.path).free
        if free + present < needed_bytes:
            if not again:
                shutil.rmtree(self.path)
            raise Refusal(
                f"{self.out}",
                f"needs {needed_bytes / 1e9:.2f} GB, and its disk has {(free + present) / 1e9:.2f} GB left",
                "free some space, or write elsewhere",
            )
        if not again:
            # Last, so that a directory without it is never continued.
            identity.write_text(self._identity, encoding="utf-8")
        return again

    def _take_lock(self) -> None:
        """Held by the open file, so that a process that was killed leaves none behind."""
        self._lock = open(self._records / "lock", "w", encoding="utf-8")  # noqa: SIM115 (kept open)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(
                str(self.path), "is being written by another conversion", "wait for it, or give another output"
            ) from None
        except OSError:
            pass  # a file system without locks

    def _clear(self) -> None:
        """Remove all pieces and records."""
        for entry in (*self.path.iterdir(), *self._records.iterdir()):
            if entry.is_dir() and entry != self._records:
                shutil.rmtree(entry)
            elif entry.is_file() and entry.name != "lock":
                entry.unlink()

    def forget(self) -> None:
        """Have all pieces made anew."""
        self._clear()
        (self._records / "identity.json").write_text(self._identity, encoding="utf-8")

    def recorded(self, piece: str) -> Any:
        """What was recorded of a finished piece, or None."""
        file = self._records / f"{piece}.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def record(self, piece: str, facts: Any) -> None:
        """Say that a piece is finished, its bytes on the disk."""
        fresh = self._records / f"{piece}.new"
        fresh.write_text(json.dumps(facts), encoding="utf-8")
        fresh.replace(self._records / f"{piece}.json")

    def finish(self) -> None:
        """Give the directory its name, everything in it on the disk. One process calls it."""
        durable.sync_tree(self.path)
        self.path.rename(self.out)
        durable.sync(self.out.parent)
        shutil.rmtree(self.out / ".records")


def check_absent(out: Path) -> None:
    """Raise `Refusal` where the output exists."""
    if os.path.lexists(out):
        raise Refusal(str(out), "exists, and is not written over", "remove it, or give another directory")
