"""Supervised fine-tuning's loss, and the table of algorithms."""

import math
from dataclasses import replace

import pytest
import torch
from group_case import head_of
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_case import logged_sums

from megarl.algorithms import ALGORITHMS, algorithm_class, build
from megarl.algorithms.base import AlgorithmContext, Group
from megarl.algorithms.grpo import Grpo
from megarl.algorithms.objective import BatchTotals, LossInputs, Objective, total
from megarl.algorithms.plan import Plan
from megarl.algorithms.sft import Sft
from megarl.config.algorithms import ALGORITHM_SETTINGS, AlgorithmSettings, GrpoSettings, SftSettings
from megarl.errors import Refusal
from megarl.records import Key, Prompt

CONTEXT = AlgorithmContext(max_tokens=64)


def make_inputs(log_probs, mask, sequence, totals) -> LossInputs:
    counts = [sum(m for m, s in zip(mask, sequence, strict=True) if s == i) for i in range(max(sequence) + 1)]
    return LossInputs(
        log_probs_T=torch.tensor(log_probs, dtype=torch.float64, requires_grad=True),
        entropy_T=torch.arange(len(mask), dtype=torch.float64),
        mask_T=torch.tensor(mask, dtype=torch.float64),
        sequence_T=torch.tensor(sequence),
        num_sequences=len(counts),
        lengths_S=torch.tensor(counts, dtype=torch.float64),
        totals=totals,
    )


def test_mean_negative_log_likelihood_per_counted_token():
    inputs = make_inputs([-1.0, -2.0, math.nan, -4.0], [1.0, 1.0, 0.0, 1.0], [0, 0, 1, 1], BatchTotals(10.0, 4.0))
    terms = Sft(SftSettings(), CONTEXT).loss(inputs)
    assert terms.loss.item() == pytest.approx(0.7)
    assert torch.autograd.grad(terms.loss, inputs.log_probs_T)[0].tolist() == [-0.1, -0.1, 0.0, -0.1]
    assert {name: value.item() for name, value in logged_sums(terms).items()} == {}


@settings(deadline=None)
@given(st.lists(st.floats(-9, 0), min_size=2, max_size=12), st.integers(1, 11))
def test_micro_batches_add_up(log_probs, cut):
    cut = min(cut, len(log_probs) - 1)
    totals = BatchTotals(float(len(log_probs)), 2.0)
    parts = (log_probs[:cut], log_probs[cut:])
    inputs = [make_inputs(part, [1.0] * len(part), [0] * len(part), totals) for part in parts]
    summed = sum(Sft(SftSettings(), CONTEXT).loss(part).loss.item() for part in inputs)
    assert summed == pytest.approx(-math.fsum(log_probs) / len(log_probs), rel=1e-12, abs=1e-15)


def test_a_batch_without_counted_tokens_is_exactly_zero():
    inputs = make_inputs([math.nan, -1.0], [0.0, 0.0], [0, 0], BatchTotals(0.0, 0.0))
    loss = Sft(SftSettings(), CONTEXT).loss(inputs).loss
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, inputs.log_probs_T)[0].tolist() == [0.0, 0.0]


def test_needs_nothing_not_even_rollouts():
    (texts,) = Sft(SftSettings(), CONTEXT).objectives
    assert texts == Objective(texts.loss)
    assert not SftSettings.generates


def test_every_solution_is_trained_whole_and_nothing_is_generated():
    algorithm = Sft(SftSettings(), CONTEXT)
    assert algorithm.plan(1) == Plan(solutions=True)
    solution = head_of(Key(0, 0, 0, "solution"), 4, holder=None, text=True)
    group = Group(0, Prompt(0, (1,), "", ""), 0, (solution,))
    assert algorithm.drop_reason(group) is None
    ((one,),) = [credit.trained for credit in algorithm.credit(1, [group])]
    assert one.head is solution and [span[:2] for span in one.spans] == [(0, 4)] and not one.signals


def test_the_table_matches_the_settings_table():
    assert {name: chosen.Settings for name, chosen in ALGORITHMS.items()} == ALGORITHM_SETTINGS


def test_build_by_name():
    algorithm = build(GrpoSettings(clip_high=0.28), CONTEXT)
    assert isinstance(algorithm, Grpo)
    assert algorithm.settings.clip_high == 0.28
    assert isinstance(build(SftSettings(), CONTEXT), Sft)


OWN_ALGORITHM = """
from megarl.algorithms.base import Algorithm, Credit, Trained, whole
from megarl.algorithms.objective import LossTerms, Objective
from megarl.algorithms.plan import Generation, Plan
from megarl.config.algorithms import AlgorithmSettings

class Reinforce(Algorithm):
    class Settings(AlgorithmSettings):
        scale: float = 2.0

    def __init__(self, settings, context):
        self.scale = settings.scale
        self.objectives = (Objective(self.loss, advantages=True),)

    def plan(self, step):
        return Plan((Generation(2),))

    def credit(self, step, groups):
        return [Credit(tuple(Trained(head, whole(head, head.reward)) for head in group.answers)) for group in groups]

    def loss(self, inputs):
        return LossTerms(-(self.scale * inputs.log_probs_T * inputs.advantages_T).sum(), {})

class NoSettings(Algorithm):
    pass

unrelated = dict
"""


def test_build_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "own_algorithms.py").write_text(OWN_ALGORITHM)
    monkeypatch.syspath_prepend(tmp_path)
    name = "own_algorithms:Reinforce"
    algorithm = build(algorithm_class(name).Settings.model_validate({"name": name, "scale": 3.0}), CONTEXT)
    inputs = make_inputs([-1.0, -2.0], [1.0, 1.0], [0, 0], BatchTotals(2.0, 1.0))
    inputs = replace(inputs, advantages_T=torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert total(algorithm.objectives, inputs).loss.item() == -3.0
    with pytest.raises(Refusal, match=r"needs settings of type Settings, got AlgorithmSettings"):
        build(AlgorithmSettings(name=name), CONTEXT)
    with pytest.raises(Refusal, match=r"must name a subclass"):
        algorithm_class("own_algorithms:unrelated")
    with pytest.raises(Refusal, match=r"could not be imported \(AttributeError: .* has no attribute 'Missing'\)"):
        algorithm_class("own_algorithms:Missing")
    with pytest.raises(Refusal, match=r"has no settings record"):
        algorithm_class("own_algorithms:NoSettings")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gropo",
            rf"algorithm.name=gropo: is no known algorithm. Fix: use one of {', '.join(ALGORITHMS)}, or "
            r"package.module:Class.",
        ),
        (
            "no_such_package.here:It",
            r"could not be imported \(ModuleNotFoundError: No module named 'no_such_package'\)",
        ),
        (":It", r"is no known algorithm"),
        ("package.module:", r"is no known algorithm"),
    ],
)
def test_refused_names(name, message):
    with pytest.raises(Refusal, match=message):
        algorithm_class(name)
