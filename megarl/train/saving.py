"""Saves and restores a session: checkpoints with what the run carries, and rollouts."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megarl.config.data import DEMONSTRATIONS
from megarl.config.schema import RunConfig
from megarl.errors import Refusal
from megarl.formats import checkpoint_folder
from megarl.parallel.bootstrap import World
from megarl.parallel.exchange import first_decides
from megarl.policy import checkpoint
from megarl.train import differences, divergence, journal, replay
from megarl.train.groups import Made
from megarl.train.past import run_directory
from megarl.train.session import Session, unfinished_directory


def save_checkpoint(session: Session) -> None:
    """Save weights, optimizer, progress and carried states under runs/<name>/checkpoints. Collective.

    Raises `Diverged` on all ranks, with nothing written or removed, where the policy is not finite.
    """
    settings, start = session.config.checkpoint, time.monotonic()
    with session.clock.phase("save"):
        divergence.stop_if_found(session)
        checkpoint.save(
            session.policy,
            run_directory(session.config) / "checkpoints",
            session.progress.step,
            dataclasses.asdict(session.progress) | {"states": session.carry.states()} | _of_the_run(session),
            optimizer=settings.optimizer,
            # While updates are skipped, nobody knows what these weights are worth.
            keep=settings.keep if session.policy.skipped_in_a_row == 0 else sys.maxsize,
            keep_every=settings.keep_every,
            beside=session.carry.write,
        )
        if session.world.is_first:
            journal.forget(unfinished_directory(session.config), session.progress.step)
    session.saved_step = session.progress.step
    session.stops.saved(time.monotonic() - start)


def resume(session: Session) -> bool:
    """Continue from the run's latest checkpoint where `resume` asks for it; whether there was one. Collective."""
    config = session.config
    if config.resume == "never":
        return False
    saved = _load_newest(session)
    if saved is None:
        if config.resume == "must":
            root = run_directory(config) / "checkpoints"
            raise Refusal(
                "resume=must", f"needs a complete checkpoint in {root}", "use resume=auto to start from the beginning"
            )
        return False
    _compare(session, saved)
    session.progress.restore(saved)
    anew = differences.begun_anew(config, saved["config"], other_rows=session.data.rows != saved["data"])
    if session.data.demonstrations is not None and DEMONSTRATIONS not in saved:
        anew["demonstrations"] = "the run had none"
    directory = run_directory(config) / "checkpoints" / f"step_{saved['step']:06d}"
    session.carry.restore(saved["states"], directory, anew=anew)
    if (sentence := forgotten(saved["states"], anew)) is not None:
        session.recorder.status(sentence)
    session.saved_step = session.progress.step
    return True


def forgotten(states: Mapping[str, Any], anew: Mapping[str, str]) -> str | None:
    """A sentence about the saved states that hold something and are not taken up, `anew` as `begun_anew` says."""
    lost = [f"{name} ({why})" for name, why in anew.items() if states.get(name)]
    return f"begins anew what the checkpoint carries of {', '.join(lost)}" if lost else None


def _of_the_run(session: Session) -> dict[str, Any]:
    """What a checkpoint keeps of the run, to be known by what continues from it."""
    demonstrations = session.data.demonstrations
    beside = {} if demonstrations is None else {DEMONSTRATIONS: demonstrations.rows}
    return {"config": session.config.model_dump(mode="json"), "data": session.data.rows} | beside


def _compare(session: Session, saved: dict[str, Any]) -> None:
    """Say what differs from the run that saved a checkpoint. Raises `Refusal` for what may not, on all ranks."""
    config, before = session.config, saved["config"]
    checkpoint_directory = run_directory(config) / "checkpoints" / f"step_{saved['step']:06d}"
    for refusal in differences.changed_parts(config, before, checkpoint_directory):
        raise refusal
    for refusal in differences.changed_rows(config, session.data.rows, saved["data"], checkpoint_directory):
        raise refusal
    demonstrations = session.data.demonstrations
    if demonstrations is not None and DEMONSTRATIONS in saved:
        rows, known = demonstrations.rows, saved[DEMONSTRATIONS]
        for refusal in differences.changed_rows(config, rows, known, checkpoint_directory, DEMONSTRATIONS):
            raise refusal
    if (sentence := differences.changes(config, before, checkpoint_directory)) is not None:
        session.recorder.status(sentence)


def _load_newest(session: Session) -> dict[str, Any] | None:
    """Load the newest checkpoint that is whole and return its progress; None where there is none. Collective."""
    root, damaged = run_directory(session.config) / "checkpoints", {}
    while True:
        # What rank 0 sees decides, so that all do the same.
        directory, newer = first_decides(lambda: _choose(root, damaged))
        for other, damage in newer:
            session.recorder.status(f"{other.name} {damage}: looking at the one before it")
            damaged[other] = damage
        if directory is None:
            return None
        try:
            progress = checkpoint.load(session.policy, directory, optimizer=True)
            if (words := divergence.found(session)) is None:
                return progress
            raise checkpoint_folder.Damaged(directory, f"was saved by a run that had diverged: {words}")
        except checkpoint_folder.Damaged as found:
            session.recorder.status(f"{directory.name} {found.damage}: looking at the one before it")
            damaged[directory] = found.damage


def _choose(root: Path, damaged: Mapping[Path, str]) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The checkpoint to continue from, and those passed over for it that are not in `damaged`, with what is wrong."""
    directory = checkpoint_folder.find(root, damaged)
    newer = itertools.takewhile(lambda found: found[0] != directory, checkpoint_folder.survey(root))
    return directory, [(other, said) for other, said in newer if said is not None and other not in damaged]


def save_rollouts(config: RunConfig, world: World, step: int, made: Made) -> None:
    """Write the samples this rank holds, where `rollout.save` asks for it."""
    if not config.rollout.save:
        return
    directory = run_directory(config) / "rollouts"
    if world.is_first:
        # An earlier attempt at this step may have had other ranks.
        replay.remove_step(directory, step)
    dist.barrier()
    if made.written:
        replay.save_samples(directory, step, world.rank, made.written)
