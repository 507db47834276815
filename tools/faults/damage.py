"""Damage to checkpoints at rest."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from faults.deeds import finished


def damage(run: Path, kind: str, which: str, draw: int) -> tuple[list[str], list[str]]:
    """Damage the checkpoints of a run as a kind of fault says; returns which were damaged and words for the report.

    `which`: newest, older or all. Every damaged file has its old self beside the run, in `run.saved`.
    """
    chance = random.Random(draw)
    root = run / "checkpoints"
    shutil.copytree(root, run.with_suffix(".saved"))
    if kind == "no-latest":
        (root / "latest").unlink()
        return [], ["latest"]
    names = finished(root)
    hit = {"newest": names[-1:], "older": names[:-1], "all": names}[which]
    words = []
    for name in hit:
        how = chance.choice(("flip", "truncate", "lost-file", "torn-note")) if kind == "all-damaged" else kind
        words.append(f"{name}/{_damage_one(root / name, how, chance)}")
    return hit, words


def restore(run: Path) -> None:
    """Put the checkpoints back as they were."""
    saved = run.with_suffix(".saved")
    shutil.rmtree(run / "checkpoints")
    saved.rename(run / "checkpoints")


def _damage_one(checkpoint: Path, how: str, chance: random.Random) -> str:
    """Damage one checkpoint; returns the name of the file."""
    note = checkpoint / "progress.json"
    if how == "torn-note":
        note.write_bytes(note.read_bytes()[: chance.randrange(1, note.stat().st_size)])
        return note.name
    # The note itself is torn above; of its bits too one may turn.
    whole = [one for one in checkpoint.iterdir() if one.stat().st_size > 0]
    files = sorted(one for one in whole if one != note or how == "flip")
    file = chance.choice(files)
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    elif how == "truncate":
        file.write_bytes(content[: chance.randrange(len(content))])
    else:
        file.unlink()
    return file.name
