"""A10: the influence of steps is that of a direct softmax, whatever the layout and the block, and transformers'."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import parity
import pytest
import torch
from live_bytes import LiveBytes

from megarl.config.grid import Chunk, Grid
from megarl.config.influence import InfluenceSettings
from megarl.policy.batch import lay_out
from megarl.policy.cpu_attention import cpu_packing, rotate
from megarl.policy.influence import InfluenceTap
from megarl.records import Sequence, from_place

SP = {"tensor": 2, "sequence": True}
PP = {"pipeline": 2}
VPP = PP | {"virtual_pipeline": 2}
#: Grouped queries, norms of queries and keys, a mixture; one key-value head, which two tensor-parallel ranks share.
MODELS = ("qwen2-tied", "qwen3-untied", "qwen3-moe", "qwen3-tied")
DISTANCE = 2
#: Sequences of the mini-batch.
NUMBER = 13


class Case(NamedTuple):
    """`by_token`: every token is a step; `number`: as many of the sequences, of which a replica may have none."""

    model: str
    parallel: dict[str, Any] | None = None
    packed: bool = True
    block: int = 7
    by_token: bool = False
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    number: int = NUMBER

    @property
    def policy(self) -> tuple[Any, ...]:
        """What the policy follows from."""
        return self.model, self.parallel, self.packed


#: By number of processes. Of four layers and four heads, some of which may all be on another rank.
CASES: dict[int, list[Case]] = {
    1: [
        *(Case(model, block=block) for model in MODELS[:3] for block in (1, 7, 64)),
        Case("qwen3-moe", by_token=True),
        Case("qwen3-moe", layers=(1, 2), heads=(0, 1, 3)),
        Case("qwen2-tied", packed=False),
    ],
    2: [
        Case("qwen2-tied", {"tensor": 2}),
        Case("qwen2-tied", {"tensor": 2}, layers=(0, 3), heads=(1, 2)),
        Case("qwen2-tied", {"tensor": 2}, heads=(3,)),
        Case("qwen3-tied", {"tensor": 2}, heads=(0, 2, 3)),
        Case("qwen3-moe", SP, block=64),
        Case("qwen2-tied", PP, block=64),
        Case("qwen2-tied", PP, layers=(1,), heads=(0, 3)),
        Case("qwen3-untied", VPP),
        Case("qwen3-untied", VPP, layers=(1, 2)),
        Case("qwen2-tied", {"context": 2}),
        Case("qwen2-tied", {"context": 2}, by_token=True, heads=(1,)),
        Case("qwen3-untied", {"context": 2}, packed=False, block=64),
        Case("qwen3-moe", {"expert": 2}),
        Case("qwen3-moe", {"expert": 2}, number=1),
    ],
    4: [
        Case("qwen2-tied", {"tensor": 2, "pipeline": 2}),
        Case("qwen2-tied", {"tensor": 2, "pipeline": 2}, layers=(3,)),
    ],
}


def steps_of(number: int, one: Any, by_token: bool) -> np.ndarray:
    """Where steps of 1 to 5 tokens begin, or of one each."""
    if by_token:
        return np.arange(one.length)
    ends = np.cumsum(np.random.default_rng(number).integers(1, 6, one.length))
    return np.array([0, *ends[ends < one.length]])


class Found(NamedTuple):
    """By sequence: its influences on every rank; of the last stage the log-probs of `measure`, those of the survey, and
    the entropies."""

    influences: dict[int, np.ndarray]
    measured: dict[int, np.ndarray]
    log_probs: dict[int, np.ndarray]
    entropies: dict[int, np.ndarray]


def surveyed(world: Any, folder: Path, cases: list[Case], batch: list[Any]) -> list[Found]:
    """By case what this rank finds of its sequences. A scenario of `run_world`."""
    found = []
    for _, alike in groupby(cases, lambda case: case.policy):
        some = list(alike)
        config = parity.run_config(
            folder / some[0].model, parallel=some[0].parallel or {}, batch={"packed": some[0].packed}
        )
        with parity.policy_of(config, world) as policy:
            for case in some:
                mine = parity.share(batch[: case.number], policy.grid)
                sequences = [batch[i] for i in mine]
                steps = [steps_of(i, batch[i], case.by_token) for i in mine]
                settings = InfluenceSettings(
                    distance=DISTANCE, query_block=case.block, layers=case.layers, heads=case.heads
                )
                made = policy.network.survey(sequences, steps, settings)
                measured = policy.network.measure(sequences)
                parts = (made.influences, measured, made.log_probs, made.entropies)
                found.append(Found(*(dict(zip(mine, part, strict=True)) for part in parts)))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("influence")
    for model in MODELS:
        parity.write_model(found, model)
    return found


class Direct(NamedTuple):
    """What transformers finds of a sequence: attention (layers, heads, L, L), log-probs and entropies (T,)."""

    maps: np.ndarray
    log_probs: np.ndarray
    entropies: np.ndarray


@pytest.fixture(scope="module")
def direct(folder: Path) -> dict[str, list[Direct]]:
    found = {}
    for model in MODELS:
        network = parity.transformers_model(folder / model)
        found[model] = []
        for one in parity.mini_batch(3):
            with torch.no_grad():
                maps = network(torch.from_numpy(one.tokens).long()[None], output_attentions=True).attentions
                values = parity.token_values(network, one)
            found[model].append(Direct(torch.cat(maps).double().numpy(), *(value.numpy() for value in values)))
    return found


def influences_of(maps: np.ndarray, starts: np.ndarray, distance: int = DISTANCE) -> np.ndarray:
    """By the definition, from attention (heads, L, L)."""
    ends, found = [*starts[1:], maps.shape[-1]], np.zeros(len(starts))
    for k in range(len(starts)):
        later = (maps[:, starts[j] : ends[j], starts[k] : ends[k]] for j in range(k + distance, len(starts)))
        found[k] = sum((one.mean((1, 2)) for one in later), np.zeros(len(maps))).max()
    return found


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[list[Found]]]:
    batch = parity.mini_batch(3)
    return {
        processes: parity.run_world("test_influence", "surveyed", processes, folder, cases, batch)
        for processes, cases in CASES.items()
    }


@pytest.mark.processes
@pytest.mark.parametrize("processes, number", [(n, i) for n, cases in CASES.items() for i in range(len(cases))])
def test_a_survey_finds_what_a_direct_softmax_does(
    found: dict[int, Any], direct: dict[str, list[Direct]], processes: int, number: int
):
    case, batch = CASES[processes][number], parity.mini_batch(3)
    layers, heads = (range(4) if chosen is None else chosen for chosen in (case.layers, case.heads))
    seen, last, greatest = set(), set(), 0.0
    for rank in found[processes]:
        own: Found = rank[number]
        for place, values in own.influences.items():
            expected = direct[case.model][place]
            maps = expected.maps[list(layers)][:, list(heads)].reshape(-1, *expected.maps.shape[2:])
            influences = influences_of(maps, steps_of(place, batch[place], case.by_token))
            # Of one-token steps an influence adds up to several, where fp32 has no finer numbers.
            np.testing.assert_allclose(values, influences, rtol=1e-6 if case.by_token else 0, atol=1e-6)
            assert values.dtype == np.float32
            greatest = max(greatest, *influences)
            seen.add(place)
            # To the last bit: what listens changes nothing.
            np.testing.assert_array_equal(own.log_probs[place], own.measured[place])
            if len(own.log_probs[place]):
                np.testing.assert_allclose(own.log_probs[place], expected.log_probs, rtol=0, atol=1e-4)
                np.testing.assert_allclose(own.entropies[place], expected.entropies, rtol=0, atol=1e-4)
                last.add(place)
    assert seen == last == set(range(case.number))
    assert greatest > 0.1


class _Core(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, packed_seq_params: Any) -> None:
        """What attends in a layer, without attending."""


class Heard(NamedTuple):
    """What a tap found in one layer of random queries and keys (L, heads, D), rotated, and the most bytes that were
    alive meanwhile."""

    influences: np.ndarray
    bytes: int
    query: torch.Tensor
    key: torch.Tensor


def heard(
    length: int,
    steps: np.ndarray,
    settings: InfluenceSettings,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype = torch.float32,
) -> Heard:
    torch.manual_seed(length)
    query, key = (torch.randn(length, 1, number, width, dtype=dtype) for number in (heads, kv_heads))
    batch = lay_out([Sequence(tokens=np.zeros(length, np.int32), positions=from_place(1, length))], packed=True)
    packing = cpu_packing(batch, torch.rand(width // 2), 1.0, dtype)
    core = _Core()
    layer = SimpleNamespace(self_attention=SimpleNamespace(core_attention=core))
    tap = InfluenceTap(settings, [steps], [length], Grid(), heads, width**-0.5)
    tap.now(batch, [0])
    model = SimpleNamespace(decoder=SimpleNamespace(layers=[layer]))
    with tap.listening([model], [Chunk(range(1), True, True)]), LiveBytes(query, key) as live:
        core(query, key, packed_seq_params=packing)
    assert packing.cos is not None and packing.sin is not None
    query, key = (rotate(one, packing.cos, packing.sin)[:, 0] for one in (query, key))
    return Heard(tap.gather()[0], live.peak, query, key)


@pytest.mark.parametrize("heads", [None, (1, 2, 4)])
def test_long_steps_and_one_token_steps_in_one_layer(heads: tuple[int, ...] | None):
    for steps in (np.arange(200), np.array([0, 3, 4, 5, 100, 101, 180])):
        for block in (16, 500):
            made = heard(200, steps, InfluenceSettings(distance=3, query_block=block, heads=heads), 6, 2, 16)
            keys = made.key.double().repeat_interleave(3, dim=1).transpose(0, 1)
            logits = made.query.double().transpose(0, 1) @ keys.mT / 4
            maps = logits.masked_fill(torch.ones(200, 200).triu(1).bool(), -torch.inf).softmax(-1).numpy()
            expected = influences_of(maps if heads is None else maps[list(heads)], steps, distance=3)
            np.testing.assert_allclose(made.influences, expected, rtol=1e-6, atol=1e-6)


def test_memory_grows_as_the_tokens_do_where_every_token_is_a_step():
    settings = InfluenceSettings(query_block=16)
    short, long = (heard(length, np.arange(length), settings, 8, 2, 16).bytes for length in (512, 2048))
    assert long < 4.2 * short


def test_steps_that_are_none_of_a_sequence():
    for steps in ([1, 2], [0, 2, 2], [0, 9], []):
        with pytest.raises(ValueError, match="steps of a sequence of 9 tokens must begin at 0 and ascend"):
            InfluenceTap(InfluenceSettings(), [np.array(steps, int)], [9], Grid(), 4, 1.0)


@pytest.mark.parametrize(
    "settings, refused",
    [
        ({}, []),
        ({"layers": (0, 27), "heads": (11,)}, []),
        (
            {"layers": ()},
            ["algorithm.a.layers=[]: leaves nothing to look at. Fix: name some, or remove it to look at all 28."],
        ),
        (
            {"layers": (28,), "heads": (0, 12)},
            [
                "algorithm.a.layers=[28]: must be numbers of the model's 28 layers, 0 to 27. Fix: correct them, or "
                "remove it to look at all.",
                "algorithm.a.heads=[0, 12]: must be numbers of the model's 12 heads, 0 to 11. Fix: correct them, or "
                "remove it to look at all.",
            ],
        ),
    ],
)
def test_layers_and_heads_that_a_model_does_not_have(settings: dict[str, Any], refused: list[str]):
    assert [str(one) for one in InfluenceSettings(**settings).refusals("algorithm.a", 28, 12)] == refused
