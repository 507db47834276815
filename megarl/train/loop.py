"""The training loop: one function, the same on every rank, for every algorithm.

plan → draw, generate, score → keep groups → measure, grow → credit → log-probs → accumulate, step → push weights →
evaluate, save
"""

from __future__ import annotations

from typing import Any

from megarl.algorithms.objective import first_pass_is_old, rounds
from megarl.policy.losses import Pass
from megarl.policy.trained_set import StepResult
from megarl.train import divergence, gauges, trust
from megarl.train.evaluation import evaluate_now
from megarl.train.growing import rollouts_of
from megarl.train.measure import StepRecord
from megarl.train.saving import save_checkpoint
from megarl.train.selection import trainable
from megarl.train.session import Session
from megarl.train.values import add_log_probs


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
    rollouts = rollouts_of(session, plan, step)
    record.rollouts(rollouts)
    record.add(gauges.measure(session, plan, rollouts))
    batches, totals, counters, groups, spans = trainable(session, rollouts, step)
    record.credited(groups, counters, spans)
    record.count(add_log_probs(session, batches))
    trust.check_before(session, step, batches)
    objectives = session.algorithm.objectives_of(step)
    current = first_pass_is_old(objectives, len(batches))
    for batch, total in zip(batches, totals, strict=True):
        with session.clock.phase("update"):
            passes, steps = dict[str, Pass](), dict[str, StepResult]()
            for part in rounds(objectives):
                passes |= session.policy.accumulate(
                    batch, part.objectives, total, old_is_current=current, hands_on_old=part.hands_on_old
                )
                if current:
                    trust.check_pass(session, step, passes)
                steps |= session.policy.step(part.steps)
            record.update(passes, steps)
        current = False
        divergence.stop_if_stuck(session)
    session.progress.step = step
    session.carry.step_ends()
    session.stops.step_ends()
    return record.write()


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
