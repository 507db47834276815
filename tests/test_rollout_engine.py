"""The engine against Hugging Face, against itself, and against vLLM's own weight loader."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
import torch.distributed as dist
import transformers
from rollout_workers import DEEDS, FAMILIES, requests, write_checkpoint

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of every family, two sets of weights each."""
    folder = tmp_path_factory.mktemp("rollout")
    (folder / "checkpoints").mkdir()
    for family in FAMILIES:
        for seed in (1, 2):
            write_checkpoint(folder / "checkpoints", family, seed)
    return folder


def run(folder: Path, scenario: str, processes: int) -> list[Any]:
    place = folder / f"{scenario}-{processes}"
    place.mkdir(exist_ok=True)
    return parity.run_world("rollout_workers", f"{scenario}_scenario", processes, place)


@pytest.fixture(scope="module")
def generated(folder: Path) -> dict[str, Any]:
    return run(folder, "generate", 1)[0]


def log_probs_by_transformers(folder: Path, completions: list, temperature: float = 1.0) -> list[torch.Tensor]:
    """Log-softmax (T, V) of the responses' positions, by Hugging Face's model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "qwen2-1", dtype=torch.float32)
    found = []
    with torch.no_grad():
        for request, completion in zip(requests(len(completions)), completions, strict=True):
            ids = torch.tensor([*request.prompt_token_ids, *completion.token_ids])
            logits = model(ids[None]).logits[0, len(request.prompt_token_ids) - 1 : -1] / temperature
            found.append(torch.log_softmax(logits.double(), -1))
    return found


def chosen(log_probs: torch.Tensor, completion: Any) -> torch.Tensor:
    return log_probs.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]


def test_log_probs_are_the_models(folder: Path, generated: dict[str, Any]):
    for name in ("plain", "unseeded"):
        expected = log_probs_by_transformers(folder, generated[name])
        for completion, log_probs in zip(generated[name], expected, strict=True):
            torch.testing.assert_close(
                torch.tensor(completion.log_probs).double(), chosen(log_probs, completion), atol=1e-5, rtol=0
            )


def test_log_probs_are_those_of_the_sampling_distribution(folder: Path, generated: dict[str, Any]):
    """Temperature 0.7, the 20 likeliest tokens, of these the fewest that hold 0.8 of the mass."""
    for completion, log_probs in zip(
        generated["shaped"], log_probs_by_transformers(folder, generated["shaped"], 0.7), strict=True
    ):
        top = log_probs.topk(20)
        kept = torch.log_softmax(top.values, -1)
        below = kept.exp().cumsum(-1) - kept.exp()
        kept = torch.log_softmax(kept.masked_fill(below >= 0.8, -torch.inf), -1)
        shaped = torch.full_like(log_probs, -torch.inf).scatter(-1, top.indices, kept)
        torch.testing.assert_close(
            torch.tensor(completion.log_probs).double(), chosen(shaped, completion), atol=1e-4, rtol=0
        )


def test_greedy_takes_the_likeliest_token(folder: Path, generated: dict[str, Any]):
    for completion, log_probs in zip(
        generated["greedy"], log_probs_by_transformers(folder, generated["greedy"]), strict=True
    ):
        assert torch.equal(log_probs.argmax(-1), torch.tensor(completion.token_ids))


def test_responses_end_at_a_stop_token_or_at_the_limit(generated: dict[str, Any]):
    for name, stops in (("plain", {1}), ("stop", {1, 5, 9, 17, 33})):
        reasons = set()
        for completion in generated[name]:
            reasons.add(completion.finish_reason)
            assert not stops.intersection(completion.token_ids[:-1])
            assert len(completion.log_probs) == len(completion.token_ids) <= 24
            if completion.finish_reason == "stop":
                assert completion.token_ids[-1] in stops
            else:
                assert len(completion.token_ids) == 24 and completion.token_ids[-1] not in stops
        assert reasons == {"stop", "length"}


def test_results_come_in_order_and_repeat(generated: dict[str, Any]):
    assert [completion.index for completion in generated["plain"]] == list(range(40))
    assert generated["plain"] == generated["again"]
    assert generated["unseeded"] == generated["unseeded again"]
    assert generated["unseeded"] != generated["unseeded other"]


def test_long_prompts_with_seeds_are_not_cut(generated: dict[str, Any]):
    """80 equal prompts of 150 tokens: different seeds, different answers."""
    assert len({completion.token_ids for completion in generated["long"]}) > 70


def test_completions_tell_the_version_of_the_weights(generated: dict[str, Any]):
    assert {completion.version for completion in generated["plain"]} == {7}


def test_what_is_asked_to_stop_gives_its_requests_up(generated: dict[str, Any]):
    """After 64 engine steps of 16 requests at a time: what was whole by then is kept."""
    stopped, running, later = generated["stopped"]
    assert 16 < len(stopped) < 200
    assert running == 0 and later == []


def test_the_trainers_random_states_are_untouched(generated: dict[str, Any]):
    assert generated["states kept"]


def test_replicas_share_the_work(folder: Path, generated: dict[str, Any]):
    """Two replicas, each tensor-parallel over two processes."""
    processes, tensor = 4, 2
    ranks = run(folder, "replicas", processes)
    for first in range(0, processes, tensor):
        for rank in range(first + 1, first + tensor):
            assert {k: v for k, v in ranks[rank].items() if k != "speaks"} == {
                k: v for k, v in ranks[first].items() if k != "speaks"
            }
    assert [rank["speaks"] for rank in ranks] == [rank % tensor == 0 for rank in range(processes)]
    speakers = [ranks[0], ranks[tensor]]
    assert [completion.index for completion in speakers[1]["fixed"]] == list(range(1, 41, 2))
    alone = {completion.index: completion for completion in generated["plain"]}
    for way in ("fixed", "shared", "shared again"):
        together = sorted((c for speaker in speakers for c in speaker[way]), key=lambda c: c.index)
        assert [c.index for c in together] == list(range(41))
        # Seeds make the answers the same wherever they were made; sums in another order change last bits.
        for completion in together[:40]:
            assert completion.token_ids == alone[completion.index].token_ids
            assert completion.log_probs == pytest.approx(alone[completion.index].log_probs, abs=1e-5)

    for rank in ranks:
        check_continued(rank)
    check_turns(folder, [turn for speaker in speakers for turn in [speaker["turns"]]])


def check_continued(rank: dict[str, Any]) -> None:
    """Requests submitted while others run are answered as in a call of their own."""
    expected = {one.index: one for one in rank["two calls"]}
    assert sorted(expected) == [*range(12), *range(100, 112)]
    for way, indices in (("one call", [*expected]), ("by hand", [*range(6), *range(100, 106)])):
        assert sorted(one.index for one in rank[way]) == sorted(indices)
    assert [one.index for one in rank["one call"]] == sorted(expected)
    assert [one.index for one in rank["collected"]] == [*range(6, 12)]
    for one in rank["one call"] + rank["by hand"] + rank["collected"]:
        assert one.token_ids == expected[one.index].token_ids
        assert one.log_probs == pytest.approx(expected[one.index].log_probs, abs=1e-5)
    # Second answers began while first ones were being made.
    assert [one.index >= 100 for one in rank["by hand"]] != sorted(one.index >= 100 for one in rank["by hand"])
    assert rank["counts"][-1] == 0 and rank["left"] == 0


def check_turns(folder: Path, replicas: list[dict[str, Any]]) -> None:
    """Samples of several turns, of two replicas."""

    def of(way: str) -> list[dict[str, Any]]:
        found = sorted((one for replica in replicas for one in replica[way]), key=lambda one: one["index"])
        assert [one["index"] for one in found] == list(range(24))
        return found

    for one, request in zip(of("played"), requests(24), strict=True):
        assert one["prompt_token_ids"] == (*request.prompt_token_ids, 4)
        assert one["turns"] == 3 and one["failure"] is None
        check_stretches(one)
        assert [stretch[2] for stretch in one["stretches"]] == ["policy", "environment"] * 2 + ["policy"]
        said = stretches(one, "policy")
        assert stretches(one, "environment") == [(50, 51, 52)] * 2
        assert one["reward"] == pytest.approx(sum(said[-1]) / 1000)
        assert all(part[-1] == 1 or len(part) == 12 for part in said)
        assert one["finish_reason"] == ("stop" if said[-1][-1] == 1 else "length")
    check_log_probs(folder, of("played")[:6])
    # Nothing is generated twice, and what was there before is found in the cache.
    for replica in replicas:
        kept = sum(len(part) for one in replica["played"] for part in stretches(one, "policy"))
        assert sum(tokens for tokens, _ in replica["made"]) == kept
        assert sum(cached for _, cached in replica["made"]) > 0
    for one, first in zip(
        of("played"),
        sorted((one for replica in replicas for one in replica["first turns"]), key=lambda one: one.index),
        strict=True,
    ):
        assert stretches(one, "policy")[0] == first.token_ids
    assert [one["token_ids"] for one in of("in order")] == [one["token_ids"] for one in of("played")]
    assert of("in order") == of("again")
    for one in of("few turns"):
        assert one["turns"] == 2 and one["finish_reason"] == "length"
        assert one["counters"] == {"environment_turns_used_up": 1}
        assert one["reward"] == pytest.approx(sum(stretches(one, "policy")[-1]) / 1000)
    for one in of("little room"):
        check_stretches(one)
        assert len(one["token_ids"]) <= 15 and one["reward"] is not None
        assert (one["counters"] == {"environment_no_room": 1}) == (one["turns"] < 3)
    assert 1 in {one["turns"] for one in of("little room")} != {1}
    for one, request in zip(of("short prompts"), requests(24), strict=True):
        if len(request.prompt_token_ids) + 1 > 8:
            assert one["failure"] == "environment_prompt_too_long" and one["token_ids"] == () and one["reward"] is None
        else:
            assert one["failure"] is None
    for one in of("unseeded"):
        # Each environment draws by its own seed, though all samples are of one prompt and the engine's have none.
        draws = random.Random(one["index"])
        expected = [(draws.randrange(2, 129),) for _ in range(3)]
        assert stretches(one, "environment") == expected[: one["turns"] - 1]
    check_deeds(of("deeds"))
    for one in of("retry"):
        said = stretches(one, "policy")
        assert [len(part) % 2 for part in said] in ([1], [0, 1], [0, 0])
        # The reward of the turn before does not stand in for a verdict that is missing.
        missing = len(said) == 2 and len(said[-1]) >= 2
        assert one["reward"] == (None if missing else len(said[-1]) % 2)
        assert (one["verdict"]["reward"] is None) == missing == ("retry_without_verdict" in one["counters"])
        assert one["counters"]["graded"] == len(said)
        assert stretches(one, "environment") == [(50, 51)] * (len(said) - 1)
    assert any(one["reward"] is None for one in of("retry"))
    assert all(replica["stopped"] == "ScoringStopped: the judge is away" for replica in replicas)
    assert all(replica["running"] == 0 for replica in replicas)


def stretches(played: dict[str, Any], source: str) -> list[tuple[int, ...]]:
    return [played["token_ids"][start:end] for start, end, whose, _ in played["stretches"] if whose == source]


def check_stretches(played: dict[str, Any]) -> None:
    """They cover the tokens, and the policy's alone have log-probs."""
    at = 0
    for start, end, source, version in played["stretches"]:
        assert start == at < end and version == 0
        at = end
        assert all((one is None) == (source == "environment") for one in played["log_probs"][start:end])
    assert at == len(played["token_ids"]) == len(played["log_probs"])


def check_log_probs(folder: Path, played: list[dict[str, Any]]) -> None:
    """Against transformers' on the whole sequence."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "qwen2-1", dtype=torch.float32)
    for one in played:
        ids = torch.tensor([*one["prompt_token_ids"], *one["token_ids"]])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(one["prompt_token_ids"]) - 1 : -1]
        expected = torch.log_softmax(logits.double(), -1)
        for at, value in enumerate(one["log_probs"]):
            if value is not None:
                assert value == pytest.approx(float(expected[at, one["token_ids"][at]]), abs=1e-5)


def check_deeds(played: list[dict[str, Any]]) -> None:
    """An environment that misbehaves costs its own sample the reward, and a counter."""
    failures = {
        "raises": "environment_raised",
        "dies": "environment_died",
        "sleeps": "environment_timed_out",
        "dict": "environment_bad_reply",
        "start raises": "environment_raised",
        "start dict": "environment_bad_reply",
        "beyond": "environment_bad_reply",
    }
    for one in played:
        deed = DEEDS[one["index"] % 10]
        failure = failures.get(deed)
        assert one["failure"] == failure, deed
        assert one["turns"] == (0 if deed.startswith("start ") else 4 if deed == "nothing" else 1), deed
        assert one["reward"] == (None if failure else 0.5 if deed == "nothing" else None), deed
        counted = failure or {"nothing": "environment_turns_used_up", "long": "environment_no_room"}[deed]
        assert one["counters"] == {counted: 1}


@pytest.mark.parametrize("processes", [1, 2])
def test_written_weights_are_those_of_vllms_loader(folder: Path, processes: int):
    """Bitwise, as the kernels use them, and so are the answers: first, second and first set of weights again."""
    for rank in run(folder, "weights", processes):
        assert set(rank) == set(FAMILIES)
        for family, (read, written) in rank.items():
            names = set(read[0][0])
            assert any("packed" in name for name in names), family
            assert any(not torch.equal(read[0][0][name], read[1][0][name]) for name in names)
            for number, (weights, completions, _) in zip((0, 1, 0), written, strict=True):
                assert set(weights) == names
                different = [name for name in names if not torch.equal(read[number][0][name], weights[name])]
                assert not different, f"{family}: {different}"
                assert completions == read[number][1], family
            checksums = [checksum for _, _, checksum in written]
            assert checksums[0] == checksums[2] != checksums[1]
