"""What must not change the policy: the reference, and updates whose numbers are not finite."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import arithmetic_run
import numpy as np
import parity
import preloaded
import pytest

from megarl.cli.main import main
from megarl.errors import PhaseError
from megarl.policy import finite

LAYOUTS: tuple[dict[str, Any], ...] = ({"tensor": 2}, {"tensor": 2, "pipeline": 2})
#: Where something that is not finite stands in one sequence of a mini-batch.
POISONS = {
    "NaN advantage": ("advantages", np.nan),
    "infinite advantage": ("advantages", np.inf),
    "NaN old log-prob": ("old_log_probs", np.nan),
}


@dataclass
class Guarded:
    """One rank's findings under one layout."""

    start: list[np.ndarray] | None
    trained: list[np.ndarray] | None
    reference: list[np.ndarray] | None
    trained_again: list[np.ndarray] | None
    kept_while_reference: bool
    kept_after_error: bool
    poisoned: dict[str, tuple[bool, int, bool]]
    after: list[np.ndarray]
    after_without_poison: list[np.ndarray]
    in_a_row_at_end: int
    not_finite: dict[str, str | None]
    split: tuple[float, float]
    whole: tuple[float, float]
    split_weights: list[np.ndarray]
    whole_weights: list[np.ndarray]
    lacking: dict[str, str]
    mixed: list[np.ndarray] | None
    apart: list[np.ndarray] | None


def weights_of(policy: Any) -> list[np.ndarray]:
    return [parameter.detach().numpy().copy() for _, parameter in policy.named_parameters()]


def same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def batches() -> list:
    plain = [parity.mini_batch(seed) for seed in range(3)]
    return [parity.with_old_log_probs(b, [np.full(s.trained, -4.5) for s in b], 7) for b in plain]


def poisoned(batch: list, field: str, value: float) -> list:
    """The mini-batch with `value` at one token of its last sequence, which one data-parallel rank alone has."""
    values = getattr(batch[-1], field).copy()
    values[1] = value
    return [*batch[:-1], replace(batch[-1], **{field: values})]


def guard(world: Any, folder: Path) -> list[Guarded]:
    """Train, look at the reference, meet poison, train on. A scenario of `run_world`."""
    return [guard_layout(world, parity.run_config(folder / "qwen2-tied", parallel=layout)) for layout in LAYOUTS]


def guard_layout(world: Any, config: Any) -> Guarded:
    first, second, third = batches()
    with parity.policy_of(config, world) as policy:
        algorithm = parity.grpo(config)
        mine = [first[i] for i in parity.share(first, policy.grid)]
        start = policy.measure(mine)
        policy.keep("reference")
        parity.update(policy, algorithm, first)
        parity.update(policy, algorithm, second)
        trained, weights = policy.measure(mine), weights_of(policy)
        reference = policy.measure(mine, "reference")
        kept_while_reference = same(weights_of(policy), weights)
        try:
            with policy.using("reference"):
                raise KeyError
        except KeyError:
            kept_after_error = same(weights_of(policy), weights)
        found = {}
        for name, (field, value) in POISONS.items():
            result = parity.update(policy, algorithm, poisoned(third, field, value))
            found[name] = result.skipped, policy.skipped_in_a_row, same(weights_of(policy), weights)
        trained_again = policy.measure(mine)
        parity.update(policy, algorithm, third)
        after, in_a_row = weights_of(policy), policy.skipped_in_a_row
        not_finite = spoil(policy, first[0])
    with parity.policy_of(config, world) as policy:
        for batch in (first, second, third):
            parity.update(policy, parity.grpo(config), batch)
        control = weights_of(policy)
    split, split_weights, lacking = in_two_passes(world, config, first)
    with parity.policy_of(config, world) as policy:
        result = parity.update(policy, parity.grpo(config), first)
        whole, whole_weights = (result.loss, result.grad_norm), weights_of(policy)
    mixed, apart = at_two_temperatures(world, config, first)
    return Guarded(
        start=start,
        trained=trained,
        reference=reference,
        trained_again=trained_again,
        kept_while_reference=kept_while_reference,
        kept_after_error=kept_after_error,
        poisoned=found,
        after=after,
        after_without_poison=control,
        in_a_row_at_end=in_a_row,
        not_finite=not_finite,
        split=split,
        whole=whole,
        split_weights=split_weights,
        whole_weights=whole_weights,
        lacking=lacking,
        mixed=mixed,
        apart=apart,
    )


def in_two_passes(world: Any, config: Any, batch: list) -> tuple[tuple[float, float], list[np.ndarray], dict[str, str]]:
    """Loss, gradient norm and weights of a step after passes over two parts of the mini-batch; before them a pass that
    is discarded, and passes over sequences that lack a value, with what is said of them."""
    with parity.policy_of(config, world) as policy:
        (objective,) = parity.grpo(config).objectives
        mine, counts = [batch[i] for i in parity.share(batch, policy.grid)], parity.totals(batch)
        lacking = {}
        for name, nothing in {"advantages": None, "old_log_probs": None, "log_probs_under": {}}.items():
            # On one rank alone, which has whole sequences on the last stage.
            part = [replace(s, **{name: nothing}) if policy.grid.data_rank == 0 else s for s in mine]
            try:
                policy.accumulate(part, [objective], counts)
            except ValueError as error:
                lacking[name] = str(error)
        for other in (replace(objective, parameters="adapter"), replace(objective, rollout=True)):
            part = [replace(s, rollout_log_probs=None) for s in mine]
            try:
                policy.accumulate(part, [other], counts)
            except ValueError as error:
                lacking[other.parameters + " rollout" * other.rollout] = str(error)
        policy.accumulate(mine, [objective], counts)
        try:
            policy.offload_optimizers()
        except PhaseError as error:
            lacking["memory"] = str(error)
        policy.discard()
        try:
            policy.step()
        except ValueError as error:
            lacking["gradient"] = str(error)
        losses = [policy.accumulate(mine[start::2], [objective], counts)["policy"].loss for start in (0, 1)]
        step = policy.step()["policy"]
        return (sum(losses), step.grad_norm), weights_of(policy), lacking


def at_two_temperatures(
    world: Any, config: Any, batch: list
) -> tuple[list[np.ndarray] | None, list[np.ndarray] | None]:
    """Log-probs where neighbours in a micro-batch have unlike temperatures, and those of each temperature alone."""
    with parity.policy_of(config, world) as policy:
        mine = [batch[i] for i in parity.share(batch, policy.grid)]
        made = [[replace(s, temperature=t) for s in mine] for t in (0.5, 2.0)]
        mixed = policy.measure([made[i % 2][i] for i in range(len(mine))])
        cold, hot = (policy.measure(one) for one in made)
        if mixed is None or cold is None or hot is None:
            return None, None
        return mixed, [(cold, hot)[i % 2][i] for i in range(len(mine))]


def spoil(policy: Any, probe: Any) -> dict[str, str | None]:
    """What is said of a policy as it is, and with something in it that is no number, on the last rank or on all."""
    said = {"sound": finite.what_is_not(policy, probe)}
    parameters, last = dict(policy.named_parameters()), policy.world.rank == policy.world.size - 1
    norm = parameters["decoder.layers.0.mlp.linear_fc1.layer_norm_weight"]
    (distributed,) = policy.trained["policy"].optimizer.chained_optimizers
    # Each rank of the distributed optimizer has a part of the parameters.
    held = next(iter(distributed.model_param_group_index_map))
    moment = distributed._get_main_param_and_optimizer_states(held)["exp_avg_sq"]
    for name, tensor, value in (("weight", norm.data, np.nan), ("moment", moment, np.inf)):
        before = tensor.clone()
        if last:
            tensor.view(-1)[0] = value
        said[name] = finite.what_is_not(policy, probe)
        tensor.copy_(before)
    norm.data.mul_(1e30)
    said["too large"] = finite.what_is_not(policy, probe)
    return said


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> list[Guarded]:
    """Findings of all ranks under all layouts."""
    folder = tmp_path_factory.mktemp("guards")
    parity.write_model(folder, "qwen2-tied")
    return [found for rank in parity.run_world("test_policy_guards", "guard", 4, folder) for found in rank]


def test_passes_before_a_step_add_up(guarded: list[Guarded]):
    """Their gradients are summed over ranks once, and what was discarded is in none of them."""
    for rank in guarded:
        assert rank.split == pytest.approx(rank.whole, rel=1e-5)
        for one, other in zip(rank.split_weights, rank.whole_weights, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_what_a_sequence_lacks_is_named_on_all_ranks(guarded: list[Guarded]):
    for rank in guarded:
        for name in ("advantages", "old_log_probs"):
            assert rank.lacking[name] == f"a sequence of kind 'answer' has no {name}, which an objective needs"
        assert "has no log_probs_under['reference']" in rank.lacking["log_probs_under"]
        assert "has no rollout_log_probs" in rank.lacking["policy rollout"]
        assert (
            rank.lacking["adapter"]
            == "an objective trains 'adapter', which must be a parameter set that trains: policy"
        )
        assert rank.lacking["memory"].endswith("the policy's memory to the engine before its gradients are applied")
        assert rank.lacking["gradient"] == "a step needs a gradient: call accumulate first"


def test_temperatures_share_a_micro_batch(guarded: list[Guarded]):
    found = [rank for rank in guarded if rank.mixed is not None]
    assert found
    for rank in found:
        assert rank.mixed is not None and rank.apart is not None
        for one, other in zip(rank.mixed, rank.apart, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_reference_log_probs_are_those_before_training(guarded: list[Guarded]):
    """Bitwise; and the policy's own weights come back bitwise, after an error too."""
    compared = 0
    for found in guarded:
        assert found.kept_while_reference and found.kept_after_error
        if found.start is None:
            continue
        assert found.reference is not None and found.trained is not None and found.trained_again is not None
        compared += len(found.start)
        assert same(found.reference, found.start)
        assert same(found.trained_again, found.trained)
        assert all(np.abs(new - old).max() > 1e-3 for new, old in zip(found.trained, found.start, strict=True))
    # Every tensor-parallel rank of the last stage has its replica's share: 13 sequences twice under each layout.
    assert compared == 4 * 13


def test_updates_that_are_not_finite_change_nothing(guarded: list[Guarded]):
    """They are skipped on all ranks and counted; the next update is the one it would have been without them."""
    assert len(guarded) == 4 * len(LAYOUTS)
    for found in guarded:
        assert found.poisoned == {name: (True, number, True) for number, name in enumerate(POISONS, start=1)}
        assert same(found.after, found.after_without_poison)
        assert found.in_a_row_at_end == 0


def test_a_policy_that_is_not_finite_is_known_on_all_ranks(guarded: list[Guarded]):
    for found in guarded:
        assert found.not_finite["sound"] is None
        norm = "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
        assert found.not_finite["weight"] == f"the weights {norm} are not finite"
        assert re.fullmatch(r"the optimizer's exp_avg_sq of \S+ are not finite", found.not_finite["moment"] or "")
        said = found.not_finite["too large"] or ""
        assert said.startswith("the log-probs are not finite, though the weights are; the largest is 1")
        assert said.endswith(f"e+30, in {norm}")
    # Alike on the ranks of a layout.
    assert len({json.dumps(found.not_finite) for found in guarded}) == len(LAYOUTS)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of which update 2 is skipped, and 4 and 5, which are one too many; and what it printed."""
    folder = tmp_path_factory.mktemp("stopped")
    arithmetic_run.write_inputs(folder)
    arithmetic_run.write_run(
        folder,
        algorithm={"name": "poisoned:Poisoned", "updates": [2, 4, 5]},
        parallel={"processes": 2},
        batch={"prompts": 6, "tokens_per_microbatch": 4096},
        rollout={"max_tokens": 64},
        optimizer={"lr": 1e-3, "max_skipped": 2},
        checkpoint={"every": 1, "keep": 2},
        resume="auto",
    )
    process = arithmetic_run.start(folder, "train", "run.yaml")
    output = " ".join(process.communicate(timeout=600)[0].split())
    assert process.returncode == 2, output
    return folder, output


def test_run_stops_after_too_many_skipped_updates_in_a_row(stopped: tuple[Path, str]):
    """It ends at step 5. After a skipped update nothing is saved, until one is made again."""
    folder, output = stopped
    assert "megarl: 2 updates in a row had a NaN or infinite loss or gradient" in output
    assert "step 5 is recorded; the last checkpoint is runs/run/checkpoints/step_000003. Fix:" in output
    assert "Traceback" not in output
    assert "step 2 is not saved, as its last update was skipped" in output
    run = folder / "runs" / "run"
    metrics = [strict_json(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert [line["skipped_updates"] for line in metrics] == [0, 1, 1, 2]
    assert [line["loss"] is None for line in metrics] == [False, True, False, True]
    assert checkpoints(run) == ["step_000001", "step_000003"]


def checkpoints(run: Path) -> list[str]:
    folder = run / "checkpoints"
    found = sorted(one.name for one in folder.iterdir() if one.is_dir())
    assert (folder / "latest").read_text() == found[-1]
    return found


def _save_what_is_no_number(*arguments: str) -> None:
    """A run that does not look at its weights, of which one is NaN after the third update."""

    def spoil_later(policy: Any, probe: Any) -> None:
        if policy.trained["policy"].scheduler.num_steps == 3:
            dict(policy.named_parameters())["embedding.word_embeddings.weight"].data[0, 0] = np.nan

    finite.what_is_not = spoil_later
    sys.argv = ["megarl", *arguments]
    main()


def test_a_run_that_diverges_keeps_its_good_checkpoints(stopped: tuple[Path, str]):
    folder, _ = stopped
    run = folder / "runs" / "diverged"
    shutil.copytree(folder / "runs" / "run", run)
    good, wild = ("name=diverged", "algorithm.updates=[]"), ("optimizer.lr=1e30", "optimizer.clip_grad=0")
    process = arithmetic_run.start(folder, "train", "run.yaml", *good, *wild)
    output = " ".join(process.communicate()[0].split())
    assert process.returncode == 2, output
    assert "megarl: diverged diverged: after step 4 the log-probs are not finite" in output
    assert "the last checkpoint is runs/diverged/checkpoints/step_000003. Fix: lower optimizer.lr" in output
    assert output.count("Nothing was saved or removed since") == 1 and "Traceback" not in output
    assert checkpoints(run) == ["step_000001", "step_000003"]

    # As a version that did not look left it.
    careless = preloaded.Started(_save_what_is_no_number, "train", "run.yaml", *good, "steps=4", folder=folder)
    arithmetic_run.finish(careless)
    assert checkpoints(run) == ["step_000003", "step_000004"]
    said = " ".join(arithmetic_run.finish(arithmetic_run.start(folder, "doctor", "runs/diverged")).split())
    assert "damaged: it was saved by a run that had diverged: embedding.word_embeddings.weight is not finite" in said
    assert "resume=auto or must continues from runs/diverged/checkpoints/step_000003" in said
    output = " ".join(
        arithmetic_run.finish(arithmetic_run.start(folder, "train", "run.yaml", *good, "steps=5")).split()
    )
    words = "step_000004 was saved by a run that had diverged: the weights embedding.word_embeddings.weight are not"
    assert words in output and "continuing after step 3" in output
    said = arithmetic_run.finish(arithmetic_run.start(folder, "doctor", "runs/diverged"))
    assert "damaged" not in said and said.count("whole") == 2


def strict_json(line: str) -> Any:
    """The record, which must be JSON as others read it: without NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)
