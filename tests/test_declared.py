"""What an algorithm asks for beyond what its settings declare is refused, at the start or when it asks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from megarl.algorithms import declared
from megarl.algorithms.base import Algorithm, AlgorithmContext, Credit, Group
from megarl.algorithms.objective import LossInputs, LossTerms, Objective
from megarl.algorithms.plan import Generation, Learned, Plan, Probe, Responder
from megarl.config.algorithms import AlgorithmSettings
from megarl.config.implied import Implied
from megarl.config.load import load_config
from megarl.config.parameter_sets import REFERENCE, ParameterSet, ServedSet
from megarl.config.schema import RunConfig
from megarl.config.sections import RunSettings
from megarl.config.servers import LogProbServerSettings
from megarl.data.dataset import training_data
from megarl.data.tokenizer import load_tokenizer
from megarl.errors import Refusal, TrainingStopped
from megarl.records import Prompt, Trajectory
from megarl.train import admission
from megarl.train.generation import jobs
from megarl.train.groups import draw

SERVER = LogProbServerSettings.model_validate({"url": "http://host:8000/v1", "model": "m"})


class AskingSettings(AlgorithmSettings):
    """One that measures, one that writes, one that is served."""

    name: str = "test_declared:Asking"

    def parameter_sets(self, run: RunSettings) -> tuple[ParameterSet, ...]:
        elder = ParameterSet("elder", "there", generates=True)
        return (ParameterSet(REFERENCE, measures=True), elder, ParameterSet("shadow", trains=True))

    def served_sets(self, run: RunSettings) -> tuple[ServedSet, ...]:
        return (ServedSet("teacher", SERVER, "algorithm.server"),)


class Asking(Algorithm):
    """Asks for what the test gives it."""

    Settings = AskingSettings
    asked: ClassVar[Plan] = Plan((Generation(2),))
    measured: ClassVar[tuple[Probe, ...]] = ()

    def __init__(self, settings: Any, context: AlgorithmContext) -> None:
        self.objectives = (Objective(self.loss, under=(REFERENCE, "teacher")),)

    def plan(self, step: int) -> Plan:
        return self.asked

    def probes(self, step: int) -> tuple[Probe, ...]:
        return self.measured

    def credit(self, step: int, groups: Sequence[Group]) -> list[Credit]:
        return []

    def loss(self, inputs: LossInputs) -> LossTerms:
        return LossTerms(inputs.log_probs_T.sum())


def run_of(settings: AlgorithmSettings) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "case",
            "steps": 6,
            "model": {"path": "unused"},
            "algorithm": settings,
            "data": {"path": "unused", "max_prompt_tokens": 50},
            "rollout": {"max_tokens": 100, "group_size": 4},
        }
    )


CONFIG = run_of(AskingSettings())
FIRST = Prompt(0, (1, 2), "x", "y")


def learn(prompt: Prompt, sample: Trajectory) -> Learned:
    return Learned(None)


def said(
    plan: Plan | None = None, probes: tuple[Probe, ...] = (), config: RunConfig = CONFIG, **objective: Any
) -> list[str]:
    algorithm = Asking(None, AlgorithmContext(100))
    algorithm.objectives = tuple(replace(one, **objective) for one in algorithm.objectives)
    algorithm.plan, algorithm.probes = (lambda step: plan or Asking.asked), lambda step: probes
    return [str(refusal) for refusal in declared.refusals(algorithm, config, FIRST)]


def probe(parameters: str) -> Probe:
    return Probe("doubt", lambda log_probs_T, _: log_probs_T.tolist(), parameters)


class GrowingSettings(AskingSettings):
    """One that goes on with its samples, and may ask more prompts than the run says."""

    grows: ClassVar[bool] = True

    def most_prompts(self, run: RunSettings) -> int:
        return 2 * run.batch.prompts


GROWING = run_of(GrowingSettings())


def test_growth_and_prompts_are_declared() -> None:
    grows = Plan((Generation(4),), grows=True, prompts=128)
    assert said(grows, config=GROWING) == []
    more, undeclared = said(replace(grows, prompts=129), config=GROWING), said(grows)
    assert more == [
        "algorithm.name=test_declared:Asking: plans 129 prompts, and its settings' most_prompts are 128. Fix: return "
        "the most that a step asks from most_prompts."
    ]
    assert [one.split(": ", 1)[1] for one in undeclared] == [
        "plans to grow, for which its settings do not ask. Fix: set grows=True in its settings.",
        "plans 128 prompts, and its settings' most_prompts are 64. Fix: return the most that a step asks from "
        "most_prompts.",
    ]


@pytest.mark.parametrize(
    "beside",
    [Generation(1, "old", "elder"), Generation(1, "text", learn=learn), Generation(1, "two", responder=Responder())],
)
def test_what_grows_is_the_policys_own_in_one_part(beside: Generation) -> None:
    (found,) = [one for one in said(Plan((Generation(4), beside), grows=True), config=GROWING) if "grow" in one]
    assert found == (
        "algorithm.name=test_declared:Asking: plans to grow beside samples of other weights, of responders, or of "
        "which texts are made. Fix: let the policy write what grows, in one part, and learn it as it is."
    )


def test_entropies_and_influences_are_the_policys_own() -> None:
    own = Probe("doubt", lambda found, _: [float(found.mean())], measures="entropy")
    assert said(probes=(own,)) == []
    (found,) = said(probes=(replace(own, parameters=REFERENCE),))
    assert found == (
        "algorithm.name=test_declared:Asking: wants more than log-probs under the parameter set 'reference' "
        "(Probe 'doubt'). Fix: measure these under the policy's own weights."
    )


def test_what_is_declared_may_be_asked_for() -> None:
    hinted = Generation(1, "hint", prompt=lambda prompt: (5,) * 50, max_tokens=100)
    none = Generation(1, "none", prompt=lambda prompt: "not_asked")
    plan = Plan((Generation(4), Generation(2, "old", "elder"), hinted, none))
    assert said(plan, (probe("policy"), probe(REFERENCE), probe("teacher"), probe("shadow"))) == []
    assert said(parameters="shadow") == []


NAME = "algorithm.name=test_declared:Asking: "
UNDECLARED = "which its settings do not declare. Fix: return ParameterSet("


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (
            {"under": ("old_self",)},
            "wants log-probs under the parameter set 'old_self' (Objective.under), "
            f"{UNDECLARED}'old_self', measures=True) from their parameter_sets, or a ServedSet from served_sets.",
        ),
        # It is there, and its log-probs are not.
        (
            {"under": ("elder",)},
            "wants log-probs under the parameter set 'elder' (Objective.under), "
            f"{UNDECLARED}'elder', measures=True) from their parameter_sets, or a ServedSet from served_sets.",
        ),
        (
            {"parameters": "critic"},
            f"has an objective that trains the parameter set 'critic', {UNDECLARED}'critic', trains=True) from "
            "their parameter_sets.",
        ),
        (
            {"together": True},
            "has an objective that sees groups together, for which its settings make no room in a micro-batch. "
            "Fix: set sequences_together in its settings to how many it sees.",
        ),
        (
            {"probes": (probe("elder"),)},
            "wants log-probs under the parameter set 'elder' (Probe 'doubt'), "
            f"{UNDECLARED}'elder', measures=True) from their parameter_sets, or a ServedSet from served_sets.",
        ),
        (
            {"plan": Plan((Generation(1, "old", REFERENCE),))},
            f"has 'old' written by the parameter set 'reference', {UNDECLARED}'reference', generates=True) from "
            "their parameter_sets.",
        ),
        # Nobody but this run can write.
        (
            {"plan": Plan((Generation(1, "old", "teacher"),))},
            f"has 'old' written by the parameter set 'teacher', {UNDECLARED}'teacher', generates=True) from "
            "their parameter_sets.",
        ),
        (
            {"plan": Plan((Generation(1), Generation(1, "hint", responder=Responder("elder"))))},
            "plans a Responder, for whom its settings do not end the thinking apart. "
            "Fix: let answers_in_parts be true in its settings.",
        ),
        (
            {"plan": Plan((Generation(1),), solutions=True)},
            "plans to learn solutions, for which its settings do not ask the data. "
            "Fix: let learns_solutions be true in its settings.",
        ),
    ],
)
def test_what_is_not_declared_is_refused(asked: dict[str, Any], sentence: str) -> None:
    assert said(**asked) == [NAME + sentence]


def test_an_algorithm_without_an_engine_generates_nothing() -> None:
    class Given(AskingSettings):
        generates: ClassVar[bool] = False

    assert said(Plan((Generation(1),)), config=run_of(Given())) == [
        f"{NAME}plans generations, for which its settings ask no engine. Fix: set generates=True in its settings."
    ]
    assert said(Plan(solutions=True), config=run_of(Given())) == []


def test_prompts_and_texts_of_its_own_fit_the_bounds() -> None:
    class Long(AskingSettings):
        def longest_prompt(self, run: RunSettings) -> int:
            return 80

    def hinted(tokens: int, **further: Any) -> Plan:
        return Plan((Generation(1, "hint", prompt=lambda prompt: (5,) * tokens, **further),))

    rooms = "Fix: give the name of a counter for such prompts, or make room for them."
    assert said(hinted(51)) == [
        f"a prompt of 51 tokens of the kind 'hint' of {NAME}must have 1 to 50 tokens, by data.max_prompt_tokens. "
        + rooms
    ]
    long = run_of(Long())
    # What follows a longer one is made a text first, since it would not fit in training.
    assert len(said(hinted(80), config=long)) == 1 and said(hinted(80, learn=learn), config=long) == []
    assert said(hinted(81, learn=learn), config=long) == [
        f"a prompt of 81 tokens of the kind 'hint' of {NAME}must have 1 to 80 tokens, by longest_prompt. {rooms}"
    ]
    assert len(said(hinted(0, learn=learn))) == 1
    assert said(hinted(9, max_tokens=101)) == [
        f"max_tokens=101 of the kind 'hint' of {NAME}must not exceed rollout.max_tokens=100. "
        "Fix: lower it, or raise rollout.max_tokens."
    ]
    assert list(declared.of_text("hint", 100, CONFIG)) == []
    (refusal,) = declared.of_text("hint", 101, CONFIG)
    assert str(refusal) == (
        f"a text of 101 tokens of the kind 'hint' of {NAME}must not be longer than rollout.max_tokens=100, as no "
        "response is. Fix: learn None in its place, or raise rollout.max_tokens."
    )


def test_a_later_prompt_is_refused_when_it_comes() -> None:
    generation = Generation(1, "hint", prompt=lambda prompt: prompt.token_ids * 30)
    groups = draw([FIRST, replace(FIRST, index=1), replace(FIRST, index=2, token_ids=(1,) * 2)])
    with pytest.raises(TrainingStopped, match="a prompt of 60 tokens of the kind 'hint'"):
        jobs(CONFIG, Plan((generation,)), 1, groups, lambda one, group: False)


#: Settings that ask the data for solutions.
SAYS = """
    @property
    def learns_solutions(self) -> bool:
        return True
"""


def test_check_and_train_refuse_what_an_algorithm_elsewhere_asks(run_file: Path) -> None:
    """By the one function that both ask."""
    source = Path(__file__).with_name("outside_algorithm.py").read_text()
    Path("sound.py").write_text(source)
    reference = "(ParameterSet(REFERENCE, measures=True), "
    Path("asks.py").write_text(source.replace(reference, "(*(), "))
    Path("breaks.py").write_text(source.replace("        return Plan(", "        1 / 0\n        return Plan("))

    def refused(name: str, *overrides: str) -> list[str]:
        config = load_config(run_file, [f"algorithm.name={name}:Outside", *overrides])
        return [str(refusal) for refusal in admission.refusals(config, trains=True)]

    assert refused("sound") == []
    assert refused("sound", "parameters=adapter") == [
        "parameters=adapter: trains one adapter, and algorithm.name=sound:Outside trains the parameter set namer too. "
        "Fix: remove it, or use an algorithm that trains the policy alone."
    ]
    assert refused("asks") == [
        "algorithm.name=asks:Outside: wants log-probs under the parameter set 'reference' (Objective.under), which its "
        "settings do not declare. Fix: return ParameterSet('reference', measures=True) from their parameter_sets, or a "
        "ServedSet from served_sets."
    ]
    assert refused("breaks") == [
        "algorithm.name=breaks:Outside: cannot be used (ZeroDivisionError: division by zero). Fix: correct its code."
    ]
    Path("sets.py").write_text(source.replace(", ParameterSet(NAMER, trains=True))", ")"))
    with pytest.raises(Refusal) as caught:
        refused("sets")
    assert [str(caught.value)] == [
        "algorithm.name=sets:Outside: has settings whose parameter_sets is ParameterSet, and must be a tuple of "
        "ParameterSet. Fix: correct its code."
    ]
    Path("long.py").write_text(source.replace("return run.rollout.group_size + 1", "return run.rollout.groups + 1"))
    with pytest.raises(Refusal) as caught:
        refused("long")
    assert [str(caught.value)] == [
        "algorithm.name=long:Outside: has settings whose sequences_per_prompt cannot be asked (AttributeError: "
        "'RolloutSettings' object has no attribute 'groups'). Fix: correct its code."
    ]


def test_the_data_is_asked_for_the_solutions_that_an_algorithm_learns_beside_its_samples(run_file: Path) -> None:
    """Rows without one are left out, and a file of such rows alone is refused."""
    source = Path(__file__).with_name("outside_algorithm.py").read_text()
    source = source.replace("batches=2, gauged", "batches=2, solutions=True, gauged")
    Path("silent.py").write_text(source)
    Path("says.py").write_text(source.replace("    share: float = 0.5\n", "    share: float = 0.5\n" + SAYS))

    def refused(name: str, *overrides: str) -> list[str]:
        config = load_config(run_file, [f"algorithm.name={name}:Outside", *overrides])
        return [str(refusal) for refusal in admission.refusals(config, trains=True)]

    assert refused("silent", "data.solution_column=solution")[0].startswith("data.solution_column=solution: must be")
    rows = [{"prompt": "1", "answer": "1"}, {"prompt": "2", "answer": "2", "solution": "two"}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [one.split(": ")[1].split(",")[0] for one in refused("silent", "data.solution_column=solution")] == [
        "plans to learn solutions"
    ]
    assert refused("says")[0] == (
        "data.solution_column=null: must name the column of the worked solutions that algorithm.name=says:Outside "
        "learns. Fix: set data.solution_column."
    )
    assert refused("says", "data.solution_column=solution") == []
    config = load_config(run_file, ["algorithm.name=says:Outside", "data.solution_column=solution"])
    needed = Implied(config).needs_solutions
    assert needed and config.algorithm.sequences_per_prompt(config) == config.rollout.group_size + 1
    found = training_data(config, load_tokenizer("model"), need_solution=needed)
    assert [prompt.solution for prompt in found.prompts] == ["two"] and found.counters["no_solution"] == 1
    Path("rows.jsonl").write_text(json.dumps(rows[0] | {"solution": ""}) + "\n")
    (sentence,) = refused("says", "data.solution_column=solution")
    assert sentence.startswith("data.path=rows.jsonl: has no usable row")
