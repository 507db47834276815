"""BRIDGE's identities and updates through the real policy, in one process and cut over several.

With AdamW, weight decay and clipping, every number and weight of all sets; by name as in docs/algorithms.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import torch

SP = {"tensor": 2, "sequence": True}
ADAPTER = {"rank": 4, "alpha": 6.0}
SCALE = ADAPTER["alpha"] / ADAPTER["rank"]
#: By number of processes: the model and its layout; the first of a model is what the others are compared with.
LAYOUTS: dict[int, list[tuple[str, dict[str, Any]]]] = {
    1: [("qwen2-tied", {}), ("qwen3-moe", {})],
    2: [
        ("qwen2-tied", {}),
        ("qwen2-tied", {"tensor": 2}),
        ("qwen2-tied", SP),
        ("qwen2-tied", {"pipeline": 2}),
        ("qwen2-tied", {"pipeline": 2, "virtual_pipeline": 2}),
        ("qwen2-tied", {"context": 2}),
        ("qwen3-moe", {"expert": 2}),
        ("qwen3-moe", {}),
    ],
    4: [("qwen2-tied", {"tensor": 2})],
}
STEPS = 3
CASES = [(processes, *case) for processes, cases in LAYOUTS.items() for case in cases]


def config_of(path: Path, *, optimizer: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A run's configuration; `settings` are the algorithm's, or sections."""
    sections = {name: settings.pop(name) for name in ("parallel", "moe", "precision") if name in settings}
    algorithm = parity.ALGORITHM | {"name": "bridge"} | settings
    return parity.run_config(
        path,
        algorithm=algorithm,
        adapter=ADAPTER,
        optimizer=optimizer or {},
        data={"path": "unused", "demonstrations": {"path": "unused"}},
        **sections,
    )


def made_batch(seed: int, path: Path, demonstrations: int = 5) -> list[Any]:
    """Answers with log-probs of a reference near their own, and demonstrations without advantages."""
    model = parity.transformers_model(path)
    random = np.random.default_rng(seed)
    answers, shown = parity.mini_batch(seed, 9), parity.mini_batch(seed + 100, demonstrations)
    found = []
    for one in answers:
        with torch.no_grad():
            values = parity.token_values(model, one)[0].numpy()
        noise = random.normal(scale=0.3, size=values.shape)
        found.append(replace(one, log_probs_under={"reference": (values + noise).astype(np.float32)}))
    return found + [replace(one, kind="demonstration", advantages=None, group=50 + one.group) for one in shown]


def fresh(batch: Sequence[Any]) -> list[Any]:
    """The batch without what an update has noted on it."""
    return [replace(one, old_log_probs=None) for one in batch]


@dataclass
class Update:
    """What is said of an update: by pass the losses and the norms of its gradients by set, and the steps' norms."""

    losses: dict[str, float]
    of_passes: dict[str, dict[str, float]]
    norms: dict[str, float]
    numbers: dict[str, float]
    skipped: dict[str, bool]
    entropies: dict[str, float]


def update(policy: Any, algorithm: Any, batch: Sequence[Any], step: int = 1) -> Update:
    """One update as the loop makes it, on the whole mini-batch, each data-parallel rank with its share."""
    from megarl.algorithms.objective import BatchTotals

    kinds = {kind: [one for one in batch if one.kind == kind] for kind in ("answer", "demonstration")}
    counts = {kind: BatchTotals(float(sum(s.trained for s in own)), float(len(own))) for kind, own in kinds.items()}
    mine = [own[i] for own in kinds.values() for i in parity.share(own, policy.grid)]
    passes, steps = parity.rounds_of(policy, algorithm.objectives_of(step), mine, BatchTotals.of(counts), current=True)
    losses = {name: found.loss for name, found in passes.items()}
    return Update(
        losses,
        {name: dict(found.grad_norms) for name, found in passes.items()},
        {name: found.grad_norm for name, found in steps.items()},
        algorithm.numbers(losses),
        {name: step.skipped for name, step in steps.items()},
        {name: found.means["entropy"] for name, found in passes.items()},
    )


def weights_of(policy: Any) -> dict[str, dict[str, np.ndarray]]:
    """This rank's shards of every set that trains."""
    return {
        name: {key: one.detach().numpy().copy() for key, one in trained.named_parameters()}
        for name, trained in policy.trained.items()
    }


def merged_and_apart(policy: Any, folder: Path) -> dict[str, Any]:
    """By Hugging Face name on rank 0: what the policy and the shadow compute with, and the adapter's factors."""
    from megarl.policy.adapter_files import save_adapter

    found = {"policy": parity.exported(policy, folder / "hf")}
    with policy.using("shadow"):
        found["shadow"] = parity.exported(policy, folder / "hf")
    save_adapter(policy, folder / "adapter")
    found["adapter"] = parity.read_checkpoint(folder / "adapter") if policy.world.is_first else None
    return found


def begin(policy: Any) -> None:
    for one in ("shadow",):
        if one in policy.trained:
            policy.keep(one)


@contextmanager
def bridge(config: Any, world: Any, **options: Any) -> Iterator[tuple[Any, Any]]:
    with parity.policy_of(config, world, **options) as policy:
        begin(policy)
        yield policy, parity.grpo(config)


# --- identities, in one process ---------------------------------------------------------------------------------------


@dataclass
class Course:
    """The updates of a run, and the weights of its sets before and after each."""

    updates: list[Update]
    weights: list[dict[str, dict[str, np.ndarray]]]
    backward: list[list[bool]]
    here: list[tuple[str, ...]]


def course(world: Any, config: Any, batches: list[list[Any]], algorithm: Any = None) -> Course:
    found = Course([], [], [], [])
    with bridge(config, world) as (policy, own):
        found.weights.append(weights_of(policy))
        for number, batch in enumerate(batches, start=1):
            calls: list[bool] = []
            networks = {id(one.network): one.network for one in policy.trained.values()}.values()
            runs = [(network.passes, network.passes.run) for network in networks]
            for passes, run in runs:
                passes.run = counting(run, calls, policy, found.here)
            found.updates.append(update(policy, algorithm or own, fresh(batch), number))
            for passes, run in runs:
                passes.run = run
            found.weights.append(weights_of(policy))
            found.backward.append(calls)
    return found


def counting(run: Any, calls: list[bool], policy: Any, here: list[tuple[str, ...]]) -> Any:
    def counted(*arguments: Any, forward_only: bool, **options: Any) -> Any:
        calls.append(not forward_only)
        here.append(on_the_device(policy))
        return run(*arguments, forward_only=forward_only, **options)

    return counted


def on_the_device(policy: Any) -> tuple[str, ...]:
    """The sets that can be trained; on the CPU nothing moves, but each knows where it would be."""
    return tuple(name for name, one in policy.trained.items() if one._residence.trainable)


class Misprinted:
    """BRIDGE with the minus sign that is printed in one version: the shadow goes down."""

    def __init__(self, algorithm: Any) -> None:
        self._algorithm = algorithm
        self.numbers = algorithm.numbers

    def objectives_of(self, step: int) -> tuple[Any, ...]:
        *others, shadows = self._algorithm.objectives_of(step)
        return *others, replace(shadows, goes_to={**shadows.goes_to, "shadow": -1.0})


def demonstrations_alone(algorithm: Any) -> Any:
    """The base and the adapter on demonstrations, by one objective with the weight 1."""
    _, sft, _ = algorithm.objectives_of(1)
    alone = replace(sft, goes_to={"policy": 1.0, "adapter": 1.0})
    return type("Alone", (), {"objectives_of": lambda self, step: (alone,), "numbers": lambda self, losses: {}})()


#: An AdamW whose first update is -lr/epsilon times the gradient, all but the last digits.
LINEAR = {"lr": 1e4, "epsilon": 1e4, "weight_decay": 0.0, "clip_grad": 0.0, "betas": (0.9, 0.99)}


def identities(world: Any, path: Path, batches: list[list[Any]]) -> dict[str, Any]:
    """A scenario of `run_world`, in one process."""
    plain = parity.run_config(path)
    one = config_of(path, rl_weight=1.0)
    found: dict[str, Any] = {
        "plain": course(world, plain, [[s for s in batch if s.kind == "answer"] for batch in batches]),
        "one": course(world, one, batches),
        "misprinted": course(world, one, batches, Misprinted(parity.grpo(one))),
        "zero": course(world, config_of(path, rl_weight=0.0), batches),
        "alone": course(world, config_of(path), batches, demonstrations_alone(parity.grpo(config_of(path)))),
        "half": course(world, config_of(path), batches),
        "still": course(world, config_of(path, adapter_lr=0.0), batches),
        "mix": course(world, config_of(path, shadow="none"), batches),
        "rebuilt": course(world, config_of(path, shadow="rebuilt"), batches),
        "sum": course(world, config_of(path, shadow="none", rl_weight=1.0, sft_weight=1.0), batches[:2]),
        "alternating": course(
            world, config_of(path, shadow="none", rl_weight=1.0, rl_weight_schedule="alternating"), batches[:2]
        ),
        "linear": course(world, config_of(path, rl_weight_schedule="linear"), batches[:2]),
    }
    apart = {"rl": (1.0, 0.0), "sft": (0.0, 1.0), "both": (1.0, 0.25)}
    for name, (rl, sft) in apart.items():
        chosen = config_of(path, shadow="none", rl_weight=rl, sft_weight=sft, optimizer=LINEAR)
        found[f"linear {name}"] = course(world, chosen, batches[:1])
    spoiled = [[replace(s, advantages=s.advantages * np.nan) if s.kind == "answer" else s for s in batches[0]]]
    found["spoiled"] = course(world, config_of(path), [*spoiled, batches[0]])
    found["finer"] = finer(world, config_of(path, shadow="rebuilt", precision="bf16"), batches[0])
    for weight in (0.25, 0.75):
        found[f"linear update {weight}"] = course(
            world, config_of(path, rl_weight=weight, optimizer=LINEAR), batches[:1]
        )
    return found


def finer(world: Any, config: Any, batch: list[Any]) -> dict[str, tuple[bool, bool]]:
    """After an update, by set: whether the optimizer's own weights are the policy's, and whether they are all bf16's,
    once the shadow is built anew."""
    with bridge(config, world) as (policy, algorithm):
        update(policy, algorithm, fresh(batch))
        policy.trained["shadow"].copy(policy.trained["policy"])
        own = policy.trained["policy"]._main_parameters()
        return {
            name: (
                all(torch.equal(one, other) for one, other in zip(found, own, strict=True)),
                all(torch.equal(one, one.bfloat16().float()) for one in found),
            )
            for name in ("policy", "shadow")
            for found in [policy.trained[name]._main_parameters()]
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("bridge")
    for model in {model for _, model, _ in CASES}:
        parity.write_model(found, model)
    return found


@pytest.fixture(scope="module")
def batches(folder: Path) -> list[list[Any]]:
    return [made_batch(seed, folder / "qwen2-tied") for seed in range(5)]


@pytest.fixture(scope="module")
def seen(folder: Path, batches: list[list[Any]]) -> dict[str, Any]:
    return parity.run_world("test_bridge", "identities", 1, folder / "qwen2-tied", batches)[0]


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name]) for name in one)


def is_plain(found: Course, plain: Course) -> bool:
    """Whether five steps were those of plain reinforcement, to the bit."""
    start = found.weights[0]
    return all(
        same(mine["policy"], other["policy"])
        and same(mine["policy"], mine["shadow"])
        and same(mine["adapter"], start["adapter"])
        for mine, other in zip(found.weights, plain.weights, strict=True)
    )


def test_b1_with_all_weight_on_rollouts_it_is_plain_reinforcement(seen: dict[str, Any]):
    one, plain = seen["one"], seen["plain"]
    assert is_plain(one, plain) and not same(one.weights[0]["policy"], one.weights[-1]["policy"])
    for mine, other in zip(one.updates, plain.updates, strict=True):
        assert mine.losses["policy"] == mine.losses["shadow"] == other.losses["policy"]
        assert mine.norms["policy"] == mine.norms["shadow"] == other.norms["policy"] > 0
        # The rounds of one adapter's gradients differ by nothing.
        assert mine.norms["adapter"] == 0 and mine.numbers["cooperative_gain"] == 0


def test_b8_with_the_misprinted_sign_it_is_not(seen: dict[str, Any]):
    assert not is_plain(seen["misprinted"], seen["plain"])
    assert not same(seen["misprinted"].weights[1]["policy"], seen["misprinted"].weights[1]["shadow"])


def test_b2_with_none_base_and_adapter_learn_demonstrations_alone(seen: dict[str, Any]):
    zero, alone = seen["zero"], seen["alone"]
    for mine, other in zip(zero.weights, alone.weights, strict=True):
        assert same(mine["policy"], other["policy"]) and same(mine["adapter"], other["adapter"])
    for mine, other in zip(zero.updates, alone.updates, strict=True):
        assert mine.losses["sft"] == other.losses["sft"] == mine.numbers["sft_loss"]
    # The shadow goes its way all the same.
    assert not same(zero.weights[1]["shadow"], zero.weights[0]["shadow"])


def test_b3_without_a_learning_rate_the_adapter_leaves_a_fixed_mix(seen: dict[str, Any]):
    still, mix = seen["still"], seen["mix"]
    for mine, other in zip(still.weights, mix.weights, strict=True):
        assert same(mine["policy"], other["policy"]) and same(mine["adapter"], still.weights[0]["adapter"])
    assert set(mix.weights[0]) == {"policy"} and "cooperative_gain" not in mix.updates[0].numbers
    assert not same(still.weights[-1]["policy"], seen["half"].weights[-1]["policy"])


@pytest.mark.parametrize("weight", [0.25, 0.75])
def test_b4_b7_the_first_step_of_the_adapter_is_that_of_demonstrations(
    seen: dict[str, Any], folder: Path, batches: list[list[Any]], weight: float
):
    """Whatever λ: the two terms of the gain have one gradient. That of B is s G Aᵀ, of A sBᵀG, which is 0 as B is."""
    before, after = seen[f"linear update {weight}"].weights
    model = parity.transformers_model(folder / "qwen2-tied")
    demonstrations = [one for one in batches[0] if one.kind == "demonstration"]
    tokens = sum(one.trained for one in demonstrations)
    loss = -sum((parity.token_values(model, one)[0].sum() for one in demonstrations), torch.zeros(())) / tokens
    loss.backward()
    gradients = {name: one.grad.numpy() for name, one in model.named_parameters()}
    moved = 0
    for name, a in before["adapter"].items():
        if not name.endswith(".lora_A"):
            continue
        layer = name.removesuffix(".lora_A")
        wanted = -(1 - weight) * SCALE * gradients[f"{layer}.weight"] @ a.T
        change = after["adapter"][f"{layer}.lora_B"] - before["adapter"][f"{layer}.lora_B"]
        assert np.linalg.norm(change - wanted) < 2e-4 * np.linalg.norm(wanted), layer
        assert np.array_equal(after["adapter"][name], a)
        moved += 1
    assert moved == 4 * 7


def test_b6_a_constant_added_to_rewards_changes_no_gain(folder: Path, batches: list[list[Any]]):
    found = parity.run_world("test_bridge", "shifted", 1, folder / "qwen2-tied", batches[:2])[0]
    assert found[0.0] == found[3.0] != 0


def shifted(world: Any, path: Path, batches: list[list[Any]]) -> dict[float, float]:
    """By what is added to the rewards, the gain of a second step. A scenario of `run_world`."""
    from megarl.algorithms.base import Group
    from megarl.records import Head, Key, Prompt, Stretch

    config, found = config_of(path), {}
    for constant in (0.0, 3.0):
        with bridge(config, world) as (policy, algorithm):
            for batch in batches:
                answers = [one for one in fresh(batch) if one.kind == "answer"]
                heads = tuple(
                    Head(Key(0, 0, number), 0, (Stretch(0, one.trained, "policy"),), reward=number % 3 + constant)
                    for number, one in enumerate(answers)
                )
                (credit,) = algorithm.credit(1, [Group(0, Prompt(0, (2,), "", ""), 0, heads)])
                for one, trained in zip(answers, credit.trained, strict=True):
                    one.advantages = np.full(one.trained, trained.spans[0].advantage, np.float32)
                others = [one for one in fresh(batch) if one.kind != "answer"]
                gain = update(policy, algorithm, answers + others).numbers["cooperative_gain"]
            found[constant] = gain
    return found


def test_an_update_takes_three_passes(seen: dict[str, Any]):
    """Each forward and backward; no other goes forward to find old log-probs. One without weight has no backward."""
    for calls in (*seen["half"].backward, *seen["rebuilt"].backward):
        assert calls == [True, True, True]
    assert seen["one"].backward[0] == [True, False, True] and seen["zero"].backward[0] == [False, True, True]


def test_every_gradient_has_its_norm(seen: dict[str, Any]):
    first, last = seen["half"].updates[0], seen["half"].updates[-1]
    assert {name: set(norms) for name, norms in last.of_passes.items()} == {
        "policy": {"policy", "adapter"},
        "sft": {"policy", "adapter"},
        "shadow": {"shadow", "adapter"},
    }
    assert set(last.norms) == {"policy", "adapter", "shadow"}
    # Before the first step base and shadow are one, and so are their gradients.
    assert first.of_passes["policy"]["policy"] == first.of_passes["shadow"]["shadow"] == first.norms["shadow"]
    assert first.of_passes["policy"]["adapter"] == first.of_passes["shadow"]["adapter"]
    assert first.norms["adapter"] == pytest.approx(first.of_passes["sft"]["adapter"] / 2, rel=1e-5)
    assert last.of_passes["policy"]["policy"] != last.of_passes["shadow"]["shadow"]
    assert first.numbers["cooperative_gain"] == 0 != last.numbers["cooperative_gain"]


def test_a_rebuilt_shadow_is_the_base_with_one_update_by_rollouts(seen: dict[str, Any]):
    rebuilt, plain = seen["rebuilt"], seen["plain"]
    # At first base and shadow are the model, and the update by rollouts is plain reinforcement's.
    assert same(rebuilt.weights[1]["shadow"], plain.weights[1]["policy"])
    assert rebuilt.updates[0].norms["shadow"] == plain.updates[0].norms["policy"]
    # The gain is of the base against that: learning raises the objective on the step's own rollouts.
    assert rebuilt.updates[0].numbers["cooperative_gain"] < 0
    # Then it sets out from the base again, and not from where it was.
    distance = {
        name: sum(np.linalg.norm(one - other[key]) ** 2 for key, one in rebuilt.weights[2]["shadow"].items()) ** 0.5
        for name, other in (("base", rebuilt.weights[1]["policy"]), ("shadow", rebuilt.weights[1]["shadow"]))
    }
    assert distance["base"] < distance["shadow"]


def test_a_rebuilt_shadow_has_what_bf16_weights_do_not_show(seen: dict[str, Any]):
    assert seen["finer"] == {"policy": (True, False), "shadow": (True, False)}


def test_weights_of_the_two_follow_their_schedule(seen: dict[str, Any]):
    alternating, mix, linear = seen["alternating"], seen["mix"], seen["linear"]
    assert alternating.backward == [[False, True], [True, False]]
    assert linear.backward == [[False, True, True], [True, True, True]]
    # The naive sum is two equal halves; the clip comes after.
    found, other = seen["sum"].updates[0], mix.updates[0]
    assert found.norms["policy"] == pytest.approx(2 * other.norms["policy"], rel=1e-5)
    assert set(seen["sum"].weights[0]) == {"policy"}


def test_each_part_of_a_gradient_counts_as_it_is_said(seen: dict[str, Any]):
    """Of a linear update the change by both is the change by one and a quarter of that by the other."""
    changes = {}
    for name in ("rl", "sft", "both"):
        before, after = (one["policy"] for one in seen[f"linear {name}"].weights)
        changes[name] = {key: after[key] - before[key] for key in before}
    for key, both in changes["both"].items():
        wanted = changes["rl"][key] + 0.25 * changes["sft"][key]
        assert np.linalg.norm(both - wanted) < 1e-4 * np.linalg.norm(wanted), key


def test_a_gradient_that_is_no_number_is_applied_nowhere(seen: dict[str, Any]):
    """And leaves nothing behind: the next update is that of a run that never saw it."""
    spoiled, half = seen["spoiled"], seen["half"]
    first, second = spoiled.updates
    assert first.skipped == {"policy": True, "adapter": True, "shadow": True}
    assert all(same(spoiled.weights[1][name], spoiled.weights[0][name]) for name in spoiled.weights[0])
    assert second.norms == half.updates[0].norms and not any(second.skipped.values())
    assert all(same(spoiled.weights[2][name], half.weights[1][name]) for name in half.weights[1])


def test_one_base_at_a_time_is_on_the_device(seen: dict[str, Any]):
    for passes in (seen["half"].here, seen["rebuilt"].here, seen["zero"].here):
        assert passes == 5 * [("policy", "adapter"), ("policy", "adapter"), ("adapter", "shadow")]


def test_an_entropy_is_that_of_the_tokens_of_its_pass(seen: dict[str, Any]):
    """So without demonstrations the policy's is the same."""
    for mine, other in zip(seen["one"].updates, seen["plain"].updates, strict=True):
        assert mine.entropies["policy"] == other.entropies["policy"] == mine.entropies["shadow"]
    alone, zero = seen["alone"].updates[0], seen["zero"].updates[0]
    assert alone.entropies["sft"] == zero.entropies["sft"] > 1


# --- layouts ----------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    updates: list[Update]
    weights: dict[str, Any]
    before: dict[str, Any]


def cut(world: Any, folder: Path, cases: list[tuple[str, dict[str, Any]]], batches: dict[str, list]) -> list[Outcome]:
    """Three steps of every case in turn. A scenario of `run_world`."""
    found = []
    for model, parallel in cases:
        # With more than rounding of a balancing loss, which is of each micro-batch, no two layouts agree.
        config = config_of(folder / model, parallel=parallel, moe={"aux_loss_coefficient": 1e-12})
        with bridge(config, world) as (policy, algorithm):
            before = merged_and_apart(policy, folder)
            updates = [update(policy, algorithm, fresh(batch)) for batch in batches[model]]
            found.append(Outcome(updates, merged_and_apart(policy, folder), before))
    return found


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[tuple[int, int], Outcome]:
    models = {model for _, model, _ in CASES}
    batches = {model: [made_batch(seed, folder / model) for seed in range(STEPS)] for model in models}
    # One of the last step's for two data-parallel ranks.
    batches["qwen3-moe"][-1] = made_batch(STEPS - 1, folder / "qwen3-moe", demonstrations=1)
    return {
        (processes, number): found
        for processes, cases in LAYOUTS.items()
        for number, found in enumerate(parity.run_world("test_bridge", "cut", processes, folder, cases, batches)[0])
    }


@pytest.mark.parametrize(
    "processes, number", [(n, i) for n, cases in LAYOUTS.items() for i in range(len(cases)) if n > 1]
)
def test_every_layout_does_what_one_process_does(outcomes: dict[tuple[int, int], Outcome], processes: int, number: int):
    model, _ = LAYOUTS[processes][number]
    mine = outcomes[processes, number]
    wanted = outcomes[1, [name for name, _ in LAYOUTS[1]].index(model)]
    for own, other in zip(mine.updates, wanted.updates, strict=True):
        assert own.losses == pytest.approx(other.losses, rel=1e-5)
        assert own.norms == pytest.approx(other.norms, rel=1e-5)
        for name, norms in other.of_passes.items():
            assert own.of_passes[name] == pytest.approx(norms, rel=1e-5)
    for name, tensors in wanted.weights.items():
        for key, value in tensors.items():
            change = np.linalg.norm(value - wanted.before[name][key])
            far = np.linalg.norm(mine.weights[name][key] - value)
            assert far < 1e-5 * np.linalg.norm(value) and far < 2e-4 * change, f"{name}: {key}"
