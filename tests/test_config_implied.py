"""What settings imply: one derivation, compared with what an algorithm asks for and what a run builds."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from config_case import MODEL

from megarl import algorithms
from megarl.algorithms.base import AlgorithmContext
from megarl.algorithms.objective import sets_read
from megarl.config.algorithms import ALGORITHM_SETTINGS, AlgorithmSettings
from megarl.config.implied import Implied
from megarl.config.model_shape import model_shape_from_hf
from megarl.config.parameter_sets import CONSUMER, POLICY, REFERENCE, SHADOW, ParameterSet, ServedSet, united
from megarl.config.rules import broken_setting_rules
from megarl.config.schema import RunConfig
from megarl.config.sections import RunSettings
from megarl.errors import Refusal

MEASURED = ParameterSet(REFERENCE, measures=True)
WRITES = ParameterSet(REFERENCE, generates=True)

TAUGHT = ParameterSet("teacher", "there", "algorithm.teacher.checkpoint", measures=True)
#: A teacher behind a server.
SERVED = {"name": "opd", "teacher": {"server": {"url": "http://host:8000/v1", "model": "m", "patience": 70.0}}}


def run_of(algorithm: str | dict[str, Any] | AlgorithmSettings = "grpo", **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "name": "case",
        "steps": 6,
        "model": {"path": "unused"},
        "algorithm": algorithm,
        "data": {"path": "unused", "max_prompt_tokens": 50},
        "rollout": {"max_tokens": 100, "group_size": 4},
        "batch": {"prompts": 10, "updates": 2},
        "evaluation": {"every": 0, "start": False, "end": False},
    }
    for section, values in changes.items():
        settings[section] = {**settings.get(section, {}), **values} if isinstance(values, dict) else values
    return RunConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("config", "evaluates", "makes", "engine", "solutions"),
    [
        (run_of(), False, True, True, False),
        (run_of(rollout={"replay": "saved"}), False, False, False, False),
        (run_of(rollout={"replay": "saved"}, evaluation={"end": True}), True, False, True, False),
        (run_of("sft"), False, False, False, True),
        (run_of("sft", evaluation={"every": 3}), True, False, True, True),
        (run_of("sft", evaluation={"start": True}), True, False, True, True),
    ],
)
def test_what_is_built_and_read(config: RunConfig, evaluates: bool, makes: bool, engine: bool, solutions: bool) -> None:
    found = Implied(config)
    assert (found.evaluates, found.makes_rollouts) == (evaluates, makes)
    assert (found.has_engine, found.needs_solutions) == (engine, solutions)
    alone = Implied(config, evaluates_alone=True)
    assert (alone.evaluates, alone.has_engine, alone.needs_solutions) == (True, True, False)


def test_lengths() -> None:
    assert Implied(run_of()).longest_engine_sequence == 150
    assert Implied(run_of(evaluation={"max_tokens": 400})).longest_engine_sequence == 450
    # A hinted question may be 256 tokens longer, as the explanations' settings say; it is not trained on.
    explained = Implied(run_of("exp_grpo"))
    assert (explained.longest_prompt, explained.longest_engine_sequence) == (306, 406)
    assert explained.longest_trained_sequence == 150
    assert Implied(run_of({"name": "exp_grpo", "explanation_weight": 0.0})).longest_prompt == 50
    # A pair is in one micro-batch; context parallelism wants multiples of 2 x its ranks.
    assert Implied(run_of("exp_dpo", parallel={"context": 2})).smallest_microbatch == 2 * 152


@pytest.mark.parametrize(
    ("algorithm", "sequences"),
    [
        ("grpo", 20),
        ("sft", 5),
        ("exp_dpo", 10),
        ("exp_grpo", 25),
        ({"name": "exp_grpo", "explanation_weight": 0.0}, 20),
        # A first sample and four continuations of each, of twice as many prompts at most.
        ("attnrl", 2 * 5 * 20),
        ({"name": "attnrl", "adapt": 0, "branching": "none"}, 20),
    ],
)
def test_sequences_of_an_update(algorithm: str | dict[str, Any], sequences: int) -> None:
    """Of 5 prompts."""
    assert Implied(run_of(algorithm)).sequences_per_update == sequences


def test_updates() -> None:
    assert Implied(run_of()).updates == 12


SETS: list[tuple[str | dict[str, Any], dict[str, Any], tuple[ParameterSet, ...]]] = [
    ("grpo", {}, ()),
    ("sft", {}, ()),
    ("nft", {}, ()),
    ({"name": "grpo", "kl_coefficient": 0.1}, {}, (MEASURED,)),
    ("exp_grpo", {}, (MEASURED,)),
    ("exp_dpo", {}, (MEASURED,)),
    ({"name": "exp_dpo", "mode": "offline"}, {}, (ParameterSet(REFERENCE, generates=True, measures=True),)),
    ("start", {}, ()),
    ({"name": "start", "responses": 2}, {}, ()),
    ({"name": "start", "responder": "initial"}, {}, (WRITES,)),
    ({"name": "start", "responder": "initial", "thinking_steps": 0}, {}, ()),
    (
        {"name": "start", "responder": "initial", "kl_coefficient": 0.1},
        {},
        (ParameterSet(REFERENCE, generates=True, measures=True),),
    ),
    ({"name": "opd", "teacher": {"checkpoint": "there"}}, {}, (TAUGHT,)),
    (SERVED, {}, ()),
    ("bridge", {}, (ParameterSet(SHADOW, trains=True),)),
    ({"name": "bridge", "shadow": "none"}, {}, ()),
    ("attnrl", {}, (MEASURED,)),
    ({"name": "attnrl", "kl_coefficient": 0.0}, {}, ()),
    (
        {"name": "bridge", "shadow": "rebuilt", "kl_coefficient": 0.1},
        {},
        (MEASURED, ParameterSet(SHADOW, trains=True, rebuilt=True)),
    ),
    ("grpo", {"consumer": "initial"}, (WRITES,)),
    (
        {"name": "grpo", "kl_coefficient": 0.1},
        {"consumer": "other"},
        (ParameterSet(CONSUMER, "other", "evaluation.consumer", generates=True), MEASURED),
    ),
]


@pytest.mark.parametrize(("algorithm", "evaluation", "sets"), SETS)
def test_parameter_sets(
    algorithm: str | dict[str, Any], evaluation: dict[str, Any], sets: tuple[ParameterSet, ...]
) -> None:
    found = Implied(run_of(algorithm, evaluation=evaluation))
    assert found.parameter_sets == sets
    assert found.keeps_start == any(one.checkpoint is None for one in sets)
    alone = Implied(run_of(algorithm, evaluation=evaluation), evaluates_alone=True)
    asked = {None: (), "initial": (REFERENCE,)}.get(evaluation.get("consumer"), (CONSUMER,))
    assert tuple(one.name for one in alone.parameter_sets) == asked


@pytest.mark.parametrize("algorithm", [algorithm for algorithm, evaluation, _ in SETS if not evaluation])
def test_settings_declare_what_the_algorithm_needs(algorithm: str | dict[str, Any]) -> None:
    """The settings, which a rehearsal reads without torch, against the algorithm, which the loop reads."""
    config = run_of(algorithm)
    built = algorithms.build(config.algorithm, AlgorithmContext(100, 4))
    generations, sets = built.plan(1).generations, Implied(config).parameter_sets
    responders = [one.responder for one in generations if one.responder is not None]
    measured = [one.name for one in sets if one.measures] + [one.name for one in Implied(config).served_sets]
    assert tuple(measured) == sets_read(built.objectives)
    writers = {one.weights for one in (*generations, *responders)} - {POLICY}
    assert {one.name for one in sets if one.generates} == writers
    assert Implied(config).marks_thinking == bool(responders)


def test_served_sets_and_how_long_a_rank_may_wait() -> None:
    (one,) = Implied(run_of(SERVED)).served_sets
    assert (one.name, one.server.model, one.setting) == ("teacher", "m", "algorithm.teacher.server")
    assert Implied(run_of(SERVED), evaluates_alone=True).served_sets == ()
    assert [Implied(run_of(one)).patience for one in ("grpo", SERVED)] == [0.0, 70.0]
    judge = {"url": "http://host/v1", "model": "m", "patience": 80.0}
    judged = run_of(SERVED, reward={"kind": "judge", "judge": judge})
    assert (Implied(judged).patience, Implied(judged, evaluates_alone=True).patience) == (80.0, 80.0)
    assert Implied(run_of(evaluation={"reward": {"kind": "judge", "judge": judge}})).patience == 80.0


def test_checkpoints_that_are_read() -> None:
    assert Implied(run_of()).checkpoints == {}
    config = run_of(model={"path": "unused", "weights": "warm"}, evaluation={"consumer": "other"})
    assert Implied(config).checkpoints == {"model.weights": "warm", "evaluation.consumer": "other"}
    assert Implied(config).marks_thinking and not Implied(run_of()).marks_thinking


def test_sets_of_one_name_are_one() -> None:
    assert united((MEASURED, ParameterSet("teacher", "here"), WRITES)) == (
        ParameterSet(REFERENCE, generates=True, measures=True),
        ParameterSet("teacher", "here"),
    )


def test_sets_of_one_name_have_one_checkpoint() -> None:
    with pytest.raises(Refusal) as raised:
        united((TAUGHT, MEASURED, ParameterSet("teacher", "here")))
    assert str(raised.value) == (
        "the parameter set 'teacher': must be one set of weights, and is algorithm.teacher.checkpoint=there as well as "
        "here. Fix: give them names of their own."
    )
    # What is measured against would move.
    with pytest.raises(Refusal, match="is the run's start as well as the run's start, which trains"):
        united((MEASURED, ParameterSet(REFERENCE, trains=True)))
    with pytest.raises(Refusal, match="is the run's start as well as here"):
        united((MEASURED, ParameterSet(REFERENCE, "here")))


class Several(AlgorithmSettings):
    """Declares sets whose names are not theirs alone."""

    name: str = "mine:Several"

    def parameter_sets(self, run: RunSettings) -> tuple[ParameterSet, ...]:
        return (ParameterSet(POLICY, "here"), ParameterSet("teacher", "here"))

    def served_sets(self, run: RunSettings) -> tuple[ServedSet, ...]:
        return run_of(SERVED).algorithm.served_sets(run)


def test_a_name_stands_for_one_set_of_weights() -> None:
    broken = [str(one) for one in broken_setting_rules(run_of(Several()), model_shape_from_hf(MODEL))]
    assert [one for one in broken if one.startswith("the parameter set")] == [
        "the parameter set 'policy': is the name of the policy's own weights, and a name stands for one. "
        "Fix: give it another name.",
        "the parameter set 'teacher': is kept by this run and served by another, and a name stands for one. "
        "Fix: give it another name.",
    ]


def test_every_algorithm_is_looked_at() -> None:
    assert {name if isinstance(name, str) else name["name"] for name, *_ in SETS} == set(ALGORITHM_SETTINGS)


def test_no_torch_is_needed() -> None:
    code = "import sys, megarl.config.implied; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
