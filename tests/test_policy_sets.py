"""Two parameter sets that train: each has gradients, an optimizer and a schedule of its own, and all are saved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
from test_policy_state import SCHEDULE, made_batches

from megarl.conversion import to_hf
from megarl.conversion.ranks import Ranks
from megarl.errors import Refusal
from megarl.formats import checkpoint_folder

SET = "shadow"
LAYOUT, OTHER = {"tensor": 2}, {"pipeline": 2}
#: What else a set may be cut by, with the model that is.
FURTHER: list[tuple[str, dict[str, Any]]] = [
    ("qwen2-moe", {"tensor": 2, "sequence": True, "expert": 2}),
    ("qwen2-tied", {"context": 2, "pipeline": 2, "virtual_pipeline": 2}),
]


@dataclass
class Seen:
    """By set: the numbers of updates, and weights after each."""

    losses: list[dict[str, float]]
    norms: list[dict[str, float]]
    rates: list[dict[str, float]]
    weights: list[dict[str, Any]]


def trains(policy: Any, config: Any, batch: list, names: tuple[str, ...], folder: Path, seen: Seen) -> None:
    """An update of the named sets, each by the configured objective."""
    (objective,) = parity.grpo(config).objectives
    objectives = [replace(objective, parameters=name) for name in names]
    mine = [batch[i] for i in parity.share(batch, policy.grid)]
    passes = policy.accumulate(mine, objectives, parity.totals(batch))
    steps = policy.step(passes)
    seen.losses.append({name: found.loss for name, found in passes.items()})
    seen.norms.append({name: step.grad_norm for name, step in steps.items()})
    seen.rates.append({name: step.lr for name, step in steps.items()})
    seen.weights.append({})
    for name in ("policy", SET):
        with policy.using(name):
            seen.weights[-1][name] = parity.exported(policy, folder / "hf")


def scenario(world: Any, folder: Path) -> dict[str, Any]:
    """Both sets, then the shadow alone, a checkpoint, then both; and both again under another layout. A scenario of
    `run_world`."""
    from megarl.policy import checkpoint

    first, second, third = made_batches(3)
    config = parity.run_config(folder / "qwen2-tied", parallel=LAYOUT, optimizer=SCHEDULE)
    other = parity.run_config(folder / "qwen2-tied", parallel=OTHER, optimizer=SCHEDULE)
    made, again, alone = (Seen([], [], [], []) for _ in range(3))
    said = []
    with parity.policy_of(config, world, trains=(SET,)) as policy:
        policy.keep(SET)
        trains(policy, config, first, ("policy", SET), folder, made)
        trains(policy, config, second, (SET,), folder, made)
        root = folder / "saved"
        checkpoint.save(policy, root, 2, {}, optimizer=True, keep=1)
        measured = policy.measure([first[0]], SET), policy.measure([first[0]])
        trains(policy, config, third, ("policy", SET), folder, made)
    saved = checkpoint_folder.require(root, "resume")
    with parity.policy_of(other, world, weights=False, trains=(SET,)) as policy:
        progress = checkpoint.load(policy, saved, optimizer=True)
        trains(policy, other, third, ("policy", SET), folder, again)
    with parity.policy_of(config, world, weights=False) as policy:
        for optimizer in (False, True):
            try:
                checkpoint.load(policy, saved, optimizer=optimizer)
            except Refusal as refusal:
                said.append(str(refusal))
            else:
                loaded = parity.exported(policy, folder / "hf")
    with parity.policy_of(config, world) as policy:
        (objective,) = parity.grpo(config).objectives
        mine = [first[i] for i in parity.share(first, policy.grid)]
        found, step = policy.accumulate(mine, [objective], parity.totals(first)), policy.step()
        alone.losses.append({"policy": found["policy"].loss})
        alone.norms.append({"policy": step["policy"].grad_norm})
        alone.weights.append({"policy": parity.exported(policy, folder / "hf")})
    further = [of_layout(world, folder, model, parallel) for model, parallel in FURTHER]
    return {
        "further": further,
        "made": made,
        "again": again,
        "alone": alone,
        "said": said,
        "sets": set(progress["sets"]),
        "loaded": loaded,
        "measured": measured,
    }


def of_layout(world: Any, folder: Path, model: str, parallel: dict[str, Any]) -> Seen:
    """An update of the policy alone, and one of both sets."""
    config, (batch, *_), seen = (
        parity.run_config(folder / model, parallel=parallel),
        made_batches(1),
        Seen([], [], [], []),
    )
    for names in (("policy",), ("policy", SET)):
        with parity.policy_of(config, world, trains=(SET,)) as policy:
            policy.keep(SET)
            trains(policy, config, batch, names, folder, seen)
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sets")
    for model in {"qwen2-tied", *(model for model, _ in FURTHER)}:
        parity.write_model(folder, model)
    return {"folder": folder} | parity.run_world("test_policy_sets", "scenario", 4, folder)[0]


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    assert set(one) == set(other)
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_sets_with_one_objective_stay_equal_to_the_bit(seen: dict[str, Any]):
    made, alone = seen["made"], seen["alone"]
    assert made.losses[0]["policy"] == made.losses[0][SET] == alone.losses[0]["policy"]
    assert made.norms[0]["policy"] == made.norms[0][SET] == alone.norms[0]["policy"] > 0
    assert same(made.weights[0]["policy"], made.weights[0][SET])
    # A second set beside it changes nothing for the first.
    assert same(made.weights[0]["policy"], alone.weights[0]["policy"])


@pytest.mark.parametrize("number", range(len(FURTHER)))
def test_sets_stay_equal_however_they_are_cut(seen: dict[str, Any], number: int):
    (alone, both) = (seen["further"][number].weights[place] for place in (0, 1))
    numbers = seen["further"][number]
    assert numbers.losses[1]["policy"] == numbers.losses[1][SET] == numbers.losses[0]["policy"]
    assert numbers.norms[1]["policy"] == numbers.norms[1][SET] == numbers.norms[0]["policy"] > 0
    assert same(both["policy"], both[SET]) and same(both["policy"], alone["policy"])
    assert not same(alone[SET], alone["policy"])


def test_a_step_moves_the_sets_that_it_names(seen: dict[str, Any]):
    made = seen["made"]
    assert set(made.losses[1]) == set(made.norms[1]) == {SET}
    assert same(made.weights[1]["policy"], made.weights[0]["policy"])
    assert not same(made.weights[1][SET], made.weights[0][SET])
    # Each has a schedule of its own, in its own steps.
    assert made.rates[2]["policy"] == made.rates[1][SET] != made.rates[2][SET]
    under, own = seen["measured"]
    assert not np.array_equal(under[0], own[0])


def test_all_sets_come_back_under_another_layout(seen: dict[str, Any]):
    made, again = seen["made"], seen["again"]
    assert seen["sets"] == {SET} and again.rates[0] == made.rates[2]
    for name in ("policy", SET):
        assert again.losses[0][name] == pytest.approx(made.losses[2][name], rel=1e-5)
        assert again.norms[0][name] == pytest.approx(made.norms[2][name], rel=1e-5)
        before, after = made.weights[1][name], made.weights[2][name]
        for key, value in after.items():
            change = np.linalg.norm(value - before[key])
            assert np.linalg.norm(again.weights[0][name][key] - value) < 1e-4 * change, f"{name}: {key}"


def test_a_checkpoint_of_several_sets_gives_the_policys_weights_to_any_run(seen: dict[str, Any]):
    assert same(seen["loaded"], seen["made"].weights[1]["policy"])
    out = seen["folder"] / "converted"
    to_hf.convert(seen["folder"] / "saved" / "step_000002", out, Ranks(), hf_config=seen["folder"] / "qwen2-tied")
    assert same(parity.read_checkpoint(out), seen["loaded"])
    (said,) = seen["said"]
    assert said.endswith(
        ", with the trained parameter sets shadow: must have the parameter sets that the run trains beside the policy, "
        "and the run is one without trained parameter sets. Fix: continue with "
        "the algorithm that saved it, or start a new run with model.weights set to it."
    )
