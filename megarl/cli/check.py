"""`megarl check CONFIG [key=value ...]`"""

from __future__ import annotations

from megarl.cli.start import ConfigPath, Overrides, prepare
from megarl.config.load import dump_config


def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check CONFIG against every rule without starting anything, and print it resolved."""
    print(dump_config(prepare(config, overrides)), end="")
