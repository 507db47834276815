"""From what was asked for to the scripts of its jobs, with everything checked that can be known on a login node."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megarl.config import files
from megarl.config.cluster import Cluster
from megarl.config.load import load_config
from megarl.config.schema import RunConfig
from megarl.errors import Refusal
from megarl.submission import checks, slurm
from megarl.submission.orders import Order, parse_order
from megarl.submission.resources import Resources
from megarl.submission.script import Template, filled_in, read_template
from megarl.submission.sweep import Sweep
from megarl.train import past

#: What slurm/train.sbatch gives before all other settings, so that a job that starts again goes on.
RESUME = "resume=auto"
#: Sections of a configuration that change nothing of what a GPU must hold.
_WEIGHTLESS = ("name", "seed", "steps", "optimizer", "logging", "reward", "gpus", "reproduces")
#: Those that change nothing of what a run makes of its files.
_CONTENTLESS = (
    "name",
    "seed",
    "steps",
    "optimizer",
    "logging",
    "batch",
    "checkpoint",
    "parallel",
    "gpus",
    "reproduces",
)


@dataclass(frozen=True, slots=True)
class Request:
    """A run to submit. `following`: jobs to run after it, in order; `before`: such jobs ahead of it, and `made` further
    settings of the run, which name what they make. `trains`: the run itself is left to do. `command`: what the user
    typed."""

    config: Path
    overrides: tuple[str, ...]
    resources: Resources
    cluster: Cluster
    sweep: Sweep | None = None
    following: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    trains: bool = True
    command: str = "megarl submit"


@dataclass(frozen=True, slots=True)
class Job:
    """A job that is ready. `kind` is its template's name; `log` is where Slurm writes, with Slurm's placeholders."""

    kind: str
    script: str
    resources: Resources
    log: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """Jobs in the order of their submission, and the folder for their scripts and logs.

    `verdict` is the rehearsal's sentence, None for a run without GPUs.
    """

    jobs: tuple[Job, ...]
    folder: Path
    is_array: bool
    verdict: str | None


def prepare(
    request: Request,
    say: Callable[[str], None],
    contents: Callable[[RunConfig], Iterable[Refusal]],
    *,
    dry: bool,
) -> Prepared:
    """Check everything, what is quick first, and write the scripts in memory.

    `contents` yields what a run cannot use in its files (`megarl.train.admission`, whose libraries are not this
    package's). `say` is told what takes a while, and in a dry run what a submission would be refused for. Raises
    `Refusal` for what cannot run, and `NoAnswer` where Slurm is away and this is no dry run.
    """
    request.resources.check()
    own = [Order("train")] if request.trains else []
    orders = [*map(parse_order, request.before), *own, *map(parse_order, request.following)]
    runs = [load_config(request.config, overrides) for overrides in _overrides(request)]
    # A dry run may be made where the model is not.
    planned = list(map(files.with_known_model, runs)) if dry else runs
    train = read_template("train")
    for run, as_planned in zip(runs, planned, strict=True):
        _raise_first(checks.rule_refusals(as_planned, request.cluster, request.resources))
        _raise_first(checks.history_refusals(run, request.resources.time, _lead(train, request.resources)))
        if (sentence := past.outlook(run)) is not None:
            say(sentence)
    _check_orders(request, orders, runs)
    _check_files(runs, say, contents, dry=dry)
    try:
        known = slurm.partitions()
        request = replace(request, resources=_with_cores(request, known))
        _raise_first(slurm.refusals(request.resources, known, slurm.accounts()))
    except slurm.NoAnswer as away:
        if not dry:
            raise
        say(f"Slurm was not asked whether it takes the job: {away}")
        known = None
    jobs = tuple(_job(request, runs, order) for order in orders)
    for job in jobs if known is not None else ():
        words, waits = slurm.test_only(job.script, job.resources, known or ())
        if dry or waits:
            say(f"sbatch --test-only, {job.kind}: {words}")
    if known is not None and (others := slurm.queued(_name(request))):
        # Of two jobs of one run the later ends at its start; but both may be meant, one to go on where the other stops.
        say(f"in the queue under this run's name already: {', '.join(others)}; a run has one job at a time")
    verdict = _rehearse(runs, request, say) if request.resources.gpus_per_node else None
    return Prepared(jobs, _folder(request), request.sweep is not None, verdict)


def _overrides(request: Request) -> list[list[str]]:
    """The overrides of every run of the request: one, or one for each task of the array."""
    common = [RESUME, *request.overrides]
    if request.sweep is None:
        return [common]
    name = _name(request)
    return [[*common, *request.sweep.overrides(index, name)] for index in range(len(request.sweep.values))]


def _name(request: Request) -> str:
    """The run's name, or what comes before each task's own word."""
    return load_config(request.config, request.overrides).name


def _folder(request: Request) -> Path:
    config = load_config(request.config, request.overrides)
    return Path(config.runs_dir) / config.name / "jobs"


def _lead(template: Template, resources: Resources) -> float:
    """Seconds before the time limit at which the job is told to save."""
    signal = resources.directives().get("signal", template.option("signal") or "")
    match = re.search(r"@(\d+)", signal)
    return float(match[1]) if match else 0.0


def _check_orders(request: Request, orders: Sequence[Order], runs: Iterable[RunConfig]) -> None:
    """Refuse jobs that cannot follow the runs, or whose own settings break a rule."""
    for order in orders:
        order.resources(request.resources)
        own = runs
        if order.overrides:
            own = [load_config(request.config, [*overrides, *order.overrides]) for overrides in _overrides(request)]
        for run in own:
            _raise_first(order.refusals(run, is_array=request.sweep is not None))
            if order.overrides:
                _raise_first(checks.rule_refusals(run, request.cluster, request.resources))


def _check_files(
    runs: Iterable[RunConfig],
    say: Callable[[str], None],
    contents: Callable[[RunConfig], Iterable[Refusal]],
    *,
    dry: bool,
) -> None:
    """Refuse a run whose files are missing or of no use; in a dry run, which may be made elsewhere, only say so."""
    missing: dict[str, Refusal] = {}
    seen: list[RunConfig] = []
    for run in runs:
        found = list(checks.file_refusals(run))
        # The runs of an array mostly have the same files, which take seconds to read.
        if not found and not any(_alike(run, other, _CONTENTLESS) for other in seen):
            seen.append(run)
            found = list(contents(run))
        missing |= {str(refusal): refusal for refusal in found}
    if not dry:
        _raise_first(missing.values())
    for sentence in missing:
        say(f"a submission here would be refused: {sentence}")


def _with_cores(request: Request, known: Sequence[slurm.Partition]) -> Resources:
    """The resources with a GPU's share of a node's cores for each task, where neither is given."""
    asked = request.resources
    if asked.cpus_per_task is not None or not asked.gpus_per_node:
        return asked
    cores = min((one.cores_per_node for one in slurm.chosen(asked, known)), default=0)
    share = cores // max(request.cluster.gpus_per_node, asked.gpus_per_node)
    return replace(asked, cpus_per_task=share) if share else asked


def _rehearse(runs: Iterable[RunConfig], request: Request, say: Callable[[str], None]) -> str:
    """The rehearsal's verdict; of several runs that are not alike, the last one's. Raises `Refusal` for a misfit."""
    rehearsed: list[RunConfig] = []
    verdict = ""
    for run in runs:
        if any(_alike(run, other, _WEIGHTLESS) for other in rehearsed):
            continue
        verdict = checks.rehearsed(run, request.cluster, request.resources, say)
        rehearsed.append(run)
    return verdict


def _alike(run: RunConfig, other: RunConfig, apart_from: Sequence[str]) -> bool:
    """Whether two runs are the same but for some sections."""
    return run.model_copy(update={key: getattr(other, key) for key in apart_from}) == other


def _job(request: Request, runs: Sequence[RunConfig], order: Order) -> Job:
    """One of the request's jobs, with its script."""
    folder, name, is_array = _folder(request), _name(request), request.sweep is not None
    asked = order.resources(request.resources)
    log = f"{order.kind}-{'%A_%a' if is_array else '%j'}.log"
    directives = {"job-name": name if order.kind == "train" else f"{name}-{order.kind}"}
    directives |= {"output": f"{str(folder).replace('%', '%%')}/{log}", **asked.directives()}
    arguments: list[list[str]] = []
    for index, run in enumerate(runs):
        of_task = request.sweep.overrides(index, name) if request.sweep is not None else ()
        made = request.made if order.kind == "train" else ()
        arguments.append(order.arguments([str(request.config), *request.overrides, *of_task, *made], run))
    if is_array:
        directives["array"] = f"0-{len(runs) - 1}"
    lines = filled_in(folder / order.kind, arguments, is_array=is_array)
    script = read_template(order.kind).fill(directives, lines, f"Filled in by: {request.command}")
    return Job(order.kind, script, asked, f"{folder}/{log}")


def _raise_first(refusals: Iterable[Refusal]) -> None:
    for refusal in refusals:
        raise refusal
