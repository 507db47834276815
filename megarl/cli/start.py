"""What the commands share: read and check the configuration, then run a worker in this process or in local ones.

Nothing here imports torch before the rules have passed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

import typer

from megarl.config import determinism
from megarl.config.cluster import Cluster
from megarl.config.load import load_config
from megarl.config.schema import RunConfig
from megarl.errors import Interrupted, Refusal
from megarl.health import time_limit
from megarl.parallel import terminal
from megarl.parallel.launch import launch, stop_signals
from megarl.parallel.place import RANK_NAMES, find_place
from megarl.train import admission

T = TypeVar("T")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the file.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON line on stdout; all else goes to stderr.")]


def prepare(
    path: Path,
    overrides: Sequence[str] | None,
    *,
    trains: bool = False,
    evaluates: bool = False,
    starts: bool = False,
    reads: bool = True,
    cluster: Cluster | None = None,
) -> RunConfig:
    """The checked configuration. Raises `Refusal` before anything is started or written.

    `trains`: the run's folder is written as that of a training, so what an earlier run has left there counts.
    `evaluates`: it is an evaluation alone. `starts`: the run follows, so signals that ask to stop are answered as soon
    as the configuration says how. `reads`: prompts are read, so that tokenizer, data and rewards count; those of a run
    that a launcher started are looked at when it joins. `cluster`: whose GPUs it is for, where they are not this
    machine's.
    """
    config = load_config(path, overrides or ())
    admit([config], trains=trains, evaluates=evaluates, starts=starts, reads=reads, cluster=cluster)
    return config


def admit(
    configs: Sequence[RunConfig],
    *,
    trains: bool = False,
    evaluates: bool = False,
    starts: bool = False,
    reads: bool = True,
    cluster: Cluster | None = None,
) -> None:
    """Raise the first `Refusal` of what is to run in one session; arguments as for `prepare`."""
    place = launcher_place()
    if starts:
        answer_stops(configs[0].health.notice)
    world = place[1] if place else None
    if starts and world not in (None, 1):
        # Rank 0 reads for all of them, once they have met (`megarl.train.run.session_of`).
        reads = False
    if world is None and not starts and configs[0].parallel.processes is None:
        # Looked at where it does not run.
        world = configs[0].gpus
    # Before CUDA starts, which it does where a GPU is looked at.
    determinism.set_variables(configs[0])
    for one in configs:
        for refusal in admission.refusals(
            one, world, trains=trains, evaluates=evaluates, starts=starts, reads=reads, cluster=cluster
        ):
            raise refusal


def say(sentence: str) -> None:
    """A sentence to the user, once for all processes."""
    place = launcher_place()
    if place is None or place[0] == 0:
        terminal.say(sentence)


def answer_stops(notice: float) -> None:
    """Until the run listens, let a signal that asks for a stop end this process with a sentence and its exit code.

    Heavy imports come first, and by default such a signal would end them without a word. Ahead of a job's time limit
    the code is 2, since a job that is over before it began would be so again.
    """

    place = launcher_place()
    speaks = place is None or place[0] == 0

    def end(number: int, _: object) -> None:
        what, code = "start it again", Interrupted.exit_code
        if time_limit.is_near(notice):
            what = "the time limit is shorter than the start. Fix: submit with a longer --time"
            code = Refusal.exit_code
        if speaks:
            terminal.say(f"stopped at {signal.Signals(number).name}, while it started: {what}")
        os._exit(code)

    for number in stop_signals():
        signal.signal(number, end)


def require_rollouts(config: RunConfig) -> None:
    """Refuse an algorithm that trains on given answers, for a command that generates."""
    if not config.algorithm.generates:
        raise Refusal(
            f"algorithm.name={config.algorithm.name}", "makes no rollouts", "use an algorithm that does, such as grpo"
        )


def launcher_place() -> tuple[int, int] | None:
    """Rank and world size where torchrun, srun or mpirun started this process, else None."""
    if not any(name in os.environ for name in RANK_NAMES):
        return None
    place = find_place(os.environ)
    return (place.rank, place.size) if place else None


def run(worker: Callable[..., T], *args: Any, processes: int | None) -> T | None:
    """Run `worker(*args)` in the world a launcher started, else in that many local processes.

    Returns rank 0's result; None on the other ranks of a launched world.
    """
    place = launcher_place()
    if place is not None:
        result = worker(*args)
        return result if place[0] == 0 else None
    return launch(worker, args, processes or 1)


@contextlib.contextmanager
def reserved_stdout(reserve: bool) -> Iterator[TextIO]:
    """Yield a stream to the real stdout; if `reserve`, everything else that prints there goes to stderr.

    Works on the file descriptor, so that libraries and worker processes that keep their own handle on
    stdout do not spoil a line that another program will parse.
    """
    if not reserve:
        yield sys.stdout
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with terminal.stream(saved) as stream:
            yield stream
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def show(result: Any, stream: TextIO, as_json: bool) -> None:
    """Print a result: one JSON line, or one `key  value` line per entry with nested keys dotted.

    Raises `Refusal` where it cannot be written; a reader that has left does not want it.
    """
    if result is None:
        return
    lines = [json.dumps(result)] if as_json else [_line(key, value) for key, value in _flat(result)]
    print("\n".join(lines), file=stream, flush=True)
    error = terminal.lost(stream)
    if error is not None and error.errno != errno.EPIPE:
        raise Refusal("stdout", f"must take the command's result ({error.strerror})", "send it to a place with room")


def _line(key: str, value: Any) -> str:
    return f"{key:<32} {value:.6g}" if isinstance(value, float) else f"{key:<32} {value}"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix or "result", value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
