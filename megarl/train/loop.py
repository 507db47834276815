"""The training loop: one function, the same on every rank, for every algorithm.

plan → draw, generate, score → keep groups → credit → log-probs → update → push weights → evaluate, save
"""

from __future__ import annotations

from typing import Any

from megarl.algorithms.objective import sets_read
from megarl.algorithms.plan import Plan
from megarl.config.parameter_sets import POLICY
from megarl.errors import TrainingStopped
from megarl.records import Sequence
from megarl.train import divergence, gauges, trust
from megarl.train.evaluation import evaluate
from megarl.train.measure import StepRecord
from megarl.train.probes import probed
from megarl.train.rollouts import Rollouts, make_rollouts
from megarl.train.saving import save_checkpoint, save_rollouts
from megarl.train.selection import trainable
from megarl.train.serving import awake
from megarl.train.session import Session


def run_steps(session: Session) -> None:
    """Train from the session's progress to the configured number of steps. Raises `StopAsked` after less of them."""
    config, progress = session.config, session.progress
    if config.evaluation.start and progress.step == 0:
        progress.accuracy_before = evaluate_now(session)["accuracy"]
    elif progress.evaluation_due and progress.step < config.steps:
        evaluate_now(session)
    save_due = False
    while progress.step < config.steps:
        run_step(session, progress.step + 1)
        progress.evaluation_due = _due(config.evaluation.every, progress.step) and progress.step < config.steps
        session.stops.give_up_if(session.stops.agreed())
        if progress.evaluation_due:
            evaluate_now(session)
        save_due |= _due(config.checkpoint.every, progress.step)
        if save_due and session.policy.skipped_in_a_row > 0:
            session.recorder.status(f"step {progress.step} is not saved, as its last update was skipped")
        elif save_due:
            save_checkpoint(session)
            save_due = False


def run_step(session: Session, step: int) -> dict[str, Any]:
    """One step; returns the metrics that it recorded."""
    session.stops.step_begins()
    record = StepRecord(session, step)
    plan = session.algorithm.plan(step)
    rollouts = roll_out(session, plan, step)
    record.rollouts(rollouts)
    record.add(gauges.measure(session, plan, rollouts))
    batches, totals, counters = trainable(session, probed(session, rollouts, step), step)
    record.count(counters)
    add_log_probs(session, batches)
    trust.check_before(session, plan, step, batches)
    current, objectives = _generated(session, plan, batches), session.algorithm.objectives
    for batch, total in zip(batches, totals, strict=True):
        with session.clock.phase("update"):
            found = session.policy.accumulate(batch, objectives, total, old_is_current=current)
            if current:
                trust.check_pass(session, plan, step, found)
            record.update(found, session.policy.step()[POLICY])
        current = False
        _stop_if_stuck(session)
    session.progress.step = step
    session.carry.step_ends()
    session.stops.step_ends()
    return record.write()


def roll_out(session: Session, plan: Plan, step: int) -> Rollouts:
    """The step's groups, saved where that is asked for; the engine is awake while they are generated. Collective.

    Where the rewards cannot be found any more, all ranks raise `TrainingStopped` with the policy's memory back; where
    the run was asked to stop and the step would not end in time, `StopAsked`. Raises `EngineChanged` on all ranks where
    an engine's weights have changed since the push.
    """
    if not plan.generations:
        return make_rollouts(session, plan, step)
    with trust.discarding(session, step), awake(session, plan.generations[0].weights):
        rollouts = make_rollouts(session, plan, step)
    save_rollouts(session, step, rollouts.made)
    return rollouts


def add_log_probs(session: Session, batches: list[list[Sequence]]) -> None:
    """Old log-probs, and those under other parameter sets, where an objective needs them. Collective.

    With one update per step the old log-probs are those of the update's own forward pass, so that no pass of
    their own is spent on them.
    """
    objectives = session.algorithm.objectives
    sequences = [sequence for batch in batches for sequence in batch]
    old = [one for one in objectives if one.old]
    if old and len(batches) > 1:
        own = [s for s in sequences if any(one.trains(s.kind) for one in old)]
        with session.clock.phase("old_log_probs"):
            for sequence, values in zip(own, session.policy.measure(own) or [], strict=False):
                sequence.old_log_probs = values
    for name in sets_read(objectives) if batches else ():
        own = [s for s in sequences if any(name in one.under and one.trains(s.kind) for one in objectives)]
        with session.clock.phase("reference_log_probs"):
            for sequence, values in zip(own, session.policy.measure(own, name) or [], strict=False):
                sequence.log_probs_under[name] = values


def _generated(session: Session, plan: Plan, batches: list[list[Sequence]]) -> bool:
    """Whether the step's first update has the weights that generated, and their log-probs are not measured before."""
    measured = len(batches) > 1 and any(one.old for one in session.algorithm.objectives)
    return any(one.weights == POLICY for one in plan.generations) and not measured


def evaluate_now(session: Session) -> dict[str, Any]:
    """Evaluate the current weights and record the result."""
    session.progress.evaluation_due = True
    with awake(session), session.clock.phase("evaluate"):
        result = evaluate(session, f"step_{session.progress.step:06d}")
    session.progress.evaluation_due = False
    session.recorder.evaluation({"step": session.progress.step, **result, "seconds": session.clock.take()})
    return result


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _stop_if_stuck(session: Session) -> None:
    if session.policy.skipped_in_a_row == 0:
        return
    divergence.stop_if_found(session)
    limit = session.config.optimizer.max_skipped
    if session.policy.skipped_in_a_row >= limit:
        raise TrainingStopped(
            f"{limit} updates in a row had a NaN or infinite loss or gradient, so the run stops before step "
            f"{session.progress.step + 1} is recorded; {divergence.last_checkpoint(session)}. Fix: lower optimizer.lr, "
            "check the data and rewards, and continue from the last checkpoint with resume=auto; optimizer.max_skipped "
            "sets the limit."
        )
