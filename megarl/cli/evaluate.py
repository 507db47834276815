"""`megarl evaluate CONFIG [checkpoint=DIR] [key=value ...] [--json]`"""

from __future__ import annotations

import os
from pathlib import Path

from megarl.cli.start import AsJson, ConfigPath, Overrides, prepare, reserved_stdout, run, show
from megarl.config.implied import Implied
from megarl.config.load import load_config
from megarl.errors import Refusal

_CHECKPOINT = "checkpoint="


def evaluate(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Evaluate the model of CONFIG, or of checkpoint=DIR, on the evaluation data: accuracy and avg@k."""
    given = overrides or []
    checkpoints = [text.removeprefix(_CHECKPOINT) for text in given if text.startswith(_CHECKPOINT)]
    checkpoint = os.path.expanduser(checkpoints[-1]) if checkpoints else None
    if checkpoint is not None and not Path(checkpoint).is_dir():
        fix = "give a megarl checkpoint, or a run's checkpoints/ folder"
        raise Refusal(f"checkpoint={checkpoint}", "is not a directory", fix)
    settings_given = [text for text in given if not text.startswith(_CHECKPOINT)]
    loaded = load_config(config, settings_given)
    if checkpoint is not None and not Implied(loaded, evaluates_alone=True).keeps_start:
        # Known before the rules are checked: model.path then needs no weights, which else are the consumer's.
        settings_given.append(f"model.weights={checkpoint}")
    settings = prepare(config, settings_given, evaluates=True, starts=True)
    with reserved_stdout(as_json) as stream:
        from megarl.train.run import evaluate as worker

        show(run(worker, settings, checkpoint, processes=settings.parallel.processes), stream, as_json)
