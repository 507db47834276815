"""What the commands run on every rank: train, evaluate, generate.

Importing this module imports Megatron and vLLM, so that workers forked afterwards start at once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megarl.config.implied import Implied
from megarl.config.schema import RunConfig
from megarl.errors import Interrupted, MegarlError, TrainingStopped
from megarl.formats import checkpoint_folder
from megarl.health import time_limit
from megarl.health.guard import watching
from megarl.health.preflight import preflight
from megarl.health.run_lock import RunLock
from megarl.parallel import bootstrap, progress, terminal
from megarl.parallel.bootstrap import World
from megarl.parallel.exchange import first_decides, gather_all
from megarl.parallel.groups import form_grid
from megarl.parallel.launch import started_here
from megarl.policy import checkpoint
from megarl.policy.adapter_files import save_adapter
from megarl.rollout import vllm_setup
from megarl.train import admission, divergence, evaluation, past
from megarl.train.divergence import Diverged
from megarl.train.evaluation import evaluate_now
from megarl.train.loop import run_steps
from megarl.train.memory import peak_memory_bytes
from megarl.train.past import run_directory
from megarl.train.rollouts import roll_out
from megarl.train.saving import resume, save_checkpoint, save_rollouts
from megarl.train.session import Session, build
from megarl.train.stops import StopAsked, Stops
from megarl.weights.export import export_hf

vllm_setup.preload()

#: Bound on a collective, in minutes, where a watchdog sees sooner that a rank hangs.
WATCHED_MINUTES = 24 * 60.0


@contextlib.contextmanager
def session_of(
    config: RunConfig, *, evaluate_only: bool = False, writes: bool = False, also_read: Sequence[RunConfig] = ()
) -> Iterator[Session]:
    """Join the world, build this rank's session under watch, and take both down in the end.

    `writes`: the run's folder is written, which no other run may do meanwhile. `also_read`: whose files the session
    will read in place of its own, which a launched world looks into before anything is built.
    """
    progress.enter("start")
    health = config.health
    implied = Implied(config, evaluate_only)
    patience = implied.patience
    # Where somebody watches, a rank may wait as long as another works.
    minutes = WATCHED_MINUTES if health.watchdog else bootstrap.TIMEOUT_MINUTES + patience / 60
    world = bootstrap.join(timeout_minutes=minutes, join_limit=health.join_limit)
    directory = run_directory(config)
    environment = config.rollout.environment
    # A turn's verdict may be a judge's, and on a crowded machine a call may take longer.
    between = patience + 2 * environment.time_limit if environment is not None else 0.0
    waits = {"score": patience, "generate": between, "evaluate": max(patience, between)}
    waits |= {f"{one.name}_log_probs": patience for one in implied.served_sets}
    with watching(health, world, directory, waits) as guard, contextlib.ExitStack() as at_end:
        with guard.one_voice():
            if world.size > 1 and not started_here():
                # Where the command started the ranks it has looked itself.
                first_decides(lambda: _look_into_files([config, *also_read], evaluate_only))
            if writes:
                lock = RunLock(directory, say=terminal.say)
                at_end.callback(lock.release)
                first_decides(lambda: lock.take(lost=guard.end))
            if writes and health.preflight.enabled:
                _look_before(config, world)
            grid = form_grid(config.parallel, config.seed)
            stops, warns = Stops(guard.stopping), not also_read
            session = build(config, world, grid, stops, evaluate_only=evaluate_only, warns=warns)
            weights = config.model.weights
            given = f"model.path={config.model.path}" if weights is None else f"model.weights={weights}"
            divergence.refuse_weights(session, given)
        at_end.callback(session.close)
        with guard.one_voice():
            yield session
    bootstrap.leave()


def _look_into_files(configs: Sequence[RunConfig], evaluates: bool) -> None:
    """Raise the first `Refusal` of tokenizer, data or reward functions."""
    for config in configs:
        for refusal in admission.contents(config, evaluates=evaluates, seconds=admission.BRIEFLY):
            raise refusal


def _look_before(config: RunConfig, world: World) -> None:
    """The pre-flight, and what it found in preflight.json. Collective."""
    report = preflight(config, world, run_directory(config))
    if world.is_first:
        report.write(run_directory(config) / "preflight.json")
        if world.size > 1:
            terminal.say(report.status_line())


def train(config: RunConfig) -> dict[str, Any]:
    """Run the whole configuration and return what summary.json holds.

    Raises `Interrupted` where the run was asked to stop, with what it had learned saved.
    """
    started = time.time()
    for refusal in past.refusals(config):
        raise refusal
    with session_of(config, writes=True) as session:
        resumed = resume(session)
        session.recorder.open(session.progress.step if resumed else None)
        session.recorder.status(_start_line(session, resumed))
        first = session.progress.step
        progress.enter("step")
        try:
            run_steps(session)
        except Diverged:
            raise
        except TrainingStopped:
            # What was trained until then is kept, as far as it is worth keeping.
            # The evaluation that could not be finished is made when the run continues.
            if session.policy.skipped_in_a_row == 0:
                _save_what_is_new(session, first)
            raise
        except StopAsked:
            _save_what_is_new(session, first)
            raise _stopped(session, first) from None
        progress.enter("finish")
        if config.checkpoint.end:
            _save_what_is_new(session, first)
        if session.saved_step != session.progress.step:
            divergence.stop_if_found(session)
        # What was learned is safe before anything else can fail.
        try:
            accuracy = evaluate_now(session)["accuracy"] if config.evaluation.end else None
        except StopAsked:
            raise _stopped(session, first) from None
        return _finish(session, accuracy, started)


def _save_what_is_new(session: Session, first: int) -> None:
    if session.progress.step > first and session.saved_step != session.progress.step:
        save_checkpoint(session)


def _stopped(session: Session, first: int) -> MegarlError:
    """The error with which a run ends that was asked to stop."""
    step = session.progress.step
    if step == first and time_limit.is_near(session.config.health.notice):
        return TrainingStopped(
            f"{session.stops.reason} ahead of the job's time limit came before one step was finished: the time limit "
            "is shorter than a step. Fix: submit with a longer --time; what the engines made is kept in unfinished/"
        )
    saved = f"saved after step {step}" if session.saved_step == step else "as saved before; no step was finished since"
    return Interrupted(f"{session.config.name} stopped at {session.stops.reason}, {saved}: go on with resume=auto")


def _finish(session: Session, accuracy: float | None, started: float) -> dict[str, Any]:
    """Write what a whole run leaves behind, and return the summary."""
    config = session.config
    if config.checkpoint.export_hf:
        folder, precision = run_directory(config) / "hf", config.checkpoint.export_precision
        export_hf(session.policy, folder, Path(config.model.path), precision=precision)
        # Beside a base that trained too an adapter says nothing without that base.
        if session.policy.network.base_is_frozen:
            save_adapter(session.policy, run_directory(config) / "adapter")
    summary = {
        "name": config.name,
        "algorithm": config.algorithm.name,
        "steps": session.progress.step,
        "processes": session.world.size,
        "accuracy_before": session.progress.accuracy_before,
        "accuracy_after": accuracy,
        "evaluation_problems": len(session.data.held_out.prompts) if session.data.held_out else 0,
        "evaluation_problems_in_training_data": session.data.held_out_in_training,
        "seconds": round(time.time() - started, 2),
        "peak_memory_bytes_per_process": gather_all(peak_memory_bytes()),
        "skipped_updates": session.progress.skipped_updates,
        "data": session.data.training.counters,
        "counters": dict(session.counters),
    }
    return session.recorder.finish(summary)


def evaluate(config: RunConfig, checkpoint_path: str | None = None) -> dict[str, Any]:
    """Run the evaluation alone, on `checkpoint_path` or the weights that the configuration names."""
    # The initial policy as the consumer is that of the configuration: it is loaded first, and kept.
    later = checkpoint_path is not None and Implied(config, evaluates_alone=True).keeps_start
    if checkpoint_path is not None and not later:
        config = config.model_copy(update={"model": config.model.model_copy(update={"weights": checkpoint_path})})
    with session_of(config, evaluate_only=True) as session:
        progress.enter("step")
        if checkpoint_path is not None and later:
            checkpoint.load(session.policy, checkpoint_folder.require(checkpoint_path, "checkpoint"), optimizer=False)
            divergence.refuse_weights(session, f"checkpoint={checkpoint_path}")
        weights = checkpoint_path or config.model.weights
        folder = Path("model") if weights is None else checkpoint_folder.require(weights, "checkpoint")
        name = f"evaluate_{folder.name}"
        with session.inference.awake():
            result = evaluation.evaluate(session, name)
        kept = session.recorder.answers_file(name) if config.evaluation.save else None
        answers = None if kept is None else str(kept)
        return {"name": config.name, "checkpoint": checkpoint_path, **result, "answers": answers}


def generate(config: RunConfig) -> dict[str, Any]:
    """Make and save the rollouts of every step, without training: of trees the first samples."""
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"save": True})})
    with session_of(config, writes=True) as session:
        progress.enter("step")
        rewards: list[float] = []
        for step in range(1, session.config.steps + 1):
            made = roll_out(session, session.algorithm.plan(step), step).made
            save_rollouts(session.config, session.world, step, made)
            answers = made.answers
            rewards += [head.reward for _, head in answers if head.reward is not None]
            session.recorder.status(f"step {step}: {len(answers)} samples")
        return {
            "name": config.name,
            "rollouts": str(run_directory(config) / "rollouts"),
            "samples": len(rewards),
            "reward_mean": sum(rewards) / len(rewards) if rewards else None,
        }


def _start_line(session: Session, resumed: bool) -> str:
    grid, config = session.grid, session.config
    layout = f"TP {grid.tensor} x PP {grid.pipeline} x DP {grid.data}"
    engines = (
        f", {session.world.size // config.rollout.tensor} engine(s) of TP {config.rollout.tensor}"
        if session.inference.engine
        else ""
    )
    begin = f"continuing after step {session.progress.step}" if resumed else "starting"
    run = f"{config.name}: {config.algorithm.name}, {session.world.size} process(es), {layout}{engines}"
    return f"{run}; data: {session.data.training.sentence()}; {begin}"
