"""A home for the caches of libraries, where the user of a container has none."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megarl.errors import Refusal
from megarl.parallel import terminal


def require_home() -> None:
    """Set HOME where it is missing and the system knows no user of this number, as in many containers.

    Libraries would else write to a folder called ~ in the working directory, or end in a traceback. Raises `Refusal`
    where the folder in its place is not this user's own.
    """
    if os.path.expanduser("~") != "~":
        return
    home = Path(tempfile.gettempdir()) / f"megarl-home-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    if home.is_symlink() or home.stat().st_uid != os.getuid():
        raise Refusal("HOME", f"is not set, and {home} is somebody else's", "export HOME as a folder of your own")
    os.environ["HOME"] = str(home)
    # Some ask for the user's name as well.
    os.environ.setdefault("USER", f"user{os.getuid()}")
    terminal.say(f"HOME is not set and this user has none: libraries keep their caches in {home}")
