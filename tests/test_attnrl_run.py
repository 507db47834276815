"""Trees and one-step off-policy through the whole system: one call a step, prefixes that are not made again, old
log-probs of who wrote, checkpoints with half-grown trees, another layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import arithmetic_run
import parity
import pytest
from test_opd_run import session
from test_resume import lines
from test_runs import call, run

#: Responses have no line breaks: every token is a step.
ATTNRL = {"name": "attnrl", "gap": 2, "attention": {"distance": 1}, "kl_coefficient": 0.01, "drop_easy": False}
TREERL = ATTNRL | {"branching": "entropy", "expansion": "all", "adapt": 0.0}
TREERL = {key: value for key, value in TREERL.items() if key not in ("gap", "attention")}
ROLLOUT = {"group_size": 4, "max_tokens": 16, "kv_cache_gib": 0.02}
#: Name, processes, and what differs from the table of `tables`.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "attnrl": (4, {"parallel": {"tensor": 2}, "rollout": ROLLOUT | {"ahead": 1, "tensor": 2, "assignment": "drawn"}}),
    "split": (2, {"parallel": {"pipeline": 2}, "rollout": ROLLOUT | {"ahead": 1}}),
    "treerl": (2, {"algorithm": TREERL, "parallel": {"context": 2}, "rollout": ROLLOUT | {"save": True}}),
    # Its old log-probs come from the update's own pass, but for those of the step before.
    "moving": (
        2,
        {
            "rollout": ROLLOUT | {"ahead": 1},
            "batch": {"prompts": 6, "tokens_per_microbatch": 192},
            "optimizer": {"lr": 1e-2, "clip_grad": 0.0},
        },
    ),
    "grpo": (2, {"algorithm": {"name": "grpo"}, "rollout": ROLLOUT | {"ahead": 1}}),
}
STEPS = 4


def table(folder: Path, name: str) -> dict[str, Any]:
    processes, changes = CASES[name]
    parallel = {"processes": processes} | changes.get("parallel", {})
    return {
        "name": name,
        "runs_dir": str(folder / "runs"),
        "steps": STEPS,
        "seed": 3,
        "precision": "fp32",
        "model": {"path": str(folder / "model")},
        "algorithm": ATTNRL,
        "data": {"path": str(folder / "data/train.jsonl"), "answer_column": "answer", "max_prompt_tokens": 32},
        "reward": {"kind": "arithmetic_run:even_length", "time_limit": 60.0, "workers": 1},
        "batch": {"prompts": 6, "tokens_per_microbatch": 192, "updates": 2},
        "optimizer": {"lr": 0.0},
        "logging": {"tensorboard": False},
        **changes,
        "parallel": parallel,
    }


def stepped(world: Any, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Scenario: what each step made, learned from and logged on this rank."""
    from megarl.ops.masking import zero_masked
    from megarl.train.growing import rollouts_of
    from megarl.train.loop import run_step

    made = session(world, settings)
    made.recorder.open()
    engine, algorithm = made.inference.running_engine, made.algorithm
    seen: dict[str, Any] = {}
    (objective,) = algorithm.objectives
    generate = engine.generate

    def counted(*arguments: Any) -> Any:
        seen["calls"] += 1
        seen["own"] = list(arguments[0])
        return generate(*arguments)

    def loss(inputs: Any) -> Any:
        counted_T = inputs.mask_T > 0
        away_T = (inputs.log_probs_T - inputs.old_log_probs_T).detach()
        away_T = zero_masked(counted_T, away_T).abs()
        seen["away"] = max(seen["away"], float(away_T.max()))
        seen["equal"] += int((away_T[counted_T] == 0).sum())
        return objective.loss(inputs)

    engine.generate = counted
    algorithm.objectives = (replace(objective, loss=loss),)
    found = []
    import megarl.train.loop as loop

    def kept(*arguments: Any) -> Any:
        seen["rollouts"] = rollouts_of(*arguments)
        return seen["rollouts"]

    loop.rollouts_of = kept
    for step in range(1, STEPS + 1):
        seen |= {"calls": 0, "away": 0.0, "equal": 0}
        before = engine.tokens_generated
        line = run_step(made, step)
        rollouts = seen["rollouts"]
        found.append(
            {
                "line": line,
                "calls": seen["calls"],
                "away": seen["away"],
                "equal": seen["equal"],
                "tokens": engine.tokens_generated - before if engine.speaks else 0,
                "groups": rollouts.kept.groups,
                "bodies": dict(rollouts.bodies),
            }
        )
    loop.rollouts_of = rollouts_of
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("attnrl")
    arithmetic_run.write_inputs(made)
    return made


@pytest.fixture(scope="module")
def ranks(folder: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """By case and rank, what its steps found."""
    return {
        name: parity.run_world("test_attnrl_run", "stepped", processes, table(folder, name))
        for name, (processes, _) in CASES.items()
    }


#: Those whose learning rate is 0.
STILL = [name for name in CASES if name != "moving"]


@pytest.mark.parametrize("name", STILL)
def test_with_a_learning_rate_of_zero_all_ratios_are_one(ranks: dict[str, Any], name: str) -> None:
    """A9."""
    learned = [step for rank in ranks[name] for step in rank if step["line"]["tokens"]]
    assert learned and all(step["away"] < 1e-5 for step in learned)
    # The engine's log-probs are compared with those of the weights that wrote, also of the step before.
    assert all(step["line"]["logprob_gap_max"] < 1e-4 for step in learned)


def test_only_what_the_step_before_wrote_has_moved_away(ranks: dict[str, Any]) -> None:
    for rank in ranks["moving"]:
        first, second, *later = rank
        assert first["line"]["tokens"] == 0 and second["away"] < 1e-5
        for step in later:
            known = sum(min(h.old_known, h.length) for g in step["groups"] for h in g.heads if h.holder is not None)
            assert step["away"] > 1e-3 and known
            # Of its own continuations' tokens the update's pass is the old one, bit for bit.
            assert step["equal"] > 50
            assert step["line"]["ratio_mean"] != 1
    # Compared with the engine that wrote them, which had the weights of that time.
    assert all(step["line"]["logprob_gap_max"] < 1e-3 for step in ranks["moving"][0][1:])


def test_what_is_saved_of_a_step_has_first_samples_and_continuations(ranks: dict[str, Any], folder: Path) -> None:
    assert ranks["treerl"]
    for step in range(1, STEPS + 1):
        rows = [
            json.loads(line)
            for file in sorted((folder / "runs/treerl/rollouts").glob(f"step_{step:06d}.*"))
            for line in file.open()
        ]
        branches = [row["key"]["branch"] for row in rows]
        assert branches.count([]) == 6 * ROLLOUT["group_size"] and len(branches) > 2 * branches.count([])


@pytest.mark.parametrize("name", CASES)
def test_a_step_makes_its_calls_and_no_token_twice(ranks: dict[str, Any], name: str) -> None:
    grows, late = name != "grpo", name != "treerl"
    for number in range(STEPS):
        steps = [rank[number] for rank in ranks[name]]
        wanted = 1 if late else 2
        # The last step begins nothing that no step would learn from.
        if name == "grpo" and number == STEPS - 1:
            wanted = 0
        assert {step["calls"] for step in steps} == {wanted}
        line = steps[0]["line"]
        assert sum(step["tokens"] for step in steps) == line.get("generated_tokens", 0)
        if grows:
            assert line["counters"]["generation_calls"] == wanted
            kept = sum(head.fork for group in steps[0]["groups"] for head in group.heads)
            assert line["counters"].get("prefix_tokens_reused", 0) == kept and (kept > 0) == (number > 0 or not late)
        assert (line["tokens"] > 0) == (number > 0 or not late)


@pytest.mark.parametrize("name", [name for name in CASES if name != "grpo"])
def test_continuations_go_on_from_their_parents(ranks: dict[str, Any], name: str) -> None:
    late, seen = name != "treerl", 0
    for rank, found in enumerate(ranks[name]):
        for number, step in enumerate(found):
            for group in step["groups"]:
                by_key = {head.key: head for head in group.heads}
                for head in group.heads:
                    if head.parent is None or head.holder != rank:
                        continue
                    seen += 1
                    own, parent = step["bodies"][head.key], step["bodies"][head.parent]
                    assert by_key[head.parent].holder == rank
                    assert own.token_ids[: head.fork] == parent.token_ids[: head.fork] and head.fork < head.length
                    assert own.log_probs[: head.fork] == parent.log_probs[: head.fork]
                    assert len(own.log_probs) == len(own.token_ids) == head.length <= ROLLOUT["max_tokens"]
                    assert head.old_known == len(own.old_log_probs) == (head.fork if late else 0)
                    wrote = [(stretch.start, stretch.end, stretch.version) for stretch in head.stretches]
                    before = number - 1 if late else number
                    assert wrote == [(0, head.fork, before)] * (head.fork > 0) + [(head.fork, head.length, number)]
    assert seen > 50


@pytest.mark.parametrize("name", CASES)
def test_groups_are_whole_and_the_same_on_all_ranks(ranks: dict[str, Any], name: str) -> None:
    for number in range(STEPS):
        groups = [rank[number]["groups"] for rank in ranks[name]]
        assert all(one == groups[0] for one in groups)
        for group in groups[0]:
            assert sum(head.parent is None for head in group.heads) == ROLLOUT["group_size"]
    lines_of = [[step["line"]["loss"] for step in rank] for rank in ranks[name]]
    assert all(one == lines_of[0] for one in lines_of)


def test_trees_of_an_entropy_are_whole(ranks: dict[str, Any]) -> None:
    for step in ranks["treerl"][0]:
        for group in step["groups"]:
            # A response of one token has no place to branch.
            grew = sum(head.length > 1 for head in group.heads if head.parent is None)
            branches = sum(head.parent is not None for head in group.heads)
            assert branches <= grew * 4 and branches >= grew * 2
        assert step["line"]["counters"]["leaves"] > 0


RUN: dict[str, Any] = {
    "resume": "auto",
    "parallel": {"processes": 4, "tensor": 2},
    "algorithm": ATTNRL | {"drop_easy": True, "adapt": 0.5},
    "rollout": ROLLOUT | {"ahead": 1},
    "reward": {"kind": "arithmetic_run:even_length", "time_limit": 60.0, "workers": 1},
    "batch": {"prompts": 6, "tokens_per_microbatch": 192, "updates": 2},
    "checkpoint": {"every": 2},
    # While what was asked waits.
    "evaluation": {"path": "data/heldout.jsonl", "every": 1, "rows": 4},
}


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """A whole run, and one that was killed in its third step, while trees of its checkpoint grew, and went on."""
    arithmetic_run.write_run(folder, **RUN)
    run(folder, "train", "run.yaml", "name=whole", f"steps={STEPS}")
    process = arithmetic_run.start(folder, "train", "run.yaml", "name=broken", f"steps={STEPS}")
    unfinished = folder / "runs" / "broken" / "unfinished"
    # While continuations are made, before anything is trained on them: some are kept, and others are not.
    arithmetic_run.kill_when(
        process, lambda: any(b" after " in file.read_bytes() for file in unfinished.glob("step_000003.*"))
    )
    shutil.copytree(folder / "runs" / "broken", folder / "runs" / "pipelined")
    shutil.rmtree(folder / "runs" / "pipelined" / "unfinished")
    run(folder, "train", "run.yaml", "name=broken", f"steps={STEPS}")
    return folder


def steps_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in lines(folder / "runs" / name / "metrics.jsonl") if "loss" in line]


def test_a_killed_run_goes_on_with_its_half_grown_trees(runs: Path) -> None:
    whole, broken = steps_of(runs, "whole"), steps_of(runs, "broken")
    assert len(whole) == STEPS and whole == broken
    # The last step asks nothing.
    assert len({step["batch_prompts"] for step in whole[:-1]}) > 1 and "batch_prompts" not in whole[-1]
    saved = runs / "runs/broken/checkpoints/step_000002"
    assert (saved / "waiting.json").exists() and len(list(saved.glob("waiting.replica_*.npz"))) == 4
    # Nothing waits at the end.
    assert not (runs / f"runs/whole/checkpoints/step_00000{STEPS}/waiting.json").exists()
    notes = [
        json.loads((runs / f"runs/{name}/checkpoints/step_00000{STEPS}/progress.json").read_text())
        for name in ("whole", "broken")
    ]
    for key in ("weights", "moments", "states"):
        assert notes[0][key] == notes[1][key], key


def test_trees_are_among_the_samples_that_are_kept_for_people(runs: Path) -> None:
    """Those that a step learns from, which the step before has begun: each continuation below what it goes on from."""
    whole, broken = (lines(runs / "runs" / name / "samples.jsonl") for name in ("whole", "broken"))
    assert whole == broken and {row["step"] for row in whole} == set(range(2, STEPS + 1))
    by_place: dict[tuple[Any, ...], dict[str, Any]] = {
        (r["step"], r["prompt_index"], r.get("draw"), r["sample_index"], *r.get("branch", ())): r for r in whole
    }
    grown = {place: row for place, row in by_place.items() if row.get("branch")}
    assert len(grown) > 3
    for place, row in grown.items():
        parent = by_place[place[:-1]]
        assert 0 < row["fork"] < parent["length"] and row["prompt"] == parent["prompt"]
        assert sum(piece["tokens"] for piece in row["pieces"]) == row["length"]
    # Segments of one response have advantages of their own.
    assert any(len({piece.get("advantage") for piece in row["pieces"]}) > 2 for row in grown.values())


def test_a_run_goes_on_under_another_layout(runs: Path) -> None:
    run(runs, "train", "run.yaml", "name=pipelined", f"steps={STEPS}", "parallel={processes: 4, pipeline: 2}")
    expected, found = steps_of(runs, "whole"), steps_of(runs, "pipelined")
    for mine, other in zip(found[2:], expected[2:], strict=True):
        for name in ("loss", "grad_norm", "ratio_mean", "reference_kl"):
            assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), name
        assert mine["counters"] == other["counters"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("algorithm.points=3", "algorithm.points=3 with resume=auto: differs from 2, with which"),
        ("algorithm.attention.distance=2", "algorithm.attention.distance=2 with resume=auto: differs from 1, with"),
        ("rollout.ahead=0", "rollout.ahead=0 with resume=auto: differs from 1, with which"),
    ],
)
def test_half_grown_trees_do_not_grow_otherwise(runs: Path, override: str, said: str) -> None:
    code, _, errors = call(runs, "train", "run.yaml", "name=whole", "steps=6", override)
    assert code == 2 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(f"megarl: {said}")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("algorithm=nft",), "rollout.ahead=1: is not for algorithm.name=nft, which learns from what the step's own"),
        (("rollout.replay=x",), "rollout.replay=x: cannot be with rollout.ahead=1, which goes on with samples that it"),
        (("steps=1",), "steps=1: learns nothing with rollout.ahead=1, whose first step only asks."),
        (
            ("algorithm.attention.layers=[7]",),
            "algorithm.attention.layers=[7]: must be numbers of the model's 2 layers",
        ),
        (("rollout.group_size=1",), "rollout.group_size=1: gives no sample another to be compared with."),
        (("algorithm.prompts_least=7",), "batch.prompts=6: must be among the 7 to 12 prompts that a step may ask."),
        (("algorithm.branching=none", "algorithm.points=3"), "algorithm.points=3: has no effect with algorithm.bran"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder: Path, overrides: tuple[str, ...], said: str) -> None:
    arithmetic_run.write_run(folder, **RUN)
    code, _, errors = call(folder, "check", "run.yaml", "name=new", *overrides)
    assert code == 2 and errors.splitlines()[-1].startswith(f"megarl: {said}")
