"""`megarl check CONFIG [key=value ...]`"""

from __future__ import annotations

from megarl.cli.start import ConfigPath, Overrides, prepare, say
from megarl.config.load import dump_config
from megarl.train import past


def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check CONFIG against every rule without starting anything, and print it resolved."""
    settings = prepare(config, overrides, trains=True)
    if (sentence := past.finished(settings)) is not None:
        say(sentence)
    print(dump_config(settings), end="")
