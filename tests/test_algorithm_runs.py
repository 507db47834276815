"""The algorithms in the loop: real rollouts, real training sequences, real evaluations, on a warmed-up tiny policy.

Most proofs look at a session from inside: a scenario builds one in a world of processes, and returns what it saw.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import arithmetic_run
import numpy as np
import parity
import preloaded
import pytest

HINT = "{prompt} is {answer}:"
EXPLANATION = {"template": HINT, "answer_text": "\\boxed{{answer}}", "max_prompt_tokens": 48, "measure_every": 1}
THINKING = {"reward": {"kind": "boxed", "graded": "response"}}
#: An environment that asks in a prompt of its own, and answers two of three turns with [50, 51, 52]; replies are waited
#: for, so that a run repeats.
ASKING = {"kind": "environment_cases:Tokens", "max_turn_tokens": 8, "workers": 8, "in_order": True, "time_limit": 60.0}
#: One that tells the reward's verdict.
RETRY = {"kind": "retry", "arguments": {"message": "No.", "cost": 0.25}, "max_turn_tokens": 16, "in_order": True}
#: Policy and engine differ by rounding alone in what the policy's current weights wrote.
EXACT = {"gap_limit": 1e-4}
#: How well the warmed-up policy answers differs from machine to machine; where an update must follow, this one does.
CHANCE = {"reward": {"kind": "arithmetic_run:even_length", "graded": "response", "time_limit": 60.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and a policy that writes `<think>...</think>` and an answer, mostly wrong ones."""
    made = tmp_path_factory.mktemp("algorithms")
    arithmetic_run.write_inputs(made)
    path = arithmetic_run.write_run(
        made,
        name="warm",
        steps=120,
        algorithm={"name": "sft"},
        rollout={"max_tokens": 48},
        reward={"kind": "boxed"},
        batch={"prompts": 32, "tokens_per_microbatch": 4096},
        optimizer={"lr": 4e-3, "warmup_steps": 5},
    )
    arithmetic_run.finish(arithmetic_run.start(made, "train", str(path)))
    return made


def test_a_supervised_step_has_no_gap_between_policy_and_engine(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "runs/warm/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 120 and all(line["loss"] > 0 for line in lines)
    assert {line[f"logprob_{name}"] for line in lines for name in ("gap_mean", "gap_max", "k3")} == {None}


def run_table(folder: Path, **changes: Any) -> dict[str, Any]:
    """The table of a run from the warmed-up policy, with absolute paths."""
    table: dict[str, Any] = {
        "name": "run",
        "runs_dir": str(folder / "runs"),
        "steps": 2,
        "seed": 5,
        "precision": "fp32",
        "model": {"path": str(folder / "model"), "weights": str(folder / "runs" / "warm" / "checkpoints")},
        "algorithm": {"name": "grpo"},
        "data": {
            "path": str(folder / "data" / "train.jsonl"),
            "answer_column": "answer",
            "solution_column": "solution",
            "max_prompt_tokens": 32,
        },
        # Runs are made again and again here: each makes its own completions.
        "rollout": {"group_size": 4, "max_tokens": 48, "kv_cache_gib": 0.02, "keep_unfinished": False},
        "reward": {"kind": "boxed"},
        "batch": {"prompts": 6, "tokens_per_microbatch": 512},
        "optimizer": {"lr": 1e-3},
        "evaluation": {"path": str(folder / "data" / "heldout.jsonl")},
        "logging": {"tensorboard": False},
    }
    for key, value in changes.items():
        table[key] = table.get(key, {}) | value if isinstance(value, dict) and key != "algorithm" else value
    return table


#: Sessions of this process: an engine that is collected takes the world's process groups with it.
_SESSIONS: list[Any] = []


def session(world: Any, table: dict[str, Any]) -> Any:
    """A session of this rank, in the place of the last one's grid."""
    from megarl.config.schema import RunConfig
    from megarl.health.stopping import Stopping
    from megarl.parallel.groups import dissolve_grid, form_grid
    from megarl.train.session import build
    from megarl.train.stops import Stops

    if _SESSIONS:
        dissolve_grid()
    config = RunConfig.model_validate(table)
    grid = form_grid(config.parallel, config.seed)
    _SESSIONS.append(build(config, world, grid, Stops(Stopping(config.health))))
    return _SESSIONS[-1]


def several(world: Any, calls: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Scenario: other scenarios of this file, one after the other: name -> (function's name, its arguments)."""
    return {name: globals()[function](world, *arguments) for name, (function, *arguments) in calls.items()}


def in_world(processes: int, calls: dict[str, tuple[Any, ...]]) -> dict[str, list[Any]]:
    """Results of `several`, by name and rank."""
    ranks = parity.run_world("test_algorithm_runs", "several", processes, calls)
    return {name: [rank[name] for rank in ranks] for name in calls}


def learn(made: Any, batches: list[Any], totals: list[Any]) -> list[Any]:
    """The updates of a step, as the loop makes them; what each pass has found."""
    from megarl.algorithms.objective import first_pass_is_old
    from megarl.train import trust

    found, objectives = [], made.algorithm.objectives_of(made.progress.step + 1)
    current = first_pass_is_old(objectives, len(batches))
    for batch, total in zip(batches, totals, strict=True):
        passes, _ = parity.rounds_of(made.policy, objectives, batch, total, current=current)
        found.append(passes["policy"])
        if current:
            trust.check_pass(made, made.progress.step + 1, passes)
        current = False
    return found


# --- what is trained -------------------------------------------------------------------------------------------------


def trained(world: Any, table: dict[str, Any], steps: int) -> dict[str, Any]:
    """Scenario: the training sequences of each step, with what the step counted and measured; the policy is updated."""
    from megarl.train import gauges, trust
    from megarl.train.rollouts import roll_out
    from megarl.train.selection import trainable
    from megarl.train.values import add_log_probs

    made = session(world, table)
    found: dict[str, Any] = {"steps": [], "asked": []}
    generate = made.inference.engine.generate

    def watched(requests: Any, *arguments: Any) -> Any:
        found["asked"].append([request.prompt_token_ids for request in requests])
        return generate(requests, *arguments)

    made.inference.engine.generate = watched
    for step in range(1, steps + 1):
        plan = made.algorithm.plan(step)
        rollouts = roll_out(made, plan, step)
        measured = gauges.measure(made, plan, rollouts)
        batches, totals, counters, *_ = trainable(made, rollouts, step)
        add_log_probs(made, batches)
        trust.check_before(made, step, batches)
        results = learn(made, batches, totals)
        written = rollouts.made.written
        found["steps"].append(
            {
                "sequences": [s for batch in batches for s in batch],
                "prompts": [group.prompt.token_ids for group in rollouts.made.groups],
                "totals": totals,
                "counters": {**rollouts.made.counters, **rollouts.kept.counters, **counters},
                "generated": dict(rollouts.made.generated_tokens),
                "engine_tokens": rollouts.made.engine_tokens,
                "explanations": [body for head, body in written if head.key.kind == "explanation"],
                "means": [r.means for r in results],
                "measured": measured,
            }
        )
    found["thinking_end"] = made.thinking_end.token_id
    found["hint_ids"] = made.tokenizer.encode(" is ")
    found["answers"] = {p.text: p.answer for p in made.data.training.prompts}
    everything = (s for seen in found["steps"] for s in seen["sequences"])
    found["decode"] = {s.tokens.tobytes(): made.tokenizer.decode(s.tokens.tolist()) for s in everything}
    return found


@pytest.fixture(scope="module")
def on_two(folder: Path) -> dict[str, list[Any]]:
    """What was seen on two data-parallel ranks, each with an engine of its own."""
    algorithm = {"name": "exp_grpo", "explanation_weight": 0.5, "explanation": EXPLANATION | {"per_prompt": 2}}
    explained = run_table(folder, algorithm=algorithm, parallel={"processes": 2})
    explanation = EXPLANATION | {"refresh_every": 2, "measure_every": 0}
    algorithm = {"name": "exp_grpo", "explanation": explanation}
    kept = run_table(folder, algorithm=algorithm, data={"max_rows": 6}, parallel={"processes": 2})
    twice = run_table(folder, algorithm=algorithm, data={"max_rows": 4}, parallel={"processes": 2})
    asked = run_table(
        folder,
        algorithm={"name": "exp_grpo", "explanation": EXPLANATION},
        parallel={"processes": 2},
        rollout={"environment": ASKING},
        data={"max_prompt_tokens": 40},
        # Room for all that the environment gives.
        reward={"high": 10.0},
    )
    calls = {"explained": ("trained", explained, 2), "kept": ("trained", kept, 3), "twice": ("trained", twice, 2)}
    return in_world(2, calls | {"asked": ("trained", asked, 2)})


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[Any]]:
    """What was seen in one process."""
    fast = {"optimizer": {"lr": 3e-3}}
    calls: dict[str, tuple[Any, ...]] = {}
    for mode in ("offline", "iterative"):
        algorithm = {"name": "exp_dpo", "mode": mode, "explanation": EXPLANATION | {"measure_every": 0}}
        table = run_table(folder, algorithm=algorithm, data={"max_rows": 6}, rollout={"group_size": 1}, **fast)
        calls[mode] = ("trained", table, 2)
    for updates in (1, 2):
        batch = {"updates": updates}
        mixed = run_table(folder, algorithm={"name": "two_writers:TwoWriters"}, batch=batch, health=EXACT, **fast)
        calls[f"{updates} updates"] = ("trained", mixed, 2)
    for responses in (1, 3):
        algorithm = {"name": "start", "responder": "initial", "responses": responses}
        calls[f"{responses} responses"] = ("responded", run_table(folder, algorithm=algorithm, **CHANCE, **fast))
    calls["staged"] = ("trained", run_table(folder, algorithm={"name": "start", "thinking_steps": 1}, **THINKING), 2)
    consumer = str(folder / "runs" / "warm" / "checkpoints")
    evaluation = {"end": True, "consumer": consumer, "samples": 4, "temperature": 1.0}
    calls["crossed"] = ("crossed", run_table(folder, **CHANCE, evaluation=evaluation, **fast))
    return in_world(1, calls | {"too long": ("too_long",)})


def test_hint_is_in_no_training_sequence(on_two: dict[str, list[Any]]) -> None:
    explained = on_two["explained"]
    targets = 0
    for step in range(2):
        for rank in explained:
            seen = rank["steps"][step]
            hint = rank["hint_ids"]
            for s in seen["sequences"]:
                context = s.tokens[: s.positions[0]].tolist()
                assert tuple(context) == seen["prompts"][s.group]
                everything = s.tokens.tolist()
                assert not contains(everything, hint)
                targets += s.kind == "explanation"
    assert targets >= 12
    # What was asked for did hold the hint: 6 prompts x 2 explanations beside 6 x 4 answers, in one call.
    for asked in explained[0]["asked"]:
        hinted = [prompt for prompt in asked if contains(list(prompt), explained[0]["hint_ids"])]
        assert (len(hinted), len(asked)) == (12, 36)


def contains(tokens: list[int], part: list[int]) -> bool:
    return any(tokens[i : i + len(part)] == part for i in range(len(tokens)))


def test_explanations_are_targets_beside_the_groups(on_two: dict[str, list[Any]]) -> None:
    explained = on_two["explained"]
    for step in range(2):
        parts = [rank["steps"][step] for rank in explained]
        sequences = [s for part in parts for s in part["sequences"]]
        answers = [s for s in sequences if s.kind == "answer"]
        targets = [s for s in sequences if s.kind == "explanation"]
        (totals,) = parts[0]["totals"]
        assert totals == parts[1]["totals"][0]
        own, learned = totals.of_kind("answer"), totals.of_kind("explanation")
        assert (own.sequences, learned.sequences) == (len(answers), len(targets)) == (24, len(targets))
        assert own.tokens == sum(s.trained for s in answers) == own.response_tokens
        assert learned.tokens == sum(s.trained for s in targets)
        assert parts[0]["counters"]["explanations"] == len(targets)
        # All that the engines made is counted, and who made it does not matter.
        made = sum(len(s.token_ids) for part in parts for s in part["explanations"])
        assert parts[0]["generated"]["explanation"] == parts[1]["generated"]["explanation"] == made
        means = parts[0]["means"][0]
        assert means["explanation_nll"] > 0 and means["own_nll"] > 0
        measured = parts[0]["measured"]
        assert measured == parts[1]["measured"]
        kinds = ("own", "explanation", "expert")
        assert set(measured) == {f"{k}_{m}" for k in kinds for m in ("chain_nll", "answer_log_prob")}
        assert all(measured[f"{k}_chain_nll"] > 0 > measured[f"{k}_answer_log_prob"] for k in kinds)


def test_explanation_ends_in_the_reference(on_two: dict[str, list[Any]]) -> None:
    rank = on_two["explained"][0]
    for seen in rank["steps"]:
        for s in seen["sequences"]:
            if s.kind == "explanation":
                text = rank["decode"][s.tokens.tobytes()]
                assert text.endswith(f"\\boxed{{{rank['answers'][text.partition('=')[0] + '=']}}}")


def test_kept_explanations_serve_again(on_two: dict[str, list[Any]]) -> None:
    ranks = on_two["kept"]
    steps = [[rank["steps"][i] for rank in ranks] for i in range(3)]
    learned = [[s for part in step for s in part["sequences"] if s.kind == "explanation"] for step in steps]
    texts = [{tuple(s.tokens.tolist()) for s in of_step} for of_step in learned]
    # Prompts that got none in the first step ask again in the second.
    assert len(texts[0]) >= 3 and texts[0] <= texts[1]
    assert steps[1][0]["counters"]["explanations_reused"] == len(texts[0])
    hinted = [sum(contains(list(p), ranks[0]["hint_ids"]) for p in asked) for asked in ranks[0]["asked"]]
    assert hinted == [6, 6 - len(texts[0]), len(texts[0])]
    assert not texts[0] & texts[2] or texts[2] != texts[1]


def test_prompt_drawn_twice_keeps_one_explanation(on_two: dict[str, list[Any]]) -> None:
    ranks = on_two["twice"]
    first, second = ([rank["steps"][i] for rank in ranks] for i in (0, 1))
    assert len(set(first[0]["prompts"])) == 4 < len(first[0]["prompts"]) == 6
    answers = [tuple(s.tokens.tolist()) for part in first for s in part["sequences"] if s.kind == "answer"]
    assert len(answers) == 24 and len(set(answers)) > 16
    targets = [s for part in second for s in part["sequences"] if s.kind == "explanation"]
    # One target for each group, also where both groups of a prompt take the same one.
    assert len({s.group for s in targets}) == len(targets) >= 3
    assert second[0]["counters"]["explanations_reused"] >= 2


def test_offline_pairs_are_those_of_the_first_policy(alone: dict[str, list[Any]]) -> None:
    found = {}
    for mode in ("offline", "iterative"):
        steps = alone[mode][0]["steps"]
        found[mode] = [{(tuple(s.tokens.tolist()), s.kind) for s in seen["sequences"]} for seen in steps]
        for seen in steps:
            groups = [s.group for s in seen["sequences"] if s.kind == "explanation"]
            assert sorted(groups) == sorted(s.group for s in seen["sequences"] if s.kind == "answer") and groups
    assert found["offline"][0] == found["offline"][1]
    assert found["iterative"][0] != found["iterative"][1]


def test_old_log_probs_and_the_gap_are_a_matter_of_who_wrote_a_sequence(alone: dict[str, list[Any]]) -> None:
    """The policy's answers are from the weights before the update, the others' are off-policy; nothing is stopped."""
    for updates in (1, 2):
        first, second = alone[f"{updates} updates"][0]["steps"]
        for seen in (first, second):
            assert {(s.kind, s.old_wrote) for s in seen["sequences"]} == {("answer", True), ("other", False)}
            # Of both kinds old is the policy before its update, so that the first ratios are 1.
            assert seen["means"][0]["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
            assert 0 < seen["means"][0]["logprob_gap_mean"] < 1e-5
        # By then the policy is not what the run started with.
        weights = second["means"][0]["importance_weight_mean"]
        assert abs(weights - 1) > 1e-3 > abs(first["means"][0]["importance_weight_mean"] - 1)
    gaps = {}
    for s in second["sequences"]:
        gaps.setdefault(s.kind, []).append(np.abs(s.old_log_probs - s.rollout_log_probs).mean())
    assert max(gaps["answer"]) < 1e-4 < 1e-2 < np.mean(gaps["other"])


def test_what_the_policy_did_not_write_is_not_compared(alone: dict[str, list[Any]]) -> None:
    for mode, compared in (("offline", False), ("iterative", True)):
        for seen in alone[mode][0]["steps"]:
            assert ("logprob_gap_mean" in seen["means"][0]) == compared


def test_an_environments_tokens_are_context_in_training(on_two: dict[str, list[Any]]) -> None:
    own = 4
    for step in range(2):
        parts = [rank["steps"][step] for rank in on_two["asked"]]
        answers = [s for part in parts for s in part["sequences"] if s.kind == "answer"]
        assert len(answers) == 24
        turns = []
        for s in answers:
            first, last = s.positions[0], s.positions[-1]
            assert tuple(s.tokens[:first]) == (*parts[0]["prompts"][s.group], own)
            gaps = np.split(s.positions, np.flatnonzero(np.diff(s.positions) > 1) + 1)
            between = np.setdiff1d(np.arange(first, last + 1), s.positions)
            assert s.tokens[between].tolist() == [50, 51, 52] * (len(gaps) - 1) and last == s.length - 1
            assert np.isfinite(s.rollout_log_probs).all() and max(len(gap) for gap in gaps) <= 8
            turns.append(len(gaps))
        assert set(turns) == {3}
        for part in parts:
            # What the engines counted is what is trained and what was explained: no token was made twice.
            made = sum(len(body.token_ids) for other in parts for body in other["explanations"])
            assert part["generated"] == {"answer": sum(s.trained for s in answers), "explanation": made}
            assert part["engine_tokens"] == sum(part["generated"].values())
            assert part["means"][0]["logprob_gap_mean"] < 1e-4
        rewards = {float(s.advantages[0]) for s in answers}
        assert len(rewards) > 6


# --- thinking --------------------------------------------------------------------------------------------------------


def responded(world: Any, table: dict[str, Any]) -> list[tuple[int, Any, Any, Any]]:
    """Scenario: samples of the second step; of each the thinking's length and its tokens' log-probs: the engine's, the
    policy's, and those of the policy that the run started with."""
    from megarl.config.parameter_sets import REFERENCE
    from megarl.records import Sequence, from_place
    from megarl.train.rollouts import roll_out
    from megarl.train.selection import trainable

    made = session(world, table)
    for step in (1, 2):
        rollouts = roll_out(made, made.algorithm.plan(step), step)
        if step == 1:
            batches, totals, *_ = trainable(made, rollouts, step)
            learn(made, batches, totals)
            made.progress.step = step
    found = []
    seen = [
        (group.prompt.token_ids, head, rollouts.made.bodies[head.key])
        for group in rollouts.made.groups
        for head in group.answers
        if "thinking" in head.marks
    ]
    sequences = [
        Sequence(np.array([*prompt, *ids], np.int32), from_place(len(prompt), len(prompt) + len(ids)))
        for prompt, ids in ((prompt, body.token_ids) for prompt, _, body in seen)
    ]
    own, initial = made.policy.measure(sequences), made.policy.measure(sequences, REFERENCE)
    for i, (_, head, body) in enumerate(seen):
        assert [one.source for one in head.stretches] == ["policy", "other"]
        assert head.stretches[0][:2] == (0, head.marks["thinking"]) and head.stretches[0].version == 1
        found.append((head.marks["thinking"], np.array(body.log_probs), own[i], initial[i], head.reward))
    return found


@pytest.mark.parametrize("responses", [1, 3])
def test_frozen_responder_answers_the_policys_thinking(alone: dict[str, list[Any]], responses: int) -> None:
    (samples,) = alone[f"{responses} responses"]
    assert len(samples) >= 8
    for thinking, engine, own, initial, reward in samples:
        np.testing.assert_allclose(engine[:thinking], own[:thinking], atol=1e-4)
        np.testing.assert_allclose(engine[thinking:], initial[thinking:], atol=1e-4)
        assert reward * responses == pytest.approx(round(reward * responses))
    # The update told the two apart.
    assert max(np.abs(engine[:z] - initial[:z]).max() for z, engine, _, initial, _ in samples) > 1e-2
    assert max(np.abs(engine[z:] - own[z:]).max() for z, engine, own, _, _ in samples) > 1e-2


def test_first_stage_trains_no_token_of_a_response(alone: dict[str, list[Any]]) -> None:
    (rank,) = alone["staged"]
    first, second = rank["steps"]
    assert len(first["sequences"]) >= 8 and len(second["sequences"]) >= 8
    for s in first["sequences"]:
        assert s.tokens[-1] == rank["thinking_end"]
        assert s.positions[0] == len(first["prompts"][s.group])
    for s in second["sequences"]:
        assert s.tokens[s.positions[0] - 1] == rank["thinking_end"]
        assert rank["thinking_end"] not in s.tokens[s.positions]
    trained_tokens = sum(s.trained for s in first["sequences"])
    assert first["totals"][0].tokens == trained_tokens < first["totals"][0].response_tokens


def crossed(world: Any, table: dict[str, Any]) -> list[dict[str, Any]]:
    """Scenario: the evaluation before and after an update."""
    from megarl.train.evaluation import evaluate
    from megarl.train.rollouts import roll_out
    from megarl.train.selection import trainable

    made = session(world, table)
    with made.inference.awake():
        before = evaluate(made, "before")
    batches, totals, *_ = trainable(made, roll_out(made, made.algorithm.plan(1), 1), 1)
    learn(made, batches, totals)
    with made.inference.awake():
        after = evaluate(made, "after")
    return [before, after]


def too_long(world: Any) -> str:
    """Scenario: what ends a step whose text to learn is longer than any response; in the last scenario's session."""
    from megarl.algorithms.plan import Generation, Learned, Plan, Text
    from megarl.errors import TrainingStopped
    from megarl.train.rollouts import roll_out

    made = _SESSIONS[-1]
    text = Learned(Text((5,) * (made.config.rollout.max_tokens + 1)))
    long = Generation(1, "hint", graded=False, learn=lambda prompt, sample: text)
    with pytest.raises(TrainingStopped) as raised:
        roll_out(made, Plan((long,)), 2)
    return str(raised.value)


def test_a_text_that_is_longer_than_any_response_is_refused(alone: dict[str, list[Any]]) -> None:
    said = (
        "a text of 49 tokens of the kind 'hint' of algorithm.name=grpo: must not be longer than rollout.max_tokens=48"
    )
    assert alone["too long"][0].startswith(said)


def test_cross_generation_with_the_policy_itself_is_self_generation(folder: Path, alone: dict[str, list[Any]]) -> None:
    (found,) = alone["crossed"]
    own = {"accuracy", "reward_mean", "truncated_share", "length_mean", "unscored"}
    pairs = [("accuracy" if n == "accuracy" else f"evaluation_{n}", f"cross_{n}") for n in own]
    before, after = found
    assert [before[a] for a, _ in pairs] == [before[b] for _, b in pairs]
    assert before["evaluation_length_mean"] > 5
    # Another policy answers otherwise.
    assert [after[a] for a, _ in pairs] != [after[b] for _, b in pairs]
    kept = (folder / "runs/run/evaluations/before.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in kept]
    count = before["evaluation_problems"] * 4
    assert [row.pop("by") for row in rows] == ["policy"] * count + ["consumer"] * count
    assert rows[:count] == rows[count:]


# --- whole runs ------------------------------------------------------------------------------------------------------


def run_all(tables: list[dict[str, Any]], file: Path) -> None:
    """Train each table, or evaluate its `checkpoint`, with two processes; what they gave, or the refusal, by name."""
    from megarl.config.schema import RunConfig
    from megarl.errors import Refusal
    from megarl.parallel.launch import launch
    from megarl.train.run import evaluate, train

    given: dict[str, Any] = {}
    for table in tables:
        checkpoint = table.pop("evaluate", None)
        config = RunConfig.model_validate(table)
        work = (train, (config,)) if checkpoint is None else (evaluate, (config, checkpoint))
        try:
            given[table["name"]] = launch(*work, 2)
        except Refusal as refusal:
            given[table["name"]] = str(refusal)
    file.write_text(json.dumps(given))


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Any]:
    """The lines of metrics.jsonl of many runs, without what time and memory happened to be; results of evaluations."""
    shared = {"kl_coefficient": 0.001, "aggregation": "sequence_mean"}
    tables = [
        run_table(folder, name="plain", algorithm={"name": "grpo"} | shared),
        run_table(folder, name="weightless", algorithm={"name": "exp_grpo", "explanation_weight": 0.0} | shared),
    ]
    for name, algorithm in (
        ("kept", {"name": "exp_grpo", "explanation": EXPLANATION | {"refresh_every": 3}}),
        ("staged", {"name": "start", "thinking_steps": 2, "responder": "initial"}),
    ):
        # A reward that tells most answers apart, so that every step has a gradient.
        reward = {"kind": "arithmetic_run:digit_share", "graded": "response", "time_limit": 60.0}
        changes = {"algorithm": algorithm, "data": {"max_rows": 8}, "reward": reward}
        tables += [
            run_table(folder, name=f"{name}_whole", steps=3, **changes),
            run_table(folder, name=f"{name}_parts", steps=2, **changes),
            run_table(folder, name=f"{name}_parts", steps=3, resume="must", **changes),
        ]
    changes = {"algorithm": {"name": "exp_grpo", "explanation": EXPLANATION}, "steps": 1}
    replay = str(folder / "runs" / "saved" / "rollouts")
    tables += [
        run_table(folder, name="saved", rollout={"save": True}, **changes),
        run_table(folder, name="again", rollout={"replay": replay}, **changes),
        run_table(folder, name="answers", steps=1, rollout={"save": True}),
        run_table(folder, name="refused", rollout={"replay": replay.replace("saved", "answers")}, **changes),
    ]
    # Turns go back to an engine of two ranks, whose first rank alone has environments.
    layout: dict[str, Any] = {
        "parallel": {"processes": 2, "tensor": 2},
        "reward": CHANCE["reward"] | {"graded": "whole"},
    }
    rollout = {"tensor": 2, "environment": RETRY, "save": True}
    replay = str(folder / "runs" / "turns_whole" / "rollouts")
    tables += [
        run_table(folder, name="turns_whole", rollout=rollout, evaluation={"end": True}, **layout),
        run_table(folder, name="turns_parts", steps=1, rollout=rollout, **layout),
        run_table(folder, name="turns_parts", resume="must", rollout=rollout, **layout),
        run_table(folder, name="turns_again", steps=1, rollout=rollout | {"save": False, "replay": replay}, **layout),
    ]
    for consumer in ("initial", str(folder / "runs" / "warm" / "checkpoints")):
        evaluation = {"consumer": consumer, "samples": 2, "temperature": 1.0}
        table = run_table(folder, name=f"crossed-{consumer == 'initial'}", **THINKING, evaluation=evaluation)
        tables.append(table | {"evaluate": str(folder / "runs" / "staged_whole")})
    given = folder / "given.json"
    laid_out = [{"parallel": {"processes": 2}} | table for table in tables]
    started = preloaded.Started(run_all, laid_out, given)
    said, _ = started.communicate()
    assert started.returncode == 0, said[-6000:]
    noise = {"seconds", "peak_memory_bytes", "memory_bytes", "time_shares", "algorithm"}
    found: dict[str, Any] = {"given": json.loads(given.read_text())}
    for name in {table["name"] for table in tables if "evaluate" not in table} - {"refused"}:
        text = (folder / "runs" / name / "metrics.jsonl").read_text()
        found[name] = [{k: v for k, v in json.loads(line).items() if k not in noise} for line in text.splitlines()]
    return found


def test_without_weight_on_explanations_a_run_is_grpos(runs: dict[str, Any]) -> None:
    plain, weightless = runs["plain"], runs["weightless"]
    assert len(plain) == 2 and max(line["grad_norm"] for line in plain) > 0
    assert plain == [{k: v for k, v in line.items() if k != "own_nll"} for line in weightless]


@pytest.mark.parametrize("name", ["kept", "staged"])
def test_continued_run_is_the_uninterrupted_one(runs: dict[str, Any], name: str) -> None:
    assert len(runs[f"{name}_whole"]) == 3 and runs[f"{name}_whole"][2]["grad_norm"] > 0
    assert runs[f"{name}_parts"] == runs[f"{name}_whole"]


def test_a_continued_run_of_several_turns_is_the_uninterrupted_one(folder: Path, runs: dict[str, Any]) -> None:
    *steps, evaluation = runs["turns_whole"]
    assert len(steps) == 2 and steps == runs["turns_parts"] and min(line["grad_norm"] for line in steps) > 0
    for line in steps:
        assert 1 < line["turns_mean"] < 2 and 0 < line["environment_token_share"] < 1
        assert line["engine_tokens"] == line["generated_tokens"]
        assert line["counters"]["retry_told"] + line["counters"]["retry_right"] >= 24
        assert line["logprob_gap_max"] < 1e-4
    assert evaluation["evaluation_counters"]["retry_told"] > 0
    (again,) = runs["turns_again"]
    names = ("loss", "grad_norm", "reward_mean", "turns_mean", "environment_token_share")
    assert [again[n] for n in names] == pytest.approx([steps[0][n] for n in names], rel=1e-5)


def test_samples_and_evaluations_show_the_turns(folder: Path, runs: dict[str, Any]) -> None:
    kept = folder / "runs/turns_whole"
    for file, rewards in (("samples.jsonl", {0.75, 1.0, 0.0}), ("evaluations/step_000002.jsonl", {0.75, 1.0, 0.0})):
        rows = [json.loads(line) for line in (kept / file).read_text().splitlines()]
        assert {row["reward"] for row in rows} <= rewards and len({row["reward"] for row in rows}) > 1
        for row in rows:
            first, *others = row["turns"]
            assert first["by"] == "policy" and "".join(turn["text"] for turn in row["turns"]) == row["response"]
            if others:
                told, last = others
                assert (told["by"], last["by"]) == ("environment", "policy") and "No." in told["text"]
                # Right at once costs nothing; later a quarter, which is not taken from the least reward.
                assert row["reward"] == (0.75 if len(last["text"]) % 2 == 0 else 0.0)
            else:
                assert row["reward"] == 1.0
    lines = (kept / "rollouts/step_000002.rank_0000.jsonl").read_text().splitlines()
    assert {stretch["version"] for line in lines for stretch in json.loads(line)["stretches"]} == {1}


def test_saved_explanations_are_replayed(runs: dict[str, Any]) -> None:
    (saved,), (again,) = runs["saved"], runs["again"]
    names = ("explanation_nll", "own_nll", "loss", "grad_norm", "reward_mean", "explanation_chain_nll")
    assert [again[n] for n in names] == pytest.approx([saved[n] for n in names], rel=1e-5) and saved[
        "explanation_nll"
    ] > 0


def test_replay_of_answers_alone_is_refused_where_explanations_are_needed(runs: dict[str, Any]) -> None:
    assert runs["given"]["refused"].startswith("6 of 30 samples of this step: must be there")


def test_initial_consumer_of_an_evaluated_checkpoint_is_the_configured_policy(runs: dict[str, Any]) -> None:
    own = ("name", "answers")
    initial, named = ({k: v for k, v in runs["given"][f"crossed-{b}"].items() if k not in own} for b in (True, False))
    assert initial == named and initial["evaluation_samples"] == 2
    assert initial["cross_length_mean"] != initial["evaluation_length_mean"]
