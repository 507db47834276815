"""What the experiments start from: data, a tokenizer, a tiny model, and its supervised warm-up.

The plain one is the quickstart's, made by the same commands as launch/quickstart.sh. What is there already is used
where it was made by the same recipe, and refused where it was not.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import make_arithmetic
import make_tiny_model
import train_tokenizer

from compare import calls, hints, kinds, runs, shortcut, slips

WARMUP_CONFIG = "quickstart_warmup.yaml"


@dataclass(frozen=True)
class Sizes:
    """How much is made: rows of each file, and steps of the warm-up; None: as the start says."""

    warmup_rows: int | None = None
    train_rows: int = 4000
    heldout_rows: int = 256
    warmup_steps: int | None = None


@dataclass(frozen=True)
class Inputs:
    """One start: its folder is data/<name>/, its warm-up runs/<name>_warmup/.

    `make(folder, warmup_rows, train_rows, heldout_rows)` writes its data, of which `warmup` is the warm-up's file;
    `overrides` are further settings of the warm-up.
    """

    name: str
    make: Callable[[Path, int, int, int], None]
    warmup: str
    rows: int
    steps: int
    markers: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


def make_plain(folder: Path, warmup_rows: int, _: int, heldout_rows: int) -> None:
    """The quickstart's arithmetic; reinforcement asks the warm-up's questions."""
    make_arithmetic.make(folder / "arithmetic", 0, warmup_rows, heldout_rows, [2, 3], 0.7)


PLAIN = Inputs("quickstart", make_plain, "arithmetic/train.jsonl", 20000, 600)
HINTS = Inputs("quickstart_hints", hints.make, "warmup.jsonl", 12000, 800, hints.MARKERS)
SHORTCUT = Inputs("quickstart_shortcut", shortcut.make, "warmup.jsonl", 12000, 800, shortcut.MARKERS)
KINDS = Inputs("quickstart_kinds", kinds.make, "warmup.jsonl", 12000, 800)
SLIPS = Inputs("quickstart_slips", slips.make, "warmup.jsonl", 12000, 800, overrides=("rollout.max_tokens=96",))
TOOLS = Inputs("quickstart_tools", calls.make, "warmup.jsonl", 12000, 800, calls.MARKERS)


def recipe(inputs: Inputs, sizes: Sizes) -> dict[str, Any]:
    """What decides an experiment's start: the sizes asked for, and a digest of the code that makes its data."""
    modules = (inspect.getmodule(inputs.make), make_arithmetic, train_tokenizer, make_tiny_model)
    sources = "".join(inspect.getsource(module) for module in modules if module)
    return asdict(sizes) | {"code": hashlib.sha256(sources.encode()).hexdigest()[:16]}


def prepare(inputs: Inputs, root: Path, sizes: Sizes) -> None:
    """Make what is missing of `inputs` under `root`.

    Raises `runs.RunFailed` where the warm-up fails, or what is there was made by another recipe.
    """
    folder, made = root / "data" / inputs.name, recipe(inputs, sizes)
    mark = folder / "complete"
    if not mark.is_file():
        print(f"making data/{inputs.name}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        _make(inputs, folder, sizes)
        mark.write_text(json.dumps(made), encoding="utf-8")
    # launch/quickstart.sh leaves an empty mark: the usual sizes.
    found = json.loads(mark.read_text(encoding="utf-8") or json.dumps(recipe(inputs, Sizes())))
    if found != made:
        raise runs.RunFailed(
            f"data/{inputs.name} was made by another recipe ({_difference(found, made)}); remove it and "
            f"runs/{inputs.name}_warmup, or choose another --inputs"
        )
    warmed = root / "runs" / f"{inputs.name}_warmup"
    if (warmed / "summary.json").is_file():
        return
    print(f"warming up: runs/{warmed.name}", flush=True)
    overrides = [
        f"steps={sizes.warmup_steps or inputs.steps}",
        f"model.path=data/{inputs.name}/model",
        f"data.path=data/{inputs.name}/{inputs.warmup}",
        *inputs.overrides,
    ]
    runs.train(warmed, WARMUP_CONFIG, overrides, root, made)


def _difference(found: dict[str, Any], made: dict[str, Any]) -> str:
    return ", ".join(f"{name} {found.get(name)}, not {made[name]}" for name in made if found.get(name) != made[name])


def _make(inputs: Inputs, folder: Path, sizes: Sizes) -> None:
    inputs.make(folder, sizes.warmup_rows or inputs.rows, sizes.train_rows, sizes.heldout_rows)
    warmup, tokenizer = folder / inputs.warmup, folder / "tokenizer"
    _require(
        train_tokenizer.main(
            ["--input", str(warmup), "--vocab-size", "320", "--out", str(tokenizer), "--markers", *inputs.markers]
        )
    )
    shape = "--family qwen2 --hidden 128 --layers 4 --heads 4 --kv-heads 2 --ffn 384 --vocab-size 320 --tied"
    _require(make_tiny_model.main(["--out", str(folder / "model"), *shape.split(), "--tokenizer", str(tokenizer)]))


def _require(code: int) -> None:
    if code:
        raise runs.RunFailed(f"a tool of tools/ ended with {code}")
