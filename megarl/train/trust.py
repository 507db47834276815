"""Whether the engine samples from the policy: the gap between their log-probs, bounded, and where it may come from."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

import numpy as np

from megarl import records
from megarl.config.grid import Grid
from megarl.config.implied import Implied
from megarl.config.parameter_sets import POLICY
from megarl.errors import TrainingStopped
from megarl.parallel.cpu_platform import has_cuda
from megarl.parallel.exchange import gather_all
from megarl.policy.losses import Pass
from megarl.train import divergence, journal
from megarl.train.session import Session, unfinished_directory
from megarl.weights.push import Difference, EngineChanged, shortened


@contextmanager
def discarding(session: Session, step: int) -> Iterator[None]:
    """What a changed engine made inside is not taken up when the run goes on."""
    try:
        yield
    except EngineChanged:
        _discard(session, step)
        raise


def _discard(session: Session, step: int) -> None:
    session.policy.discard()
    if session.world.is_first:
        journal.discard(unfinished_directory(session.config), step)


def check_before(session: Session, step: int, batches: Sequence[Sequence[records.Sequence]]) -> None:
    """Raise `TrainingStopped` on all ranks where the engine's log-probs are no numbers, or, where the old log-probs are
    measured, their gap exceeds `health.gap_limit`. Sequences are looked at that the weights of their old log-probs
    wrote; of others the policy may think what it likes. Collective."""
    if session.config.health.gap_limit is None or not Implied(session.config).makes_rollouts:
        return
    own = [sequence for batch in batches for sequence in batch if sequence.old_wrote]
    if not all(gather_all(_all_finite(own))):
        # A diverged policy's engine has no numbers either; nobody is to take these up.
        _discard(session, step)
        divergence.stop_if_found(session)
        _stop(session, step, "the engine's log-probs of the sampled tokens are not finite, though the policy's are")
    _stop_above(session, step, _mean_gap(session.grid, own))


def check_pass(session: Session, step: int, passes: Mapping[str, Pass]) -> None:
    """Raise `TrainingStopped` on all ranks where the gap that the policy's pass of this step has found exceeds
    `health.gap_limit`, before anything is learned from it. Collective where it raises."""
    if POLICY in passes:
        _stop_above(session, step, passes[POLICY].means.get("logprob_gap_mean"))


def _all_finite(sequences: Sequence[records.Sequence]) -> bool:
    """Whether the engine's log-probs are, on this rank. A gap that is NaN exceeds nothing."""
    found = (sequence.rollout_log_probs for sequence in sequences)
    return all(np.isfinite(log_probs).all() for log_probs in found if log_probs is not None)


def _mean_gap(grid: Grid, sequences: Sequence[records.Sequence]) -> float | None:
    """Mean absolute difference, in nats per token, over these; None without any."""
    gaps = [
        # Not known yet are those of the current weights, where the update's own pass finds them.
        _known(np.abs(sequence.old_log_probs - sequence.rollout_log_probs), sequence.old_log_probs)
        for sequence in sequences
        if sequence.old_log_probs is not None and sequence.rollout_log_probs is not None
    ]
    mine = (float(sum(gap.sum() for gap in gaps)), sum(len(gap) for gap in gaps)) if grid.reports else (0.0, 0)
    sums, tokens = zip(*gather_all(mine), strict=True)
    return sum(sums) / sum(tokens) if sum(tokens) else None


def _known(gap: np.ndarray, old: np.ndarray) -> np.ndarray:
    return gap[~np.isnan(old)]


def _stop_above(session: Session, step: int, gap: float | None) -> None:
    limit = session.config.health.gap_limit
    if limit is None or gap is None or not gap > limit:
        return
    between = "the log-probs of the sampled tokens differ between engine and policy"
    much = f"{gap:.3g} nats per token in the mean, more than health.gap_limit={limit:g}"
    _stop(session, step, f"{between} by {much}")


def _stop(session: Session, step: int, found: str) -> NoReturn:
    _discard(session, step)
    raise TrainingStopped(f"step {step}: {found}, so nothing is learned from them; {_cause(session)}")


def _cause(session: Session) -> str:
    """What the two differ in, and what to do. Collective."""
    elsewhere = (
        "look for what only one of the two obeys: sampling (rollout.top_p, rollout.top_k), keys of config.json such as "
        "rope_scaling or sliding windows, kernels (rollout.precision); or raise health.gap_limit, or set it to null"
    )
    if has_cuda():
        # The engine's weights are gone by now.
        known = session.config.weights.checksum == "every"
        said = "still were those pushed when it had generated" if known else "are not known (weights.checksum=every)"
        return f"the engine's weights {said}. Fix: {elsewhere}"
    found = session.inference.differences()
    if not found:
        return f"the weights of both are the same. Fix: {elsewhere}"
    return (
        f"the engine's weights are not the policy's in {shortened(_groups(found))}. Fix: start again from the last "
        "checkpoint with weights.checksum=every; if it happens again, this model is not pushed as it should be"
    )


def _groups(found: Sequence[Difference]) -> list[str]:
    """Parameters that differ but for their layer or expert as one, those with the largest difference first."""
    groups: dict[str, list[Difference]] = defaultdict(list)
    for one in found:
        groups[re.sub(r"\.\d+(?=\.)", ".*", one.name)].append(one)
    largest = sorted(groups.items(), key=lambda group: -max(one.largest for one in group[1]))
    return [
        f"{pattern if len(members) > 1 else members[0].name} "
        f"({f'{len(members)} of them, ' if len(members) > 1 else ''}by up to {max(m.largest for m in members):.3g})"
        for pattern, members in largest
    ]
