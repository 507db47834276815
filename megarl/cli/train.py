"""`megarl train CONFIG [key=value ...]`"""

from __future__ import annotations

from megarl.cli.start import ConfigPath, Overrides, answer_stops, prepare, run


def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the run that CONFIG describes; it leaves its results in runs/<name>/."""
    settings = prepare(config, overrides)
    answer_stops(settings.health.notice)
    from megarl.train.run import train as worker

    run(worker, settings, processes=settings.parallel.processes)
