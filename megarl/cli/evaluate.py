"""`megarl evaluate TARGET [key=value ...] [checkpoint=DIR] [--suite NAME[,NAME]|FILE] [--pass-at K[,K]] [--json]`"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megarl.cli.start import AsJson, Overrides, admit, prepare, reserved_stdout, run, show
from megarl.config.implied import Implied
from megarl.config.load import load_config
from megarl.config.suites import known_suites, read_suites
from megarl.errors import Refusal

_CHECKPOINT = "checkpoint="

Target = Annotated[
    Path,
    typer.Argument(
        metavar="TARGET",
        help="A run's YAML file; with --suite also a checkpoint, a run's folder, or a Hugging Face folder.",
        show_default=False,
    ),
]
Suites = Annotated[
    str | None,
    typer.Option("--suite", metavar="NAME[,NAME]|FILE", help="Benchmarks of configs/suites/, or of a file like these."),
]
PassAt = Annotated[
    str | None, typer.Option("--pass-at", metavar="K[,K]", help="The k of pass@k; default: the suite's, or all powers.")
]


def evaluate(
    target: Target,
    overrides: Overrides = None,
    suite: Suites = None,
    pass_at: PassAt = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model: on a run's evaluation data, or with --suite on benchmarks, at avg@k, pass@k and maj@k."""
    given = overrides or []
    checkpoints = [text.removeprefix(_CHECKPOINT) for text in given if text.startswith(_CHECKPOINT)]
    checkpoint = os.path.expanduser(checkpoints[-1]) if checkpoints else None
    if checkpoint is not None and not Path(checkpoint).is_dir():
        fix = "give a megarl checkpoint, or a run's checkpoints/ folder"
        raise Refusal(f"checkpoint={checkpoint}", "is not a directory", fix)
    settings_given = [text for text in given if not text.startswith(_CHECKPOINT)]
    if suite is not None:
        _on_suites(target, checkpoint, settings_given, suite, pass_at, as_json)
        return
    if target.expanduser().is_dir():
        fix = f"add --suite NAME, one of {', '.join(known_suites())}"
        raise Refusal(str(target), "is a folder, which names no evaluation data", fix)
    if pass_at is not None:
        raise Refusal(f"--pass-at {pass_at}", "is for suites", "add --suite NAME, or remove it")
    _on_its_data(target, checkpoint, settings_given, as_json)


def _on_its_data(path: Path, checkpoint: str | None, given: list[str], as_json: bool) -> None:
    """The evaluation that a run's file describes."""
    loaded = load_config(path, given)
    if checkpoint is not None and not Implied(loaded, evaluates_alone=True).keeps_start:
        # Known before the rules are checked: model.path then needs no weights, which else are the consumer's.
        given = [*given, f"model.weights={checkpoint}"]
    settings = prepare(path, given, evaluates=True, starts=True)
    with reserved_stdout(as_json) as stream:
        from megarl.train.run import evaluate as worker

        show(run(worker, settings, checkpoint, processes=settings.parallel.processes), stream, as_json)


def _on_suites(
    target: Path, checkpoint: str | None, given: list[str], names: str, pass_at: str | None, as_json: bool
) -> None:
    from megarl.evaluation import plan
    from megarl.evaluation.scores import print_scores

    evaluation = plan.make(target, checkpoint, given, read_suites(names), plan.whole_numbers(pass_at))
    with reserved_stdout(as_json) as stream:
        if evaluation.left:
            admit(evaluation.configs, evaluates=True, starts=True)
            from megarl.evaluation.suite import evaluate as worker

            run(worker, evaluation.left, processes=evaluation.configs[0].parallel.processes)
        results = evaluation.results()
        if as_json:
            print(json.dumps(results), file=stream, flush=True)
            return
        for one in results.values():
            console = Console(file=stream, highlight=False)
            # A file has no width.
            print_scores(console if console.is_terminal else Console(file=stream, highlight=False, width=160), one)
        for folder in evaluation.folders:
            print(f"answers and results.json: {folder}", file=stream)
