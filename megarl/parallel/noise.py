"""What libraries warn of: each warning once, in one line, by rank 0 alone. Errors of every rank stay.

All ranks run the same code, so that a warning would come once per rank; and Python shows it again after every
`warnings.catch_warnings` that any library leaves. With `python -W` or PYTHONWARNINGS nothing is held back.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TextIO

from megarl.parallel.place import RANK_NAMES

#: Modules that warn of each accelerator that is absent, and of themselves.
_UNHEARD = r"(megatron|torch\.distributed\.checkpoint)"

#: Loggers that warn of what is known: that there is no CUDA runtime, where an nvcc is in the PATH; and of calls of
#: Megatron's that work and that it would rather have in another form.
_SILENT = (
    "torch.utils.cpp_extension",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.dist_checkpointing.strategies.common",
    "megatron.core.dist_checkpointing.strategies.torch",
)

_said: set[str] = set()


def hold_back() -> None:
    """From now on say each warning once. Called again, it reaches the loggers of what was imported since."""
    if sys.warnoptions:
        return
    if warnings.showwarning is not _show:
        warnings.filterwarnings("ignore", module=_UNHEARD)
        warnings.showwarning = _show
    for name in _SILENT:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Libraries have handlers of their own; a logger without one has Python's last resort.
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    handlers = {handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers}
    for handler in handlers | {logging.lastResort}:
        if handler is not None and _passes not in handler.filters:
            handler.addFilter(_passes)


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    text = f"{category.__name__}: {' '.join(str(message).split())}"
    if _is_new(text):
        print(f"{text} ({_short(filename)}:{lineno})", file=file or sys.stderr)


def _passes(record: logging.LogRecord) -> bool:
    return record.levelno != logging.WARNING or _is_new(f"{record.name}: {record.getMessage()}")


def _is_new(text: str) -> bool:
    """Whether rank 0 says a warning for the first time."""
    rank = next((os.environ[name] for name in RANK_NAMES if name in os.environ), "0")
    if rank != "0" or text in _said:
        return False
    _said.add(text)
    return True


def _short(filename: str) -> str:
    """A library's file without the folders before the library's own."""
    _, found, inner = filename.rpartition(f"{os.sep}site-packages{os.sep}")
    return inner if found else str(Path(filename).name)
