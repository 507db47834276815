"""The jobs that a submission may have, in the order train, then what follows it: their arguments and own rules."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megarl.config.implied import Implied
from megarl.config.schema import RunConfig
from megarl.errors import Refusal
from megarl.submission.resources import Resources

_FIX = "use --then evaluate or --then convert, with arguments as in --then 'evaluate evaluation.path=FILE'"


#: Options of sbatch that an order may have for itself, in the place of the run's.
_OF_ORDERS = ("partition", "account", "time", "cpus-per-task")
#: Further options that are about nodes with GPUs, whole ones, or a run that saves: not for one task that converts.
_OF_NODES = r"exclusive|mem(-.*)?|gpu.*|tres.*|ntasks.*|constraint|nodelist|exclude|switches|signal"
_SBATCH = "--sbatch="


@dataclass(frozen=True, slots=True)
class Order:
    """A job of template slurm/`kind`.sbatch, and the arguments and options of sbatch that were given for it alone."""

    kind: str
    more: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def resources(self, asked: Resources) -> Resources:
        """What the job takes of what was asked for, but for its own options. Raises `Refusal` for a wrong one.

        A conversion has one task without GPUs, and of the run's further options those that are not about nodes; an
        evaluation no signal, as it has nothing to save.
        """
        left_out = "signal"
        if self.kind == "convert":
            asked, left_out = replace(asked, nodes=1, tasks_per_node=1, gpus_per_node=0, cpus_per_task=None), _OF_NODES
        others = [one for one in asked.others if self.kind == "train" or not re.fullmatch(left_out, _name_of(one))]
        given: dict[str, Any] = {}
        for option in self.options:
            name, value = _name_of(option), option.partition("=")[2]
            if name not in _OF_ORDERS:
                others.append(option)
            elif name == "cpus-per-task":
                given["cpus_per_task"] = int(value) if value.isdigit() else 0
            else:
                given[name] = value
        found = replace(asked, **given, others=tuple(others))
        found.check()
        return found

    def arguments(self, settings: Sequence[str], run: RunConfig) -> list[str]:
        """The script's arguments for `run`, which CONFIG and overrides in `settings` describe."""
        folder = str(Path(run.runs_dir) / run.name)
        if self.kind == "convert" and self.is_of_a_model:
            return list(self.more)
        if self.kind == "convert":
            return ["--megatron", folder, "--out", f"{folder}/hf", *self.more]
        if self.kind == "evaluate" and self.suites:
            # Settings of the training would take the place of the suites'.
            of_run = [f"name={run.name}", f"runs_dir={run.runs_dir}"]
            return [settings[0], *of_run, f"checkpoint={evaluated(run)}", *self.more]
        if self.kind == "evaluate":
            return [*settings, f"checkpoint={folder}", *self.more]
        return list(settings)

    @property
    def suites(self) -> bool:
        """Whether an evaluation is of suites, whose problems and settings are their own."""
        return any(word == "--suite" or word.startswith("--suite=") for word in self.more)

    @property
    def is_of_a_model(self) -> bool:
        """Whether a conversion is of Hugging Face's files, not of what the run leaves."""
        return any(word == "--hf" or word.startswith("--hf=") for word in self.more)

    @property
    def overrides(self) -> list[str]:
        """Those of its own arguments that replace settings of the run."""
        if self.kind != "evaluate" or self.suites:
            return []
        return [text for text in self.more if not text.startswith(("--", "checkpoint="))]

    def refusals(self, run: RunConfig, *, is_array: bool) -> Iterator[Refusal]:
        """What keeps the job from following `run`, which has the job's own settings."""
        if self.kind == "train" or (self.kind == "convert" and self.is_of_a_model):
            return
        text = f"--then {shlex.join([self.kind, *self.more])}"
        if not run.checkpoint.end and not run.checkpoint.every:
            rule = "needs a checkpoint, which checkpoint.every=0 with checkpoint.end=false never saves"
            yield Refusal(text, rule, "set checkpoint.end=true")
        if self.kind == "evaluate" and self.suites and not run.checkpoint.export_hf and evaluated(run).name == "hf":
            rule = "needs the base with its adapter merged, which checkpoint.export_hf=false does not write"
            yield Refusal(text, rule, "set checkpoint.export_hf=true")
        own_data = self.kind == "evaluate" and not self.suites
        if own_data and not run.evaluation.names_files and run.evaluation.rows is None:
            rule = "would answer all of data.path, which the run learns from, as evaluation.path names nothing else"
            yield Refusal(text, rule, "add evaluation.path=FILE, or evaluation.rows=N if that is meant")
        if self.kind != "convert":
            return
        elsewhere = any(word == "--out" or word.startswith("--out=") for word in self.more)
        if elsewhere and is_array:
            rule = "gives the runs of the array one folder"
            yield Refusal(text, rule, "leave --out away: each is converted to hf/ in its own run's folder")
        if run.checkpoint.export_hf and not elsewhere:
            rule = "would write the folder hf/ that checkpoint.export_hf=true writes already"
            yield Refusal(text, rule, "leave one of the two away")


def evaluated(run: RunConfig) -> Path:
    """What suites ask of the end of a run: its folder, or its merged export where an adapter trains beside the base."""
    folder = Path(run.runs_dir) / run.name
    return folder / "hf" if Implied(run).adapter_optimizer is not None else folder


def _name_of(option: str) -> str:
    return option.removeprefix("--").partition("=")[0]


def parse_order(text: str) -> Order:
    """Read `evaluate` or `convert` with arguments as a shell would; `--sbatch=--key=value` is for Slurm.

    Raises `Refusal` for anything else.
    """
    try:
        kind, *more = shlex.split(text) or [""]
    except ValueError:
        raise Refusal(f"--then {text}", "has a quote that does not end", _FIX) from None
    if kind not in ("evaluate", "convert"):
        raise Refusal(f"--then {text}", "is no job that can follow", _FIX)
    options = tuple(word.removeprefix(_SBATCH) for word in more if word.startswith(_SBATCH))
    return Order(kind, tuple(word for word in more if not word.startswith(_SBATCH)), options)
