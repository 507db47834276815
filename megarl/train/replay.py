"""Rollouts on disk: saved per step, read back in place of generating.

`rollouts/step_000012.rank_0003.jsonl` holds one sample per line. A step can be made of one such file or
of several, as many as there were engine replicas. Torch-free.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarl.errors import Refusal
from megarl.records import Sample

#: What names a sample within a step: prompt index, sample index, kind.
Key = tuple[int, int, str]


def save_samples(directory: Path, step: int, rank: int, samples: Sequence[Sample]) -> Path:
    """Write this rank's samples of one step; the file appears whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"step_{step:06d}.rank_{rank:04d}.jsonl"
    fresh = file.with_suffix(".partial")
    fresh.write_text("".join(json.dumps(_saved(sample)) + "\n" for sample in samples), encoding="utf-8")
    fresh.replace(file)
    return file


def _saved(sample: Sample) -> dict[str, Any]:
    """The fields of a line: all but the routing, which would be larger than all others together."""
    fields = dataclasses.asdict(dataclasses.replace(sample, routed_experts=None))
    del fields["routed_experts"]
    return fields


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
                _sample(line, file, 1)


def read_samples(source: str, step: int, keys: Sequence[Key], rank: int, size: int) -> dict[int, Sample]:
    """This rank's part of the saved samples that `keys` name, by position in `keys`.

    Of a step's files all are read. The `size` ranks share the samples round robin. Raises `Refusal` where there is
    nothing to read.
    """
    files = files_of(source, step)
    saved: dict[Key, Sample] = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            sample = _sample(line, file, number)
            saved[sample.prompt_index, sample.sample_index, sample.kind] = sample
    mine = range(rank, len(keys), size)
    return {position: saved[keys[position]] for position in mine if keys[position] in saved}


def _sample(line: str, file: Path, number: int) -> Sample:
    try:
        fields = json.loads(line)
        for name in ("token_ids", "rollout_log_probs"):
            fields[name] = tuple(fields[name])
        return Sample(**fields)
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{file} line {number}", f"must be a saved sample ({error})", "save the rollouts again") from None
