"""Mixtures of experts in the engine: weights against vLLM's own loader, routing against transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import torch
import torch.distributed as dist
import transformers
from rollout_workers import MOE_FAMILIES, shared_prompts, write_checkpoint

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

EXACT = [family for family, (_, _, precision, _) in MOE_FAMILIES.items() if precision == "fp32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    (folder / "checkpoints").mkdir()
    for family in MOE_FAMILIES:
        for seed in (1, 2):
            write_checkpoint(folder / "checkpoints", family, seed)
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["TP1", "TP2"])
def ranks(folder: Path, request: pytest.FixtureRequest) -> list[Any]:
    """What each rank of an engine over one or two processes found."""
    place = folder / f"experts-{request.param}"
    place.mkdir()
    return parity.run_world("rollout_workers", "experts_scenario", request.param, place)


@pytest.fixture(scope="module")
def routed(folder: Path) -> dict[tuple[str, int], Any]:
    """A model of transformers by family and checkpoint."""
    return {
        (family, seed): transformers.AutoModelForCausalLM.from_pretrained(
            folder / "checkpoints" / f"{family}-{seed}", dtype=torch.float32
        )
        for family in EXACT
        for seed in (1, 2)
    }


def test_written_experts_are_those_of_vllms_loader(ranks: list[Any]):
    """Bitwise, after the push of another checkpoint before, and so are the answers."""
    for rank in ranks:
        assert set(rank) == set(MOE_FAMILIES)
        for family, ((weights, completions), (_, (_, pushed, answers, _)), _) in rank.items():
            assert set(pushed) == set(weights)
            different = [name for name in weights if not torch.equal(weights[name], pushed[name])]
            assert not different, f"{family}: {different}"
            assert answers == completions, family


def test_the_engine_holds_what_was_written(ranks: list[Any]):
    """After each push; experts without vLLM's padding."""
    for rank in ranks:
        for family, (_, written, _) in rank.items():
            for values, pushed, _, _ in written:
                assert sum("w13_weight" in name for name in values) in (1, 2)
                for name, value in values.items():
                    assert torch.equal(pushed[name][: len(value)], value), f"{family}: {name}"


def test_the_weight_map_fills_the_engines_slots(ranks: list[Any]):
    """Names, shapes and every element, padding rows of the vocabulary as zeros."""
    for rank in ranks:
        for family, (_, (_, (values, _, _, _)), planned) in rank.items():
            assert sorted(planned) == sorted(values)
            for name, value in values.items():
                expected = torch.zeros_like(planned[name], dtype=value.dtype)
                expected[: len(value)] = value
                assert torch.equal(planned[name].to(value.dtype), expected), f"{family}: {name}"


def test_only_the_layer_being_written_is_held_twice(ranks: list[Any]):
    """After a `finish`, one stack at most: the first, which waits for the second to be packed with it."""
    for rank in ranks:
        for _, written, _ in rank.values():
            assert [counts["staged"] for *_, counts in written] == [1, 1]


def outputs(model: Any, completion: Any) -> tuple[torch.Tensor, np.ndarray]:
    """Log-probs (T, V) of a response's positions and experts (P + T - 1, layers, k) by transformers."""
    prompt = shared_prompts()[completion.index].prompt_token_ids
    ids = torch.tensor([*prompt, *completion.token_ids])[:-1]
    with torch.no_grad():
        found = model(ids[None], output_router_logits=True)
    count = model.config.num_experts_per_tok
    experts = [layer.view(len(ids), -1).topk(count).indices.sort().values for layer in found.router_logits]
    return torch.log_softmax(found.logits[0, len(prompt) - 1 :].double(), -1), torch.stack(experts, 1).numpy()


@pytest.mark.parametrize("family", EXACT)
def test_answers_and_routing_are_transformers(ranks: list[Any], routed: dict[tuple[str, int], Any], family: str):
    """Also where prompts come from the prefix cache, and where requests were thrown out and computed again."""
    for rank in ranks:
        for seed, (_, _, completions, counts) in zip((2, 1), rank[family][1], strict=True):
            assert counts["cached"] > 1000 and counts["thrown out"] > 0
            assert [completion.index for completion in completions] == list(range(24))
            for completion in completions:
                log_probs, experts = outputs(routed[family, seed], completion)
                ids = torch.tensor(completion.token_ids)
                assert torch.equal(log_probs.argmax(-1), ids)
                torch.testing.assert_close(
                    torch.tensor(completion.log_probs).double(), log_probs.gather(-1, ids[:, None])[:, 0],
                    atol=1e-5, rtol=0,
                )  # fmt: skip
                assert completion.routed_experts.dtype == np.int16
                np.testing.assert_array_equal(completion.routed_experts, experts)


def test_ranks_record_the_same_routing(ranks: list[Any]):
    for family in MOE_FAMILIES:
        for number in range(2):
            for one, other in zip(*(rank[family][1][number][2] for rank in (ranks[0], ranks[-1])), strict=True):
                assert one.routed_experts.shape == (
                    len(shared_prompts()[one.index].prompt_token_ids) + len(one.token_ids) - 1,
                    1 if family == "qwen2_moe" else 2,
                    2,
                )
                np.testing.assert_array_equal(one.routed_experts, other.routed_experts)
