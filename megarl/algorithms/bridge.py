"""BRIDGE (arXiv 2509.06948): supervised fine-tuning and reinforcement as the two levels of one problem.

The policy is π(θ, w), all base weights θ and an adapter w, which is merged into them wherever it is used. The lower
level is reinforcement, θ*(w) = argmax J_RL(θ, w); the upper one, max over w of J_SFT(θ*(w), w), is trained with the
penalty λ [J_RL(θ̂, w) - J_RL(θ, w)], where the shadow θ̂ learns from rollouts alone. With step sizes α and β and
weights λ and 1 - λ, all gradients being those before the step:

    θ <- θ + α [(1 - λ) ∇_θ J_SFT(θ, w) + λ ∇_θ J_RL(θ, w)]
    θ̂ <- θ̂ + α ∇_θ J_RL(θ̂, w)
    w <- w + β [(1 - λ) ∇_w J_SFT(θ, w) + λ (∇_w J_RL(θ, w) - ∇_w J_RL(θ̂, w))]

(One version of the paper has a minus sign in the shadow's update. It is a misprint: with λ = 1 the shadow must be the
base, and the adapter must stand still.)

That takes three passes forward and backward, SFT(θ, w), RL(θ, w) and RL(θ̂, w), each of which gives the gradient of
its base and of the adapter at once. Each set's sum is clipped and given to an AdamW of its own. J_RL is GRPO's
objective, in any of its settings. Rollouts come from π(θ, w); the shadow learns from them by the clipped ratio of
π(θ̂, w) to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from megarl.algorithms.base import AlgorithmContext
from megarl.algorithms.grpo import Grpo
from megarl.algorithms.objective import LossInputs, LossTerms, Objective, likelihood_loss
from megarl.algorithms.plan import Plan
from megarl.config.algorithms import BridgeSettings
from megarl.config.parameter_sets import ADAPTER, POLICY, SHADOW
from megarl.records import DEMONSTRATION

#: The pass that demonstrations have to themselves.
SFT = "sft"


class Bridge(Grpo):
    """GRPO on rollouts, the likelihood of demonstrations, and what the shadow says of the two together."""

    Settings = BridgeSettings

    def __init__(self, settings: BridgeSettings, context: AlgorithmContext) -> None:
        super().__init__(settings, context)
        self.bridge = settings
        (self._rollouts,) = self.objectives
        self.objectives = self.objectives_of(1)

    def objectives_of(self, step: int) -> tuple[Objective, ...]:
        """With the weights λ and 1 - λ of the step."""
        rl, sft = self.bridge.weights(step, self.context.steps)
        rollouts = self._rollouts
        demonstrations = Objective(self.sft_loss, kinds=frozenset({DEMONSTRATION}), apart=SFT)
        if self.bridge.shadow == "none":
            return (
                replace(rollouts, goes_to={POLICY: rl}),
                replace(demonstrations, goes_to={POLICY: sft}),
            )
        rebuilt = self.bridge.shadow == "rebuilt"
        own = {POLICY: rl, ADAPTER: rl} | ({SHADOW: 1.0} if rebuilt else {})
        shadows = {ADAPTER: -rl} | ({} if rebuilt else {SHADOW: 1.0})
        return (
            replace(rollouts, goes_to=own),
            replace(demonstrations, goes_to={POLICY: sft, ADAPTER: sft}),
            replace(rollouts, parameters=SHADOW, goes_to=shadows),
        )

    def plan(self, step: int) -> Plan:
        """Answers as GRPO's, and demonstrations."""
        return replace(super().plan(step), demonstrations=self.context.demonstrations)

    def sft_loss(self, inputs: LossInputs) -> LossTerms:
        """-(1 / N) sum over the mini-batch's N tokens of demonstrations of weight x log p(token)."""
        return likelihood_loss(inputs, _chord if self.bridge.sft_token_weights == "chord" else None)

    def numbers(self, losses: Mapping[str, float]) -> dict[str, float]:
        """`sft_loss`, and `cooperative_gain`: J_RL(θ, w) - J_RL(θ̂, w) on the step's rollouts, J_RL being minus GRPO's
        loss, of which a constant that is added to all rewards changes nothing."""
        found = {"sft_loss": losses[SFT]} if SFT in losses else {}
        if SHADOW in losses:
            found["cooperative_gain"] = losses[SHADOW] - losses[POLICY]
        return found


def _chord(log_probs_T: Tensor) -> Tensor:
    """[T] p (1 - p) of each token: CHORD, arXiv 2508.11408."""
    probs_T = log_probs_T.exp()
    return probs_T * (1 - probs_T)
