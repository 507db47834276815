"""ExPO (arXiv 2507.02834): the policy explains the known answer, and learns the explanation with the hint hidden.

The explanation c is drawn from the policy that sees question q and reference answer a*; what is learned is its chain
and then a*, after q alone: sequences of kind "explanation". ExP-GRPO adds their log-likelihood to GRPO's objective,
ExP-DPO prefers them to the policy's own answers. What the paper says and what is our choice: docs/algorithms.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megarl.algorithms.base import Algorithm, AlgorithmContext, Credit, Group, Trained, whole
from megarl.algorithms.explanations import EXPLANATION, Explanations
from megarl.algorithms.grpo import Grpo
from megarl.algorithms.objective import LossInputs, LossTerms, Objective, counted_alone, required
from megarl.algorithms.plan import Gauge, Generation, Plan
from megarl.config.algorithms import ExpDpoSettings, ExpGrpoSettings
from megarl.config.parameter_sets import POLICY, REFERENCE
from megarl.ops.masking import sum_counted, zero_masked
from megarl.ops.segments import sum_by_sequence
from megarl.records import Head, Trajectory

EXPLANATIONS = frozenset({EXPLANATION})


class ExpGrpo(Grpo):
    """ExP-GRPO: GRPO's objective on the sampled answers, plus the log-likelihood of explanations.

    An explanation is no member of its group: it has no advantage, no ratio and no clip, and counts nowhere in GRPO's
    part. Where all answers of a group are wrong, its explanation is all that is learned. With `explanation_weight` 0
    none is asked for, and value and gradient are GRPO's bit for bit.
    """

    Settings = ExpGrpoSettings

    def __init__(self, settings: ExpGrpoSettings, context: AlgorithmContext) -> None:
        super().__init__(settings, context)
        self._explanation_weight = settings.explanation_weight
        self._explanation_aggregation = settings.explanation_aggregation
        self._explanations = Explanations(settings.explanation, context) if self._explanation_weight > 0 else None
        if self._explanations is not None:
            self.objectives = (*self.objectives, Objective(self.likelihood, kinds=EXPLANATIONS))

    def plan(self, step: int) -> Plan:
        """GRPO's answers, and beside them explanations."""
        plan = super().plan(step)
        if self._explanations is None:
            return plan
        generations = (*plan.generations, self._explanations.generation())
        return replace(plan, generations=generations, gauged=self._explanations.gauged(step))

    def credit(self, step: int, groups: Sequence[Group]) -> list[Credit]:
        """GRPO's of the answers, and the explanations whole."""
        found = zip(super().credit(step, groups), groups, strict=True)
        return [Credit((*credit.trained, *_explained(group))) for credit, group in found]

    def gauges(self, group: Group, held: Sequence[Trajectory]) -> list[Gauge]:
        """See `Explanations.gauges`."""
        return [] if self._explanations is None else self._explanations.gauges(group, held)

    def loss(self, inputs: LossInputs) -> LossTerms:
        """GRPO's, and mean negative log-likelihood of the answers in nats per token as `own_nll`."""
        inputs = counted_alone(inputs)
        terms = super().loss(inputs)
        own = sum_counted(inputs.mask_T > 0, -inputs.log_probs_T)
        return replace(terms, means=terms.means | {"own_nll": (own, inputs.totals.tokens)})

    def likelihood(self, inputs: LossInputs) -> LossTerms:
        """The objective on explanations: -explanation_weight x log p(c, a* | q).

        The mean over their tokens (token_mean), or sums over explanations and then the mean (sum). Logs mean negative
        log-likelihood in nats per token as `explanation_nll`.
        """
        counted_T = inputs.mask_T > 0
        weights_T = inputs.weights(
            "token_mean" if self._explanation_aggregation == "token_mean" else "constant", counted_T
        )
        log_likelihood = (weights_T * zero_masked(counted_T, inputs.log_probs_T)).sum()
        nll = sum_counted(counted_T, -inputs.log_probs_T)
        return LossTerms(-self._explanation_weight * log_likelihood, {"explanation_nll": (nll, inputs.totals.tokens)})


class ExpDpo(Algorithm):
    """ExP-DPO: of two answers to a question, the explanation is chosen and one of the policy's own is rejected.

    The loss is that of DPO, arXiv 2305.18290 Eq. 7.
    """

    Settings = ExpDpoSettings

    def __init__(self, settings: ExpDpoSettings, context: AlgorithmContext) -> None:
        self.settings = settings
        self.context = context
        pairs = Objective(self.loss, kinds=EXPLANATIONS | {"answer"}, under=(REFERENCE,), together=True)
        self.objectives = (pairs,)
        self._explanations = Explanations(settings.explanation, context)

    def plan(self, step: int) -> Plan:
        """Answers and explanations, offline those of the policy that the run started with."""
        weights = REFERENCE if self.settings.mode == "offline" else POLICY
        generations = (Generation(self.context.group_size, weights=weights), self._explanations.generation(weights))
        return Plan(generations, gauged=self._explanations.gauged(step))

    def credit(self, step: int, groups: Sequence[Group]) -> list[Credit]:
        """The rejected answer and the explanation, both whole; `groups_without_pair` lack one of them."""
        return [self._pair(group) for group in groups]

    def _pair(self, group: Group) -> Credit:
        rejected, chosen = self.rejected(group), _explained(group)
        trained = () if rejected is None else (Trained(rejected, whole(rejected)),)
        return Credit((*trained, *chosen), None if trained and chosen else "groups_without_pair")

    def rejected(self, group: Group) -> Head | None:
        """The first answer that has a token, or under `rejected` wrong the first such whose reward is reward.low; None
        where none is. Not one that answers a prompt of its environment's: the explanation answers the data's."""
        wrong_only = self.settings.rejected == "wrong"
        answers = zip(group.answers, group.rewards, strict=True)
        low = self.context.reward_low
        eligible = (head for head, reward in answers if not wrong_only or reward <= low)
        return next((head for head in eligible if head.length and head.prompt_length is None), None)

    def gauges(self, group: Group, held: Sequence[Trajectory]) -> list[Gauge]:
        """See `Explanations.gauges`."""
        return self._explanations.gauges(group, held)

    def loss(self, inputs: LossInputs) -> LossTerms:
        """The objective on pairs.

        -log sigmoid(margin), mean over pairs, with margin = beta x (D_chosen - D_rejected) and D the sum of
        log p - log p_reference over an answer's tokens. Logs per pair `preference_accuracy` (margin above 0) and
        `preference_margin` in nats, and `explanation_nll`, mean negative log-likelihood per token of the chosen.

        Raises:
            ValueError: an explanation without one answer of its group in the micro-batch, or an answer without one.
        """
        counted_T = inputs.mask_T > 0
        reference_T = inputs.under(REFERENCE).detach()
        log_ratio_T = zero_masked(counted_T, inputs.log_probs_T) - zero_masked(counted_T, reference_T)
        sums_S = sum_by_sequence(log_ratio_T, inputs.sequence_T, inputs.num_sequences)
        chosen_P, rejected_P = _pairs(inputs)
        margins_P = self.settings.beta * (sums_S[chosen_P] - sums_S[rejected_P])
        chosen = inputs.totals.of_kind(EXPLANATION)
        chosen_T = inputs.of_kinds(EXPLANATIONS)[inputs.sequence_T]
        return LossTerms(
            loss=-(logsigmoid(margins_P) / chosen.sequences).sum(),
            means={
                "preference_accuracy": ((margins_P > 0).double().sum(), chosen.sequences),
                "preference_margin": (margins_P.detach().double().sum(), chosen.sequences),
                "explanation_nll": (sum_counted(counted_T & chosen_T, -inputs.log_probs_T), chosen.tokens),
            },
        )


def _explained(group: Group) -> tuple[Trained, ...]:
    """The group's explanations, whole."""
    return tuple(Trained(head, whole(head)) for head in group.of(EXPLANATION))


def _pairs(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """The sequences of the chosen and of the rejected answer of each pair, [P] int64 each.

    Raises:
        ValueError: see `ExpDpo.loss`.
    """
    explains_S, group_S = inputs.of_kinds(EXPLANATIONS), required(inputs.group_S, "group_S")
    present_S = inputs.lengths_S > 0
    chosen_S, rejected_S = explains_S & present_S, ~explains_S & present_S
    paired_SS = (group_S[:, None] == group_S[None, :]) & chosen_S[:, None] & rejected_S[None, :]
    if not (torch.equal(paired_SS.sum(1), chosen_S.long()) and torch.equal(paired_SS.any(0), rejected_S)):
        raise ValueError(
            "every explanation must share its micro-batch with one answer of its group, and every answer with one"
        )
    chosen_P, rejected_P = paired_SS.nonzero(as_tuple=True)
    return chosen_P, rejected_P
