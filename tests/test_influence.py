"""A10: the influence of steps is that of a direct softmax, whatever the layout and the block, and transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import torch

from megarl.config.influence import InfluenceSettings

SP = {"tensor": 2, "sequence": True}
#: Grouped queries, norms of queries and keys, a mixture.
MODELS = ("qwen2-tied", "qwen3-untied", "qwen3-moe")
#: By number of processes: models with layouts, packed or padded, and blocks of queries.
CASES: dict[int, list[tuple[str, dict[str, Any], bool, int]]] = {
    1: [(model, {}, True, block) for model in MODELS for block in (1, 7, 64)] + [("qwen2-tied", {}, False, 7)],
    2: [
        ("qwen2-tied", {"tensor": 2}, True, 7),
        ("qwen3-moe", SP, True, 64),
        ("qwen2-tied", {"pipeline": 2}, True, 64),
        ("qwen3-untied", {"pipeline": 2, "virtual_pipeline": 2}, True, 7),
        ("qwen2-tied", {"context": 2}, True, 7),
        ("qwen3-untied", {"context": 2}, False, 64),
        ("qwen3-moe", {"expert": 2}, True, 7),
    ],
    4: [("qwen2-tied", {"tensor": 2, "pipeline": 2}, True, 7)],
}
DISTANCE = 2


def starts_of(batch: list[Any]) -> list[np.ndarray]:
    """Steps of 1 to 5 tokens, after a prompt."""
    found = []
    for number, one in enumerate(batch):
        random = np.random.default_rng(number)
        ends = np.cumsum(random.integers(1, 6, one.length))
        found.append(np.array([0, *ends[ends < one.length]]))
    return found


def measured(world: Any, folder: Path, cases: list[Any], batch: list[Any]) -> list[dict[int, np.ndarray]]:
    """By case, the influences of this rank's sequences. A scenario of `run_world`."""
    found = []
    for model, parallel, packed, block in cases:
        config = parity.run_config(folder / model, parallel=parallel, batch={"packed": packed})
        with parity.policy_of(config, world) as policy:
            mine = parity.share(batch, policy.grid)
            starts = starts_of(batch)
            settings = InfluenceSettings(distance=DISTANCE, query_block=block)
            values = policy.network.survey([batch[i] for i in mine], [starts[i] for i in mine], settings).influences
            found.append(dict(zip(mine, values, strict=True)))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("influence")
    for model in MODELS:
        parity.write_model(found, model)
    return found


@pytest.fixture(scope="module")
def direct(folder: Path) -> dict[str, list[np.ndarray]]:
    """From transformers' attention maps, by the definition."""
    batch, found = parity.mini_batch(3), {}
    for model in MODELS:
        network = parity.transformers_model(folder / model)
        network.set_attn_implementation("eager")
        found[model] = []
        for one, starts in zip(batch, starts_of(batch), strict=True):
            with torch.no_grad():
                maps = network(torch.from_numpy(one.tokens).long()[None], output_attentions=True).attentions
            ends = [*starts[1:], one.length]
            influences = np.zeros(len(starts))
            for head in torch.cat([layer[0] for layer in maps]).double().numpy():
                for k in range(len(starts)):
                    total = sum(
                        head[starts[j] : ends[j], starts[k] : ends[k]].mean() for j in range(k + DISTANCE, len(starts))
                    )
                    influences[k] = max(influences[k], total)
            found[model].append(influences)
    return found


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[list[dict[int, np.ndarray]]]]:
    batch = parity.mini_batch(3)
    return {
        processes: parity.run_world("test_influence", "measured", processes, folder, cases, batch)
        for processes, cases in CASES.items()
    }


@pytest.mark.parametrize("processes, number", [(n, i) for n, cases in CASES.items() for i in range(len(cases))])
def test_influences_are_those_of_a_direct_softmax(
    found: dict[int, Any], direct: dict[str, list[np.ndarray]], processes: int, number: int
):
    model = CASES[processes][number][0]
    seen = set()
    for rank in found[processes]:
        for place, values in rank[number].items():
            np.testing.assert_allclose(values, direct[model][place], rtol=0, atol=1e-6)
            seen.add(place)
    assert seen == set(range(13))
    assert max(one.max() for one in direct[model]) > 0.1
