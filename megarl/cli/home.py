"""A home for the caches of libraries, where the user of a container has none."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megarl.errors import Refusal
from megarl.parallel import terminal


def require_home() -> None:
    """Set HOME where it is missing and the system knows no user of this number, as in many containers, and where it is
    no folder and cannot become one, as for a user called nobody.

    Libraries would else write to a folder called ~ in the working directory, or end in a traceback. Raises `Refusal`
    where the folder in its place is not this user's own.
    """
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)
    given = os.path.expanduser("~")
    if given != "~" and _can_be(Path(given)):
        return
    said = "HOME is not set and this user has none" if given == "~" else f"HOME={given} is no folder"
    home = Path(tempfile.gettempdir()) / f"megarl-home-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    if home.is_symlink() or home.stat().st_uid != os.getuid():
        raise Refusal("HOME", f"is no folder, and {home} is somebody else's", "export HOME as a folder of your own")
    os.environ["HOME"] = str(home)
    # Some ask for the user's name as well.
    os.environ.setdefault("USER", f"user{os.getuid()}")
    terminal.say(f"{said}: libraries keep their caches in {home}")


def _can_be(home: Path) -> bool:
    """Whether it is a folder, or may be made one by whoever writes there first."""
    if os.path.lexists(home):
        return home.is_dir()
    there = next(folder for folder in home.absolute().parents if os.path.lexists(folder))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
