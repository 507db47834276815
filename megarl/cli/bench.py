"""`megarl bench step|rollout|reshard CONFIG [key=value ...] [--json]`"""

from __future__ import annotations

import typer

from megarl.cli.start import AsJson, ConfigPath, Overrides, prepare, require_rollouts, reserved_stdout, run, show
from megarl.config.schema import RunConfig
from megarl.errors import Refusal

bench = typer.Typer(help="Measure a run's speed.", no_args_is_help=True)


def _prepared(config: ConfigPath, overrides: Overrides, *, reads: bool = True) -> RunConfig:
    settings = prepare(config, overrides, reads=reads)
    if settings.epochs is not None:
        rule = "says how long a run is, and not how many steps are measured"
        raise Refusal(f"epochs={settings.epochs:g}", rule, "give steps=N epochs=null")
    return settings


@bench.command()
def step(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Seconds and tokens/s of each phase of a step, padding share and peak memory."""
    settings = _prepared(config, overrides)
    with reserved_stdout(as_json) as stream:
        from megarl.train.bench import bench_step as worker

        show(run(worker, settings, processes=settings.parallel.processes), stream, as_json)


@bench.command()
def rollout(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Tokens/s of generation inside the loop beside those of plain vLLM on the same prompts."""
    settings = _prepared(config, overrides)
    require_rollouts(settings)
    with reserved_stdout(as_json) as stream:
        from megarl.train.bench import bench_rollout as worker

        show(run(worker, settings, processes=settings.parallel.processes), stream, as_json)


@bench.command()
def reshard(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """The weight push beside one that gathers every tensor on every rank: seconds, bytes, memory."""
    settings = _prepared(config, overrides, reads=False)
    require_rollouts(settings)
    with reserved_stdout(as_json) as stream:
        from megarl.train.bench_reshard import bench_reshard as worker

        show(run(worker, settings, processes=settings.parallel.processes), stream, as_json)
