"""Rollouts on disk: saved per step, read back in place of generating.

`rollouts/step_000012.rank_0003.jsonl` holds one sample per line. A step can be made of one such file or
of several, as many as there were engine replicas. Torch-free.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarl.errors import Refusal
from megarl.records import Body, Head, Key, Stretch, Trajectory


def save_samples(directory: Path, step: int, rank: int, samples: Sequence[Trajectory]) -> Path:
    """Write this rank's samples of one step; the file appears whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"step_{step:06d}.rank_{rank:04d}.jsonl"
    fresh = file.with_suffix(".partial")
    fresh.write_text("".join(json.dumps(_saved(sample)) + "\n" for sample in samples), encoding="utf-8")
    fresh.replace(file)
    return file


def _saved(sample: Trajectory) -> dict[str, Any]:
    """A line: all but the holder, and the routing, which would be larger than all else together."""
    head, body = sample
    fields = dataclasses.asdict(dataclasses.replace(head, holder=None))
    fields |= dataclasses.asdict(dataclasses.replace(body, routed_experts=None))
    for name in ("holder", "measured", "routed_experts", "old_known", "old_log_probs"):
        del fields[name]
    for name in ("prompt_length", "prompt_ids", "texts", "fork"):
        if not fields[name]:
            del fields[name]
    # JSON has no NaN, which stands at an environment's tokens.
    fields["log_probs"] = [None if math.isnan(one) else one for one in body.log_probs]
    return fields | {"key": head.key._asdict(), "stretches": [one._asdict() for one in head.stretches]}


def remove_step(directory: Path, step: int) -> None:
    """Remove what is saved of a step."""
    for file in directory.glob(f"step_{step:06d}.rank_*.jsonl"):
        file.unlink()


def files_of(source: str, step: int) -> list[Path]:
    """The files with the samples of a step: `source` itself, which serves any step, or those of a rollouts/ folder.

    Raises `Refusal` where there are none, or nothing is in them.
    """
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.glob(f"step_{step:06d}.rank_*.jsonl"))
    if not any(file.stat().st_size for file in files):
        raise Refusal(
            f"rollout.replay={source}",
            f"holds no samples of step {step}",
            "give a rollouts/ folder that has it, or one of its files",
        )
    return files


def require(source: str, steps: range) -> None:
    """Raise `Refusal` where there are no samples for one of these steps, or what is first there is no sample."""
    there = {file.name.partition(".")[0] for file in Path(source).glob("step_*.rank_*.jsonl") if file.stat().st_size}
    for step in steps:
        if f"step_{step:06d}" not in there:
            # A file, or none.
            files_of(source, step)
    for file in files_of(source, steps[0])[:1] if steps else ():
        with file.open(encoding="utf-8") as lines:
            for line in itertools.islice(lines, 1):
                _sample(line, file, 1, rank=0)


def read_samples(source: str, step: int, keys: Sequence[Key], rank: int, size: int) -> dict[int, Trajectory]:
    """This rank's part of the saved samples that `keys` name, by position in `keys`.

    Of a step's files all are read. The `size` ranks share the samples round robin. Raises `Refusal` where there is
    nothing to read.
    """
    files = files_of(source, step)
    saved: dict[Key, Trajectory] = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            sample = _sample(line, file, number, rank)
            saved[sample.head.key] = sample
    mine = range(rank, len(keys), size)
    return {position: saved[keys[position]] for position in mine if keys[position] in saved}


def _sample(line: str, file: Path, number: int, rank: int) -> Trajectory:
    try:
        fields = json.loads(line)
        named = fields.pop("key")
        key = Key(**named)._replace(branch=tuple(named["branch"]))
        # By the weights of another run, as far as this one knows.
        stretches = tuple(Stretch(**one)._replace(version=None) for one in fields.pop("stretches"))
        body = {name: fields.pop(name) for name in ("text", "seed", "counters")}
        body |= {name: tuple(fields.pop(name)) for name in ("prompt_ids", "texts") if name in fields}
        ids = tuple(fields.pop("token_ids"))
        log_probs = tuple(math.nan if one is None else one for one in fields.pop("log_probs"))
        return Trajectory(Head(key, rank, stretches, **fields), Body(ids, log_probs, **body))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refusal(f"{file} line {number}", f"must be a saved sample ({error})", "save the rollouts again") from None
