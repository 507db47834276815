"""`megarl train CONFIG [key=value ...]`"""

from __future__ import annotations

from megarl.cli.start import ConfigPath, Overrides, prepare, run, say
from megarl.train import past


def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the run that CONFIG describes; it leaves its results in runs/<name>/."""
    settings = prepare(config, overrides, trains=True, starts=True)
    if (sentence := past.finished(settings)) is not None:
        say(sentence)
        return
    from megarl.train.run import train as worker

    run(worker, settings, processes=settings.parallel.processes)
