"""`rehearse`: a run's rules and its rehearsal, from a process that stays free of torch.

The shards are built in a process of their own: Megatron's globals, a fake world and its platform without CUDA must not
meet a caller's real ones.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import megarl
from megarl.config import files, gpu_rules, rules
from megarl.config.cluster import Cluster
from megarl.config.model_shape import read_model_shape
from megarl.config.schema import RunConfig
from megarl.errors import MegarlError, Refusal
from megarl.rehearsal.report import Report

#: Variables by which a launcher, or a GPU, would be found.
_HIDDEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rehearse(
    config: RunConfig, cluster: Cluster, processes: int | None = None, status: Callable[[str], None] = lambda _: None
) -> Report:
    """Rehearse `config` on `processes` GPUs (default: parallel.processes, or gpus) of `cluster`.

    `status` is told what takes a while, in a sentence.

    Everything is checked that a start checks and that needs no file but the model's config.json; what is missing on
    this machine's disk is among the report's notes, since a plan may be made elsewhere. Raises `Refusal` for the first
    rule that is broken, and where the number of GPUs is not known.
    """
    given, (config, world) = config, checked(config, cluster, processes)
    shape = read_model_shape(config.model.path)
    status(f"building the shards of {config.parallel.pipeline} pipeline stage(s), without memory")
    report = _in_a_process_of_its_own(config, shape, cluster, world)
    missing = tuple(f"a start here would be refused: {refusal}" for refusal in files.refusals(given))
    return replace(report, notes=(*report.notes, *missing))


def schedule(config: RunConfig, cluster: Cluster, processes: int | None, rank: int) -> Iterator[str]:
    """The lines of a rank's schedule of a weight push. Raises `Refusal` as `rehearse` does, and for no such rank."""
    config, world = checked(config, cluster, processes)
    if not 0 <= rank < world:
        raise Refusal(f"--schedule {rank}", f"must be a rank of the {world} GPUs", f"give 0 to {world - 1}")
    # Brings torch in.
    from megarl.rehearsal.push import push_plan_of

    return push_plan_of(config, read_model_shape(config.model.path), cluster, world, rank).lines()


def checked(config: RunConfig, cluster: Cluster, processes: int | None) -> tuple[RunConfig, int]:
    """The configuration as it is planned, with its number of GPUs, and that number.

    Raises `Refusal` for what cannot run.
    """
    world = processes or config.parallel.processes or config.gpus
    if world is None:
        raise Refusal("gpus", "must be known to plan a run", "give --gpus N, or set gpus")
    parallel = config.parallel.model_copy(update={"processes": world})
    config = files.with_known_model(config).model_copy(update={"gpus": world, "parallel": parallel})
    for refusal in rules.broken_setting_rules(config, processes=world):
        raise refusal
    for refusal in gpu_rules.refusals(config, read_model_shape(config.model.path), cluster.capability):
        raise refusal
    return config, world


def _in_a_process_of_its_own(*arguments: object) -> Report:
    root = str(Path(megarl.__file__).parents[1])
    environment = {name: value for name, value in os.environ.items() if name not in _HIDDEN}
    paths = [root, *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "report"
        command = [sys.executable, "-P", "-m", "megarl.rehearsal.child", str(answer)]
        ended = subprocess.run(
            command,
            input=pickle.dumps((sys.path, pickle.dumps(arguments))),
            stdout=sys.stderr.fileno(),
            env=environment,
            check=False,
        )
        if not answer.is_file():
            raise MegarlError(f"the rehearsal's process ended with code {ended.returncode}; its error is above")
        found = pickle.loads(answer.read_bytes())
    if isinstance(found, MegarlError):
        raise found
    return found
