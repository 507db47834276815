"""`megarl check CONFIG [key=value ...]`"""

from __future__ import annotations

from typing import Annotated

import typer

from megarl.cli.start import ConfigPath, Overrides, prepare, say
from megarl.config.cluster import read_cluster
from megarl.config.load import dump_config
from megarl.train import past

ForCluster = Annotated[
    str | None,
    typer.Option("--cluster", help="Whose GPUs it is for, as in `megarl plan`; default: this machine's, or the CPU."),
]


def check(config: ConfigPath, overrides: Overrides = None, cluster: ForCluster = None) -> None:
    """Find what would end the run of CONFIG at its start, without starting anything, and print CONFIG resolved.

    Looked at are every rule, those of the GPUs among them, the files, the tokenizer, the first rows of the data, the
    reward functions, and what an earlier run of that name has left.
    """
    machines = None if cluster is None else read_cluster(cluster)
    settings = prepare(config, overrides, trains=True, cluster=machines)
    if (sentence := past.outlook(settings)) is not None:
        say(sentence)
    print(dump_config(settings), end="")
