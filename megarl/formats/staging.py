"""A directory that appears under its name only when it is complete, and whose making can be continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megarl.errors import Refusal


class Staging:
    """The directory `out` in the making, as `out.partial`.

    Finished pieces are recorded, so that one killed in between goes on where it stopped, if it makes the same from the
    same: `identity` is anything JSON can hold that says so.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        self._records = self.path / ".records"
        self._identity = identity

    def begin(self, needed_bytes: int) -> bool:
        """Make the partial directory; returns whether pieces of an earlier attempt are there. One process calls it.

        Raises `Refusal` where `out` exists, or the disk has less than `needed_bytes` left.
        """
        check_absent(self.out)
        identity = self._records / "identity.json"
        again = identity.is_file() and identity.read_text() == json.dumps(self._identity)
        if not again:
            shutil.rmtree(self.path, ignore_errors=True)
            self._records.mkdir(parents=True)
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
            identity.write_text(json.dumps(self._identity))
        return again

    def recorded(self, piece: str) -> Any:
        """What was recorded of a finished piece, or None."""
        file = self._records / f"{piece}.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def record(self, piece: str, facts: Any) -> None:
        """Say that a piece is finished, its bytes on the disk."""
        fresh = self._records / f"{piece}.new"
        fresh.write_text(json.dumps(facts))
        fresh.replace(self._records / f"{piece}.json")

    def finish(self) -> None:
        """Give the directory its name. One process calls it."""
        shutil.rmtree(self._records)
        self.path.rename(self.out)


def check_absent(out: Path) -> None:
    """Raise `Refusal` where the output exists."""
    if out.exists():
        raise Refusal(str(out), "exists, and is not written over", "remove it, or give another directory")
