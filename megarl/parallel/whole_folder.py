"""A folder that all ranks write together, and that appears under its name only when it is complete."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megarl.parallel.exchange import first_decides


@contextmanager
def whole_folder(folder: Path, begin: Callable[[Path], None]) -> Iterator[Path]:
    """The folder to write in the block, in place of `folder` afterwards. Collective.

    `begin` is done in it by rank 0 first; what that raises, all ranks raise.
    """
    partial = folder.with_name(folder.name + ".partial")

    def prepare() -> bool:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        begin(partial)
        return True

    first_decides(prepare)
    yield partial
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    dist.barrier()
