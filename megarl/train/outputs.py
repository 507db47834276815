"""What was generated for a request, before it is graded."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.records import Stretch
from megarl.rollout.engine import Completion
from megarl.rollout.play import Played


@dataclass(frozen=True, slots=True)
class Output:
    """What was generated for a request. Of responses to one thinking, `completion` holds the thinking with the first
    response; `responses` has the completions of them all, without the thinking. Of a sample of several turns it holds
    all of them, observations included; `turns` has the policy's, and `played` what else is known. `stretches` say who
    wrote what; the first `kept` tokens were there before, with `old_log_probs` as far as they are known."""

    completion: Completion
    responses: tuple[Completion, ...] = ()
    stretches: tuple[Stretch, ...] = ()
    turns: tuple[tuple[int, ...], ...] = ()
    played: Played | None = None
    kept: int = 0
    old_log_probs: tuple[float, ...] = ()

    @property
    def tokens_made(self) -> int:
        """Tokens that the engine made."""
        put = sum(one.end - one.start for one in self.stretches if one.source == "environment")
        more = sum(len(response.token_ids) for response in self.responses[1:])
        return len(self.completion.token_ids) - self.kept - put + more
