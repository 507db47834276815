"""What a step learns from: groups that it has made itself, or that the step before has begun, grown where an algorithm
wants that."""

from __future__ import annotations

import dataclasses

from megarl.algorithms.plan import Plan
from megarl.train.groups import Begun, Kept, Made, Rollouts, added
from megarl.train.probes import probed
from megarl.train.rollouts import roll_out
from megarl.train.saving import save_rollouts
from megarl.train.session import Session


def rollouts_of(session: Session, plan: Plan, step: int) -> Rollouts:
    """The rollouts that the step learns from, measured and grown, saved where that is asked for. Collective; raises as
    `roll_out` and `probed`.

    Under `rollout.ahead` the kept groups are those that the step before has begun, and everything else is of this
    step's one call of the engine, which begins the next step's groups.
    """
    rollouts = (_of_step_before if session.config.rollout.ahead else _of_this_step)(session, plan, step)
    save_rollouts(session.config, session.world, step, rollouts.made)
    return rollouts


def _of_this_step(session: Session, plan: Plan, step: int) -> Rollouts:
    rollouts = probed(session, roll_out(session, plan, step), step)
    if not plan.grows:
        return rollouts
    begun, rollouts = _begun(session, rollouts, step)
    if not begun.grows:
        return rollouts
    more = roll_out(session, plan, step, begun, draws=False, first_batch=plan.batches)
    groups, bodies = begun.completed(more.made)
    kept = dataclasses.replace(rollouts.kept, groups=groups)
    return rollouts._replace(made=rollouts.made + more.made, kept=kept, earlier=bodies)


def _of_step_before(session: Session, plan: Plan, step: int) -> Rollouts:
    waited, last = session.feed.waiting, step == session.config.steps
    if last:
        begun, grows = None, waited is not None and waited.grows
        new = roll_out(session, plan, step, waited, draws=False) if grows else Rollouts(Made(), Kept())
    else:
        new = roll_out(session, plan, step, waited)
        begun, new = _begun(session, probed(session, new, step, keeps_old=True), step)
    session.feed.exchange(begun)
    groups, bodies = ((), {}) if waited is None else waited.completed(new.made)
    session.feed.require_fresh(step, groups)
    return new._replace(kept=Kept(groups, new.kept.counters), earlier=bodies)


def _begun(session: Session, rollouts: Rollouts, step: int) -> tuple[Begun, Rollouts]:
    """The kept groups with how they go on, but for those that do not; and the rollouts with what is counted of that."""
    groups = rollouts.kept.groups
    growths = session.algorithm.growth(step, groups)
    pairs = [(group, growth) for group, growth in zip(groups, growths, strict=True) if growth.left_out is None]
    left_out = [{growth.left_out: 1, "groups_dropped": 1} for growth in growths if growth.left_out is not None]
    counters = added(rollouts.kept.counters, *(growth.counters for growth in growths), *left_out)
    names = {head.key for group, _ in pairs for head in group.heads}
    bodies = {key: body for key, body in rollouts.bodies.items() if key in names}
    begun = Begun(tuple(group for group, _ in pairs), tuple(growth for _, growth in pairs), bodies)
    return begun, rollouts._replace(kept=Kept(begun.groups, counters))
