"""The references of public benchmarks, from files that lie beside each other in one folder."""

from __future__ import annotations

import json
from pathlib import Path

NAMES = (
    "aime24", "aime25", "amc23", "gsm8k_test", "gsm8k_train", "math500", "minerva", "olympiad", "dapo_math_train"
)  # fmt: skip


def references(folder: Path, name: str) -> list[tuple[str, ...]]:
    """The references of every problem of a benchmark; several where any of them counts as right."""
    lines = folder / f"{name}.jsonl"
    if lines.is_file():
        rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
        return [(row["answer"].rpartition("####")[2].strip(),) for row in rows]
    import pyarrow.parquet

    found = []
    for row in pyarrow.parquet.read_table(folder / f"{name}.parquet").to_pylist():
        truth = row["reward_model"]["ground_truth"]
        found.append((truth,) if isinstance(truth, str) else tuple(truth))
    return found
