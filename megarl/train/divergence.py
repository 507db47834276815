"""A run whose numbers are no numbers any more: it ends, and what was saved before stays as it was."""

from __future__ import annotations

import numpy as np

from megarl.errors import Refusal, TrainingStopped
from megarl.policy import finite
from megarl.records import Sequence, from_place
from megarl.train.past import run_directory
from megarl.train.session import Session

#: Tokens of the sequence that weights are tried on. Our choice: weights too large to compute with are so everywhere.
PROBE = 16


class Diverged(TrainingStopped):
    """Weights, moments or log-probs are not finite: nothing of this run is worth keeping from then on."""


def found(session: Session) -> str | None:
    """What of the policy is not finite, in words, or None. Collective."""
    tokens = np.resize(np.array(session.data.training.prompts[0].token_ids, np.int32), PROBE)
    return finite.what_is_not(session.policy, Sequence(tokens, from_place(1, PROBE)))


def stop_if_found(session: Session) -> None:
    """Raise `Diverged` on all ranks where the policy is not finite. Collective."""
    if (words := found(session)) is not None:
        step = session.progress.step
        raise Diverged(
            f"{session.config.name} diverged: after step {step} {words}. Nothing was saved or removed since; "
            f"{last_checkpoint(session)}. Fix: lower optimizer.lr, bound the gradient by optimizer.clip_grad, check "
            "the data and rewards, and continue with resume=auto"
        )


def stop_if_stuck(session: Session) -> None:
    """Raise `TrainingStopped` on all ranks where `optimizer.max_skipped` updates in a row were skipped, and `Diverged`
    where one was and the policy is not finite. Collective."""
    if session.policy.skipped_in_a_row == 0:
        return
    stop_if_found(session)
    limit = session.config.optimizer.max_skipped
    if session.policy.skipped_in_a_row >= limit:
        raise TrainingStopped(
            f"{limit} updates in a row had a NaN or infinite loss or gradient, so the run stops before step "
            f"{session.progress.step + 1} is recorded; {last_checkpoint(session)}. Fix: lower optimizer.lr, "
            "check the data and rewards, and continue from the last checkpoint with resume=auto; optimizer.max_skipped "
            "sets the limit."
        )


def refuse_weights(session: Session, setting: str) -> None:
    """Raise `Refusal` where the weights that `setting` gave are not finite. Collective."""
    if (words := found(session)) is not None:
        raise Refusal(setting, f"must hold weights that a policy can compute with, but {words}", "use other weights")


def last_checkpoint(session: Session) -> str:
    """Where the run's last good state is, in words."""
    step, root = session.saved_step, run_directory(session.config) / "checkpoints"
    return "no checkpoint was saved before" if step is None else f"the last checkpoint is {root}/step_{step:06d}"
