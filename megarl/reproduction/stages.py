"""The stages of a row, each judged by what is really there: inputs, conversion, training, evaluation.

Nothing is remembered of a stage but what it leaves: a whole checkpoint, a run that has made its steps, results of the
very weights. So a reproduction that was stopped anywhere goes on there, whoever made the parts that are done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.config.load import load_config
from megarl.config.schema import RunConfig
from megarl.config.suites import read_suites
from megarl.evaluation import plan
from megarl.formats import checkpoint_folder
from megarl.reproduction.commands import Command, megarl_command
from megarl.reproduction.inputs import missing
from megarl.reproduction.rows import Row
from megarl.submission.orders import evaluated
from megarl.train import past

#: Where models are converted to, each once for all rows that begin with it.
CONVERTED = Path("checkpoints")


@dataclass(frozen=True)
class Stage:
    """A stage, what is done of it in words (None: it is to be done), and the commands that do it."""

    name: str
    done: str | None
    commands: tuple[Command, ...]


def inputs_stage(row: Row) -> Stage:
    """Model and data."""
    if is_trained(row):
        return Stage("inputs", "the run has ended", ())
    lacking = missing(row)
    # Several files may come of one command.
    brought = tuple(dict.fromkeys(one.command for one in lacking))
    return Stage("inputs", None if lacking else "model and data are there", brought)


def conversion_stage(row: Row) -> Stage | None:
    """The model as a Megatron checkpoint, which a start of many processes reads sooner; None of a row that begins with
    a run, or with a model that is made here."""
    if not _converts(row):
        return None
    config, out = row.config, converted(row)
    layout = config.parallel
    sizes = {"tensor": layout.tensor, "pipeline": layout.pipeline, "expert": layout.expert}
    options = [word for name, size in sizes.items() if size > 1 for word in (f"--{name}", str(size))]
    if layout.expert_tensor is not None:
        options += ["--expert-tensor", str(layout.expert_tensor)]
    command = Command("convert_hf_to_megatron.py", ("--hf", config.model.path, "--out", str(out), *options))
    done = None
    if is_trained(row):
        done = "the run has ended"
    elif checkpoint_folder.find(out) is not None:
        done = f"{out} is whole"
    return Stage("convert", done, (command,))


def training_stage(row: Row) -> Stage:
    """The run, up to its last step."""
    return Stage("train", past.finished(as_trained(row)), (megarl_command("train", str(row.path), *settings(row)),))


def evaluation_stage(row: Row) -> Stage:
    """The suites, answered by what the run ends with."""
    if not row.about.suites:
        return Stage("evaluate", "no suite is named", ())
    command = megarl_command("evaluate", str(row.path), *evaluation_arguments(row))
    if not is_trained(row):
        return Stage("evaluate", None, (command,))
    done = None if evaluation(row).left else f"results of {', '.join(row.about.suites)} are there"
    return Stage("evaluate", done, (command,))


#: All of them in order, each as it stands when it is asked.
STAGES: tuple[Callable[[Row], Stage | None], ...] = (
    inputs_stage,
    conversion_stage,
    training_stage,
    evaluation_stage,
)


def settings(row: Row) -> list[str]:
    """What the run is given beside its file."""
    found = ["resume=auto"]
    if _converts(row):
        found.append(f"model.weights={converted(row)}")
    if row.config.gpus is not None and row.config.parallel.processes is None:
        found.append(f"parallel.processes={row.config.gpus}")
    return found


def evaluation_arguments(row: Row) -> list[str]:
    """Arguments of `megarl evaluate` behind the file."""
    model, suites = evaluated(row.config), ",".join(row.about.suites)
    processes = [text for text in settings(row) if text.startswith("parallel.")]
    return [f"checkpoint={model}", f"--suite={suites}", *processes, *row.about.suite_settings]


def as_trained(row: Row) -> RunConfig:
    """The row's settings as its run has them."""
    return load_config(row.path, settings(row))


def is_trained(row: Row) -> bool:
    """Whether the run has made all its steps."""
    return past.finished(as_trained(row)) is not None


def evaluation(row: Row) -> plan.Evaluation:
    """What of the suites is answered by the end of the run, which must be there. Raises `Refusal`."""
    overrides = [text for text in evaluation_arguments(row) if not text.startswith(("checkpoint=", "--"))]
    return plan.make(row.path, str(evaluated(row.config)), overrides, read_suites(",".join(row.about.suites)), ())


def results(row: Row) -> dict[str, dict[str, Any]]:
    """What the suites' results.json say, by suite; empty before the evaluation is done."""
    if not row.about.suites or not is_trained(row):
        return {}
    found = evaluation(row)
    return {} if found.left else found.results()


def converted(row: Row) -> Path:
    """The folder of the converted model."""
    return CONVERTED / Path(row.config.model.path).name


def _converts(row: Row) -> bool:
    return row.about.model is not None and row.config.model.weights is None
