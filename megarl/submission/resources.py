"""What a job asks Slurm for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from megarl.errors import Refusal

#: Slurm's forms of a time limit: minutes, minutes:seconds, hours:minutes:seconds, and days before hours.
_TIME = re.compile(r"(?:(?P<days>\d+)-(?P<of_day>\d+(?::\d+){0,2})|(?P<plain>\d+(?::\d+){0,2}))")
_TIME_FIX = "write minutes, hours:minutes:seconds or days-hours, such as 90, 4:00:00 or 2-00"
#: Options of sbatch that are decided elsewhere, and how to change what they say.
_OWN = {
    "nodes": "use --nodes",
    "ntasks": "use --nodes and --tasks-per-node",
    "ntasks-per-node": "use --tasks-per-node",
    "cpus-per-task": "use --cpus-per-task",
    "gpus-per-node": "use --gpus-per-node",
    "gpus": "use --gpus-per-node",
    "gpus-per-task": "use --gpus-per-node",
    "gres": "use --gpus-per-node",
    "chdir": "submit from that folder",
    "time": "use --time",
    "partition": "use --partition",
    "account": "use --account",
    "array": "use --array",
    "dependency": "use --then",
    "job-name": "set the run's name",
    "output": "remove it; logs lie in the run's folder",
    "parsable": "remove it",
    "test-only": "use --dry-run",
}


@dataclass(frozen=True, slots=True)
class Resources:
    """Nodes, tasks (processes of megarl), their cores and GPUs, where and for how long.

    `time` in one of Slurm's forms; None of it, `cpus_per_task`, `partition` and `account` leaves the choice to the
    cluster. `others` are further options of sbatch, `--key=value` or `--key`.
    """

    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    others: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        """Processes of the run."""
        return self.nodes * self.tasks_per_node

    @property
    def of_a_node(self) -> str:
        """Tasks and GPUs of a node in words."""
        gpus = f" and {self.gpus_per_node} GPUs" if self.gpus_per_node else ""
        return f"{self.tasks_per_node} task{'s' * (self.tasks_per_node > 1)}{gpus}"

    def check(self) -> None:
        """Raise the first thing that no cluster could give as a `Refusal`."""
        for refusal in self._refusals():
            raise refusal

    def _refusals(self) -> Iterator[Refusal]:
        tasks, gpus = self.tasks_per_node, self.gpus_per_node
        if self.nodes < 1:
            yield Refusal(f"--nodes {self.nodes}", "must be at least 1", "give the number of nodes of the run")
        if gpus < 0:
            yield Refusal(f"--gpus-per-node {gpus}", "must not be negative", "use 0 for a job on CPUs")
        if tasks < 1:
            yield Refusal(f"--tasks-per-node {tasks}", "must be at least 1", "leave it out for one task per GPU")
        if gpus and tasks != gpus:
            yield Refusal(
                f"--tasks-per-node {tasks} with --gpus-per-node {gpus}",
                "must be one task per GPU",
                "give --gpus-per-node alone",
            )
        if self.cpus_per_task is not None and self.cpus_per_task < 1:
            yield Refusal(f"--cpus-per-task {self.cpus_per_task}", "must be at least 1", "give the cores of a process")
        if self.time is not None:
            seconds_of(self.time)
        for option in self.others:
            yield from _other(option)

    def directives(self) -> dict[str, str]:
        """The options for a script's #SBATCH lines, by name."""
        asked = {"nodes": str(self.nodes), "ntasks-per-node": str(self.tasks_per_node)}
        if self.cpus_per_task is not None:
            asked["cpus-per-task"] = str(self.cpus_per_task)
        if self.gpus_per_node:
            asked["gpus-per-node"] = str(self.gpus_per_node)
        for name in ("time", "partition", "account"):
            if (value := getattr(self, name)) is not None:
                asked[name] = value
        for option in self.others:
            name, _, value = option.removeprefix("--").partition("=")
            asked[name] = value
        return asked


def nodes_for(gpus: int | None, gpus_per_node: int) -> tuple[int, int]:
    """Nodes, and GPUs of each, of a run on `gpus` GPUs: whole nodes, or a part of one.

    Raises `Refusal` where the run says no number, or one that leaves a node's GPUs over.

    >>> nodes_for(24, 8), nodes_for(4, 8)
    ((3, 8), (1, 4))
    """
    if gpus is None or not gpus_per_node:
        what = "a run on CPUs does not say it" if not gpus_per_node else "the configuration has no gpus that say it"
        raise Refusal("--nodes", f"must be known, and {what}", "give --nodes N")
    if gpus <= gpus_per_node:
        return 1, gpus
    if gpus % gpus_per_node:
        rule = f"does not fill nodes of {gpus_per_node} GPUs"
        raise Refusal(f"gpus={gpus}", rule, "give --nodes, with --gpus-per-node where a node's are not all used")
    return gpus // gpus_per_node, gpus_per_node


def seconds_of(time: str) -> float:
    """A time limit in seconds; infinite where there is none. Raises `Refusal` where Slurm would not read it."""
    if time.lower() in ("unlimited", "infinite"):
        return float("inf")
    match = _TIME.fullmatch(time)
    if match is None:
        raise Refusal(f"--time {time}", "is not a time limit that Slurm knows", _TIME_FIX)
    if match["days"] is not None:
        parts = [int(part) for part in match["of_day"].split(":")]
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        total = ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    else:
        parts = [int(part) for part in match["plain"].split(":")]
        hours, minutes, seconds = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
        total = (hours * 60 + minutes) * 60 + seconds
    if total == 0:
        raise Refusal(f"--time {time}", "must be more than nothing", _TIME_FIX)
    return float(total)


def shown_time(seconds: float) -> str:
    """Seconds as a time limit in Slurm's form, up to the next minute.

    >>> shown_time(3601), shown_time(90000)
    ('1:01:00', '1-01:00:00')
    """
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02d}:{minutes:02d}:00" if days else f"{hours}:{minutes:02d}:00"


def _other(option: str) -> Iterator[Refusal]:
    name = option.removeprefix("--").partition("=")[0]
    if not re.fullmatch(r"--[a-z][a-z-]*(=[^\n]+)?", option):
        yield Refusal(f"--sbatch {option}", "must be one long option of sbatch", "write it as --sbatch=--qos=high")
    elif name in _OWN:
        yield Refusal(f"--sbatch {option}", "is decided by megarl submit", _OWN[name])
    elif name == "signal" and "B:" in option:
        rule = "would go to the job's script, and not to the tasks, which save"
        yield Refusal(f"--sbatch {option}", rule, "leave B: away")
