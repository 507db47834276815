"""Code of the user's own that a setting names, and where Python looks for it. Torch-free.

megarl's own processes do not look for modules in the working folder: a `random.py` or a folder `wandb` beside a run is
not what a library means that imports these. Where a setting names code of the user's own, that folder is searched last.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

#: `package.module:name`, or the path of a Python file before the colon.
FORM = re.compile(r"(?:[\w.]+|.*\.py):\w+")
#: Characters of an exception's text that a sentence quotes.
QUOTED = 300


class Unusable(Exception):
    """Code that cannot be loaded; the message says why, in one line."""


def search_path() -> list[str]:
    """`sys.path` without the working folder, which stays only where PYTHONPATH names it."""
    named = {os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    here = os.getcwd()
    return [entry for entry in sys.path if entry and (os.path.abspath(entry) != here or here in named)]


def load(path: str) -> Any:
    """What `path` names: `package.module:name`, or `folder/file.py:name` with a path from the working folder.

    Python looks last in the working folder, and in the file's own, so that the code finds what stands beside it. Raises
    `Unusable` for whatever the code raises, an exit included, and where it has no such name.
    """
    place, _, name = path.rpartition(":")
    try:
        module = _from_file(Path(place).expanduser()) if place.endswith(".py") else _from_path(place)
        return getattr(module, name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise Unusable(described(error)) from error


def described(error: BaseException) -> str:
    """An exception in one line: its class, its message, and the line of the user's code that it came from.

    >>> described(KeyError("x"))
    "KeyError: 'x'"
    """
    try:
        message = str(error)
    except Exception:
        message = ""
    # A lone surrogate could not be written to a log.
    line = " ".join(message.encode(errors="replace").decode().split())
    text = ": ".join(filter(None, (type(error).__name__, line if len(line) <= QUOTED else f"{line[:QUOTED]}...")))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else text


def named(value: Any) -> str:
    """A value in a message: itself where it is short and more than an address, and its type."""
    if value is None:
        return "None"
    try:
        text = " ".join(repr(value).encode(errors="replace").decode().split())
    except Exception:
        text = ""
    kind = type(value).__name__
    article = "an" if kind[:1].lower() in "aeiou" else "a"
    tells = 0 < len(text) <= 60 and not text.startswith("<")
    return f"{text} ({article} {kind})" if tells else f"{article} {kind}"


def _is_ours(filename: str) -> bool:
    """Whether a frame is of the way to the user's code: of this package, or of Python's import system."""
    return filename.startswith(("<frozen ", str(Path(__file__).parents[1]) + os.sep)) or filename == importlib.__file__


def _from_path(module: str) -> ModuleType:
    _search_last(os.getcwd())
    return importlib.import_module(module)


def _from_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise FileNotFoundError(f"no such file {file}")
    _search_last(os.getcwd())
    _search_last(str(file.resolve().parent))
    # A name that no module has: a file called random.py must not become the module `random`.
    spec = importlib.util.spec_from_file_location(f"_file_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses and pickle look for it there
    spec.loader.exec_module(module)
    return module


def _search_last(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)
