"""What Slurm is asked, by its own commands, and its answers in our words."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megarl.config.wording import listed
from megarl.errors import MegarlError, Refusal
from megarl.submission.resources import Resources, seconds_of, shown_time

#: Seconds that a command of Slurm may take; a controller that is away is asked again by the commands themselves.
_PATIENCE = 90.0
_FIX = "Fix: see whether Slurm's controller runs (scontrol ping)."
_AWAY = (
    "configuration source",
    "Unable to process configuration file",
    "Unable to contact slurm controller",
    "Unable to establish control",
    "Socket timed out",
    "Zero Bytes were transmitted",
)
#: The environment variable of sbatch that overrules an option of a script, where it is not SBATCH_ and its name.
_VARIABLES = {"time": "SBATCH_TIMELIMIT", "array": "SBATCH_ARRAY_INX", "job-name": "SBATCH_JOB_NAME"}


class NoAnswer(MegarlError):
    """Slurm is not on this machine, or does not answer; the message says which."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition of the cluster; `limit` is the longest time of a job in seconds, `cores_per_node` a mean."""

    name: str
    is_default: bool
    limit: float
    nodes: int
    cores_per_node: int


def partitions() -> list[Partition]:
    """All partitions. Raises `NoAnswer`."""
    # `sinfo` counts no node that is powered down until a job needs it.
    answer = _ask(["scontrol", "--all", "--oneliner", "show", "partition"])
    found: list[Partition] = []
    for line in answer.stdout.splitlines():
        facts = dict(fact.split("=", 1) for fact in line.split() if "=" in fact)
        if "PartitionName" in facts:
            limit, nodes = seconds_of(facts.get("MaxTime", "UNLIMITED")), int(facts.get("TotalNodes", "0"))
            cores = int(facts.get("TotalCPUs", "0")) // max(nodes, 1)
            found.append(Partition(facts["PartitionName"], facts.get("Default") == "YES", limit, nodes, cores))
    return found


def accounts() -> set[str]:
    """The accounts that this user may charge, empty where the cluster keeps none or does not say."""
    whose = f"user={getpass.getuser()}"
    command = ["sacctmgr", "--noheader", "--parsable2", "show", "associations", whose, "format=account"]
    try:
        answer = _ask(command)
    except NoAnswer:
        # Accounting is a service of its own, and sbatch knows better.
        return set()
    return set(answer.stdout.split()) if answer.returncode == 0 else set()


def chosen(resources: Resources, known: Sequence[Partition]) -> list[Partition]:
    """Those of the partitions `known` that the job may come to run in: Slurm takes the first that can run it."""
    asked = _asked(resources)
    return [one for one in known if (one.name in asked if asked else one.is_default)]


def refusals(resources: Resources, known: Sequence[Partition], charged: set[str]) -> Iterator[Refusal]:
    """What the partitions `known` and the accounts `charged` (empty: not known) cannot give."""
    asked, there = _asked(resources), chosen(resources, known)
    names = [one.name for one in known]
    for name in asked if known else ():
        if name not in names:
            yield Refusal(f"--partition {name}", "is no partition of this cluster", f"use {listed(names)}")
    if known and not asked and not there:
        yield Refusal("--partition", "must be given, as this cluster has no default", f"use {listed(names)}")
    if not there:
        return
    where = listed([one.name for one in there])
    if resources.nodes > (most := max(one.nodes for one in there)):
        yield Refusal(
            f"--nodes {resources.nodes}",
            f"is more than the {most} of partition {where}",
            "use fewer nodes, or another partition",
        )
    if resources.time is not None and seconds_of(resources.time) > (limit := max(one.limit for one in there)):
        yield Refusal(
            f"--time {resources.time}",
            f"is over the limit of partition {where}, {shown_time(limit)}",
            "use a shorter time (a run that is cut goes on with resume=auto), or another partition",
        )
    if charged and resources.account is not None and resources.account not in charged:
        yield Refusal(f"--account {resources.account}", "is not one of yours", f"use {listed(sorted(charged))}")


def queued(name: str) -> list[str]:
    """This user's jobs of a name that wait or run. Raises `NoAnswer`."""
    answer = _ask(["squeue", f"--user={getpass.getuser()}", "--noheader", f"--name={name}", "--format=%A"])
    return list(dict.fromkeys(answer.stdout.split()))


def test_only(script: str, resources: Resources, known: Sequence[Partition]) -> tuple[str, bool]:
    """What Slurm would do with the script, in its words, and whether the job waits for nodes that are away.

    `known` are the partitions.

    Raises `Refusal` where it would not take it, `NoAnswer` where it cannot be asked.
    """
    answer = _ask(["sbatch", "--test-only"], script, _environment(script))
    words = _words(answer.stderr)
    if not answer.returncode:
        return words, False
    if re.search("node configuration is not available|node not available", words):
        # Slurm asks here what can start with the nodes that are up; it takes a job that waits for the others.
        for one in chosen(resources, known):
            away = _away(one)
            if one.nodes - away < resources.nodes <= one.nodes:
                return f"waits for nodes, of which {away} are down or drained ({words})", True
    raise explained(words, resources)


def _away(partition: Partition) -> int:
    """How many of a partition's nodes no job can have now."""
    states = "--states=down,drain,fail,maint"
    answer = _ask(["sinfo", "--noheader", f"--partition={partition.name}", states, "--format=%D"])
    return sum(int(count) for count in answer.stdout.split() if count.isdigit())


def submit(path: Path, resources: Resources, dependency: str | None = None) -> str:
    """Hand the script to Slurm and return the job's number. Raises `Refusal` or `NoAnswer`.

    `dependency` as sbatch takes it, such as `afterok:17`.
    """
    command = ["sbatch", "--parsable"]
    if dependency is not None:
        # A job whose predecessor failed is removed instead of waiting for ever.
        command += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
    answer = _ask([*command, str(path)], environment=_environment(path.read_text(encoding="utf-8")))
    if answer.returncode:
        raise explained(_words(answer.stderr), resources)
    # With several clusters: number;cluster.
    return answer.stdout.strip().split(";")[0]


def explained(words: str, resources: Resources) -> Refusal:
    """What sbatch refused a job for, in our words; its own where we have none."""
    nodes = f"--nodes {resources.nodes}"
    where = f"partition {resources.partition}" if resources.partition else "the default partition"
    of_partition = f"--partition {resources.partition}" if resources.partition else "--partition"
    of_account = f"--account {resources.account}" if resources.account else "--account"
    of_time = f"--time {resources.time}" if resources.time else "--time"
    shape = f"{nodes} with {resources.of_a_node} each"
    look = "lower what is asked of a node, or use another partition (sinfo -o '%P %D %c %G' shows nodes, cores, GPUs)"
    table = {
        r"invalid partition": (of_partition, "is no partition of this cluster", "use one that sinfo lists"),
        r"No partition specified": (
            of_partition,
            "must be given, as this cluster has no default",
            "use one of sinfo's",
        ),
        r"Invalid account or account/partition": (
            of_account,
            f"is not an account of yours, or not one for {where}",
            "use one that `sacctmgr show associations user=$USER` lists",
        ),
        r"More processors requested than permitted": (shape, f"is more cores than {where} permits", look),
        r"Requested node configuration is not available": (shape, f"is more than {where} has", look),
        r"Node count specification invalid|Invalid node count": (
            nodes,
            f"is not a number of nodes that {where} permits",
            "use another number of nodes",
        ),
        r"Requested time limit is invalid|Time limit specification required": (
            of_time,
            f"is missing, or over the limit of {where}",
            "give a shorter --time (sinfo -o '%P %l' shows the limits)",
        ),
        r"Invalid qos": ("--sbatch=--qos", "is not one that you may use", "use one that `sacctmgr show qos` lists"),
        r"Invalid generic resource": (
            f"--gpus-per-node {resources.gpus_per_node}",
            "is a resource that this cluster does not know",
            "use a partition with GPUs, or --gpus-per-node 0",
        ),
        r"Invalid job array": ("--array", "has more tasks than this cluster permits", "submit it in parts"),
        r"not permitted to use this partition": (of_partition, "is not for your group", "use another partition"),
        r"violates accounting/QOS policy": (
            shape,
            "is more than your account or its quality of service permits at once",
            "lower the nodes or the time, or wait until other jobs of yours have ended",
        ),
    }
    for pattern, parts in table.items():
        if re.search(pattern, words, re.IGNORECASE):
            return Refusal(*parts)
    return Refusal("the job", f"is refused by Slurm: {words}", "correct what it names")


def _asked(resources: Resources) -> list[str]:
    """The partitions that were named, by option or by sbatch's variable."""
    named = resources.partition or os.environ.get("SBATCH_PARTITION")
    return named.split(",") if named else []


def _environment(script: str) -> dict[str, str]:
    """This process's, without the variables by which sbatch would overrule the script's own lines."""
    names = re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE)
    overruled = {_VARIABLES.get(name, f"SBATCH_{name.upper().replace('-', '_')}") for name in names}
    return {name: value for name, value in os.environ.items() if name not in overruled}


def _ask(
    command: list[str], script: str | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The answer of a command of Slurm. Raises `NoAnswer` where there is none."""
    if missing := [name for name in ("sbatch", command[0]) if shutil.which(name) is None]:
        raise NoAnswer(f"{missing[0]}: is not on this machine. Fix: submit on a login node of a cluster with Slurm.")
    try:
        answer = subprocess.run(
            command,
            input=script,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{command[0]}: did not answer in {_PATIENCE:.0f} s. {_FIX}") from None
    if answer.returncode and any(sign in answer.stderr for sign in _AWAY):
        why = _words(answer.stderr.strip().splitlines()[-1])
        raise NoAnswer(f"{command[0]}: cannot reach Slurm ({why}). {_FIX}")
    return answer


def _words(stderr: str) -> str:
    """What Slurm said, without the names of its programs. A cluster's own rules may take several lines."""
    lines = [
        re.sub(r"^(?:\w+: )?(?:[\w ]*(?:error|fatal|failure): )?", "", line.strip()) for line in stderr.splitlines()
    ]
    return "; ".join(filter(None, lines)) or "it gave no reason"
