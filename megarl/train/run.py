"""What the commands run on every rank: train, evaluate, generate.

Importing this module imports Megatron and vLLM, so that workers forked afterwards start at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarl.config.schema import RunConfig
from megarl.errors import Refusal, TrainingStopped
from megarl.formats import checkpoint_folder
from megarl.parallel import bootstrap
from megarl.parallel.exchange import gather_all
from megarl.parallel.groups import form_grid
from megarl.policy import checkpoint
from megarl.rollout import environment
from megarl.train import evaluation
from megarl.train.loop import evaluate_now, roll_out, run_steps
from megarl.train.measure import peak_memory_bytes
from megarl.train.saving import resume, save_checkpoint, save_rollouts
from megarl.train.serving import awake
from megarl.train.session import Session, build, run_directory
from megarl.weights.export import export_hf

environment.preload()


@contextmanager
def session_of(config: RunConfig, *, evaluate_only: bool = False) -> Iterator[Session]:
    """Join the world, build this rank's session, and take both down in the end."""
    world = bootstrap.join(timeout_minutes=bootstrap.TIMEOUT_MINUTES + _patience_minutes(config))
    grid = form_grid(config.parallel, config.seed)
    session = build(config, world, grid, evaluate_only=evaluate_only)
    try:
        yield session
    finally:
        session.close()
        bootstrap.leave()


def _patience_minutes(config: RunConfig) -> float:
    """How long a rank may wait for a judge while the others wait for the rank."""
    judges = [reward.judge for reward in (config.reward, config.evaluation.reward) if reward is not None]
    return max((judge.patience for judge in judges if judge is not None), default=0.0) / 60


def train(config: RunConfig) -> dict[str, Any]:
    """Run the whole configuration and return what summary.json holds."""
    started = time.time()
    if config.resume == "never":
        refuse_to_overwrite(run_directory(config))
    with session_of(config) as session:
        resumed = resume(session)
        session.recorder.open(session.progress.step if resumed else None)
        session.recorder.status(_start_line(session, resumed))
        first = session.progress.step
        saves = config.checkpoint
        try:
            run_steps(session)
        except TrainingStopped:
            # What was trained until then is kept, as far as it is worth keeping.
            # The evaluation that could not be finished is made when the run continues.
            unsaved = session.progress.step > first and session.saved_step != session.progress.step
            if unsaved and session.policy.skipped_in_a_row == 0:
                save_checkpoint(session)
            raise
        if saves.end and session.progress.step > first and session.saved_step != session.progress.step:
            save_checkpoint(session)
        # What was learned is safe before anything else can fail.
        accuracy = evaluate_now(session)["accuracy"] if config.evaluation.end else None
        if saves.export_hf:
            export_hf(session.policy, run_directory(config) / "hf", Path(config.model.path))
        memory = gather_all(peak_memory_bytes())
        summary = {
            "name": config.name,
            "algorithm": config.algorithm.name,
            "steps": session.progress.step,
            "processes": session.world.size,
            "accuracy_before": session.progress.accuracy_before,
            "accuracy_after": accuracy,
            "evaluation_problems": len(session.evaluation_data.prompts) if session.evaluation_data else 0,
            "seconds": round(time.time() - started, 2),
            "peak_memory_bytes_per_process": memory,
            "skipped_updates": session.progress.skipped_updates,
            "data": session.data.counters,
            "counters": session.progress.counters,
        }
        session.recorder.curves()
        session.recorder.summary(summary)
        return summary


def evaluate(config: RunConfig, checkpoint_path: str | None = None) -> dict[str, Any]:
    """Run the evaluation alone, on `checkpoint_path` or the weights that the configuration names."""
    # The initial policy as the consumer is that of the configuration: it is loaded first, and kept.
    later = checkpoint_path is not None and config.evaluation.consumer == "initial"
    if checkpoint_path is not None and not later:
        config = config.model_copy(update={"model": config.model.model_copy(update={"weights": checkpoint_path})})
    with session_of(config, evaluate_only=True) as session:
        if checkpoint_path is not None and later:
            checkpoint.load(session.policy, checkpoint_folder.require(checkpoint_path, "checkpoint"), optimizer=False)
        with awake(session):
            result = evaluation.evaluate(session)
        return {"name": config.name, "checkpoint": checkpoint_path, **result}


def generate(config: RunConfig) -> dict[str, Any]:
    """Make and save the rollouts of every step, without training."""
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"save": True})})
    with session_of(config) as session:
        rewards: list[float] = []
        for step in range(1, config.steps + 1):
            session.algorithm.begin_step(step)
            rollouts = roll_out(session, step)
            save_rollouts(session, step, rollouts)
            rewards += [s.reward for s in rollouts.scores.values() if s.reward is not None]
            session.recorder.status(f"step {step}: {len(rollouts.scores)} samples")
        return {
            "name": config.name,
            "rollouts": str(run_directory(config) / "rollouts"),
            "samples": len(rewards),
            "reward_mean": sum(rewards) / len(rewards) if rewards else None,
        }


def refuse_to_overwrite(directory: Path) -> None:
    """Raise `Refusal` where an earlier run has left metrics or checkpoints in `directory`."""
    if (directory / "metrics.jsonl").exists() or (directory / "checkpoints" / "latest").exists():
        raise Refusal(
            f"name={directory.name}",
            f"already names a run, in {directory}, which a new one would mix with",
            "continue it with resume=auto, choose another name, or move the folder away",
        )


def _start_line(session: Session, resumed: bool) -> str:
    grid, config = session.grid, session.config
    layout = f"TP {grid.tensor} x PP {grid.pipeline} x DP {grid.data}"
    engines = (
        f", {session.world.size // config.rollout.tensor} engine(s) of TP {config.rollout.tensor}"
        if session.engine
        else ""
    )
    begin = f"continuing after step {session.progress.step}" if resumed else "starting"
    return f"{config.name}: {config.algorithm.name}, {session.world.size} process(es), {layout}{engines}; {begin}"
