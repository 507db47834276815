"""`megarl check CONFIG [key=value ...]`"""

from __future__ import annotations

from megarl.cli.start import ConfigPath, Overrides, prepare, say
from megarl.config.load import dump_config
from megarl.train import past


def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Find what would end the run of CONFIG at its start, without starting anything, and print CONFIG resolved.

    Looked at are every rule, the files, the tokenizer, the first rows of the data, the reward functions, and what an
    earlier run of that name has left.
    """
    settings = prepare(config, overrides, trains=True)
    if (sentence := past.outlook(settings)) is not None:
        say(sentence)
    print(dump_config(settings), end="")
