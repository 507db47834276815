"""Prints what launch/gpu_check.sh has found, from the folder of its results: a table of its parts, one of figures.

Needs Python alone. Shares of the GPU's own rates are those of rates measured in the same check.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A number that was found, and what it should be."""

    name: str
    value: float
    unit: str
    bar: str = ""

    @property
    def row(self) -> tuple[str, str, str]:
        return self.name, f"{self.value:.4g} {self.unit}".strip(), self.bar


def read_json(path: Path) -> dict[str, Any]:
    """The last line of a part's output that is an object; empty where there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in reversed(lines):
        if line.startswith("{"):
            return json.loads(line)
    return {}


def kept(folder: Path) -> list[Figure]:
    """What tests have kept, of each name the newest."""
    path = folder / "figures.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [Figure(**json.loads(line)) for line in lines]
    return list({figure.name: figure for figure in found}.values())


def parameters(model: dict[str, Any]) -> tuple[int, int]:
    """Parameters of a dense Qwen2 by its config.json: those of products that each token goes through, and all."""
    hidden, layers, ffn = model["hidden_size"], model["num_hidden_layers"], model["intermediate_size"]
    head = hidden // model["num_attention_heads"]
    widths = hidden + 2 * model["num_key_value_heads"] * head
    products = layers * (hidden * widths + hidden * hidden + 3 * hidden * ffn) + model["vocab_size"] * hidden
    others = layers * (widths + 2 * hidden) + hidden + model["vocab_size"] * hidden
    return products, products + others


def update_flops(model: dict[str, Any], tokens: float, length: int) -> float:
    """Of an update on sequences of that length, nothing recomputed: 6 a token and parameter of a product, and 6 a token
    and element of a layer's queries for each of the length's tokens, causal attention counted by half."""
    attention = 6 * model["num_hidden_layers"] * model["hidden_size"] * length
    return tokens * (6 * parameters(model)[0] + attention)


def of_steps(folder: Path, inputs: Path, rates: dict[str, float]) -> Iterator[Figure]:
    """The update in BF16 and FP8."""
    seconds: dict[str, float] = {}
    for name in ("bf16", "fp8"):
        found = read_json(folder / f"step_{name}.out")
        if "update" not in found.get("seconds", {}):
            continue
        model = json.loads((inputs / "step_model" / "config.json").read_text(encoding="utf-8"))
        seconds[name] = found["seconds"]["update"]
        rate = update_flops(model, found["tokens_trained"], model["max_position_embeddings"]) / seconds[name] / 1e12
        layers = model["num_hidden_layers"]
        yield Figure(f"update in {name.upper()}, {layers} layers", rate, "TFLOP/s")
        if name == "bf16" and "BF16 product" in rates:
            yield Figure("update in BF16 / BF16 product", rate / rates["BF16 product"], "", ">= 0.50")
        yield Figure(f"peak memory of the update in {name.upper()}", found["peak_memory_bytes"] / 2**30, "GiB")
    if len(seconds) == 2:
        yield Figure("update in FP8 / in BF16, speed", seconds["bf16"] / seconds["fp8"], "", ">= 1.30")


def of_push(folder: Path, inputs: Path, rates: dict[str, float]) -> Iterator[Figure]:
    """The push in one process."""
    found = read_json(folder / "push.out")
    if "seconds" not in found:
        return
    model = json.loads((inputs / "push_model" / "config.json").read_text(encoding="utf-8"))
    moved = 2 * parameters(model)[1]
    yield Figure(
        f"push, {model['num_hidden_layers']} layers, {moved / 1e9:.1f} GB", found["seconds"], "s", "<= 2.0 for 7B"
    )
    yield Figure("push without its checksum", found["unchecked_seconds"], "s")
    yield Figure("the engine's check", found["check_seconds"], "s")
    if "copy on the device" in rates:
        share = moved / found["unchecked_seconds"] / 1e9 / rates["copy on the device"]
        yield Figure("push / copy on the device", share, "", ">= 0.60")
    yield Figure("engines filled alike, bit for bit", float(found["bitwise_equal"]), "", "1")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Rows under their heads, in Markdown, columns aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in lines
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the results, runs/gpu_check")
    parser.add_argument("--inputs", type=Path, default=Path("data/gpu"), help="of tools/make_gpu_inputs.py")
    options = parser.parse_args(arguments)
    parts = options.folder / "parts.tsv"
    if not parts.is_file():
        print(f"gpu_table: {parts} is missing: run launch/gpu_check.sh", file=sys.stderr)
        return 2
    rows = [tuple(line.split("\t")) for line in parts.read_text(encoding="utf-8").splitlines()]
    # Of a part that was run again the newest.
    print(table(("part", "outcome", "seconds"), list({row[0]: row for row in rows}.values())))
    figures = kept(options.folder)
    rates = {figure.name: figure.value for figure in figures}
    figures += of_steps(options.folder, options.inputs, rates)
    figures += of_push(options.folder, options.inputs, rates)
    if figures:
        print("\n" + table(("figure", "found", "bar"), [figure.row for figure in figures]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
