"""Numbers that others say through the environment: read as such, or named. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping

from megarl.errors import Refusal


def whole_number(environment: Mapping[str, str], name: str, default: str = "0") -> int:
    """The number in a variable. Raises `Refusal`, naming it, where there is something else."""
    text = environment.get(name, default)
    if re.fullmatch(r"-?[0-9]{1,9}", text) is None:
        raise Refusal(
            f"{name}={text} in the environment",
            "must be a whole number",
            f"unset {name}, or let what sets it (torchrun, srun, mpirun, a profile) set it right",
        )
    return int(text)
