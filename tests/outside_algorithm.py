"""An algorithm that is no part of megarl, and uses all that one may: `test_resume.py` runs a copy of this file.

Answers are credited token by token, by how surprising each is to the policy of the beginning and by a baseline that is
carried from step to step; beside them the policy learns to name the answer that it was shown, and so does a copy of it
that learns nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megarl.algorithms.base import Algorithm, AlgorithmContext, Credit, Group, Span, Trained, whole
from megarl.algorithms.objective import LossInputs, LossTerms, Objective, required
from megarl.algorithms.plan import Gauge, Generation, Learned, Plan, Probe, Text
from megarl.config.algorithms import AlgorithmSettings
from megarl.config.parameter_sets import REFERENCE, ParameterSet
from megarl.config.sections import RunSettings
from megarl.ops.masking import sum_counted, zero_masked
from megarl.records import Head, Prompt, Trajectory

NAMING = "naming"
#: The parameter set that learns nothing but names.
NAMER = "namer"


class OutsideSettings(AlgorithmSettings):
    """How much of a token's credit comes from its surprise."""

    share: float = 0.5

    def parameter_sets(self, run: RunSettings) -> tuple[ParameterSet, ...]:
        return (ParameterSet(REFERENCE, measures=True), ParameterSet(NAMER, trains=True))

    def sequences_per_prompt(self, run: RunSettings) -> int:
        return run.rollout.group_size + 1


class Outside(Algorithm):
    """Texts of its own, probes, credit per token, objectives of two parameter sets, and a state."""

    Settings = OutsideSettings

    def __init__(self, settings: OutsideSettings, context: AlgorithmContext) -> None:
        self.settings, self.context = settings, context
        self.steps, self.baseline = 0, 0.0
        answers, names = frozenset({"answer"}), frozenset({NAMING})
        self.objectives = (
            Objective(self.reinforce, answers, advantages=True, old=True, under=(REFERENCE,)),
            Objective(self.name, names),
            Objective(self.name, names, parameters=NAMER),
        )

    def plan(self, step: int) -> Plan:
        naming = Generation(1, NAMING, prompt=self.shown, max_tokens=8, graded=False, learn=self.named, refresh_every=2)
        return Plan((Generation(self.context.group_size), naming), batches=2, gauged=2 if step % 2 else 0)

    def shown(self, prompt: Prompt) -> list[int] | str:
        tokenizer = self.context.tokenizer
        assert tokenizer is not None
        return [*prompt.token_ids, *tokenizer.encode(prompt.answer)] if prompt.index % 5 else "names_not_asked"

    def named(self, prompt: Prompt, sample: Trajectory) -> Learned:
        tokenizer = self.context.tokenizer
        assert tokenizer is not None
        begun = sample.body.token_ids[:2]
        return Learned(Text((*begun, *tokenizer.encode(prompt.answer), tokenizer.eos_token_id)), {"names": 1})

    def drop_reason(self, group: Group) -> str | None:
        return "groups_without_variance" if min(group.rewards) == max(group.rewards) else None

    def probes(self, step: int) -> tuple[Probe, ...]:
        per_token = self.context.max_tokens
        return (
            Probe("surprise", lambda log_probs_T, _: (-log_probs_T).tolist(), REFERENCE, most=per_token),
            Probe("by_namer", lambda log_probs_T, _: [float(log_probs_T.mean())], NAMER),
        )

    def credit(self, step: int, groups: Sequence[Group]) -> list[Credit]:
        found = [self._of_group(group) for group in groups]
        rewards = [reward for group in groups for reward in group.rewards]
        if rewards:
            self.steps += 1
            self.baseline += (sum(rewards) / len(rewards) - self.baseline) / self.steps
        return found

    def _of_group(self, group: Group) -> Credit:
        answers = [Trained(head, self._spans(head)) for head in group.answers]
        names = [Trained(head, whole(head)) for head in group.of(NAMING)]
        return Credit((*answers, *names))

    def _spans(self, head: Head) -> tuple[Span, ...]:
        surprise = head.measured["surprise"]
        assert len(surprise) == head.length and head.reward is not None
        # How little who learns names alone would have said it.
        novelty = -head.measured["by_namer"][0]
        mean = sum(surprise) / len(surprise)
        share = self.settings.share
        return tuple(
            Span(place, place + 1, (head.reward - self.baseline) * (1 + share * (one - mean) + 0.01 * novelty))
            for place, one in enumerate(surprise)
        )

    def gauges(self, group: Group, held: Sequence[Trajectory]) -> list[Gauge]:
        return [
            Gauge(body.token_ids, {"naming_nll": (0, head.length)}) for head, body in held if head.key.kind == NAMING
        ]

    def reinforce(self, inputs: LossInputs) -> LossTerms:
        counted_T = inputs.mask_T > 0
        log_probs_T = zero_masked(counted_T, inputs.log_probs_T)
        old_T = zero_masked(counted_T, required(inputs.old_log_probs_T, "old_log_probs_T").detach())
        advantages_T = zero_masked(counted_T, required(inputs.advantages_T, "advantages_T"))
        away_T = log_probs_T.detach() - zero_masked(counted_T, inputs.under(REFERENCE))
        loss = -((log_probs_T - old_T).exp() * advantages_T).sum() / inputs.totals.tokens
        return LossTerms(loss, {"away_from_start": (sum_counted(counted_T, away_T), inputs.totals.tokens)})

    def name(self, inputs: LossInputs) -> LossTerms:
        counted_T = inputs.mask_T > 0
        likelihood = zero_masked(counted_T, inputs.log_probs_T).sum()
        loss = -0.1 * likelihood / max(inputs.totals.tokens, 1.0)
        return LossTerms(loss, {"naming_loss": (sum_counted(counted_T, -inputs.log_probs_T), inputs.totals.tokens)})

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "baseline": self.baseline}

    def restore(self, state: dict[str, Any]) -> None:
        self.steps, self.baseline = state["steps"], state["baseline"]
