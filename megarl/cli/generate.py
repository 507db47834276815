"""`megarl generate CONFIG [key=value ...]`"""

from __future__ import annotations

import sys

from megarl.cli.start import ConfigPath, Overrides, prepare, require_rollouts, run, show


def generate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Generate and score the rollouts of every step without training on them, and save them."""
    settings = prepare(config, overrides, starts=True)
    require_rollouts(settings)
    from megarl.train.run import generate as worker

    show(run(worker, settings, processes=settings.parallel.processes), sys.stdout, as_json=False)
