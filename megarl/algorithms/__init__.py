"""The algorithms: a plain table from name to class.

To add one: a file here, a row in `ALGORITHMS`, its settings in `megarl.config.algorithms`. One of your own needs no
row: `algorithm.name` may be an import path `package.module:Class` of a subclass of `Algorithm`.
"""

from __future__ import annotations

from megarl.algorithms.attnrl import Attnrl
from megarl.algorithms.base import Algorithm, AlgorithmContext
from megarl.algorithms.bridge import Bridge
from megarl.algorithms.expo import ExpDpo, ExpGrpo
from megarl.algorithms.grpo import Grpo
from megarl.algorithms.nft import Nft
from megarl.algorithms.opd import Opd
from megarl.algorithms.sft import Sft
from megarl.algorithms.start import Start
from megarl.config import user_code
from megarl.config.algorithms import AlgorithmSettings
from megarl.errors import Refusal

ALGORITHMS: dict[str, type[Algorithm]] = {
    "grpo": Grpo,
    "sft": Sft,
    "nft": Nft,
    "exp_grpo": ExpGrpo,
    "exp_dpo": ExpDpo,
    "start": Start,
    "opd": Opd,
    "bridge": Bridge,
    "attnrl": Attnrl,
}


def algorithm_class(name: str) -> type[Algorithm]:
    """The class of a name in `ALGORITHMS`, or of an import path `package.module:Class`.

    Raises:
        Refusal: an unknown name, a path that cannot be imported, or a class that is no `Algorithm`.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    value = f"algorithm.name={name}"
    if not user_code.FORM.fullmatch(name):
        raise Refusal(value, "is no known algorithm", f"use one of {', '.join(ALGORITHMS)}, or package.module:Class")
    try:
        found = user_code.load(name)
    except user_code.Unusable as error:
        raise Refusal(
            value, f"could not be imported ({error})", "install the package, or put its folder on PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise Refusal(value, "must name a subclass of megarl.algorithms.base.Algorithm", "correct the part after ':'")
    if not hasattr(found, "Settings"):
        raise Refusal(value, "has no settings record", "set the class attribute Settings to an AlgorithmSettings class")
    return found


def build(settings: AlgorithmSettings, context: AlgorithmContext) -> Algorithm:
    """The algorithm that `settings.name` names, ready for the loop.

    Raises:
        Refusal: see `algorithm_class`; settings of another algorithm; settings that do not fit the run.
    """
    chosen = algorithm_class(settings.name)
    if not isinstance(settings, chosen.Settings):
        raise Refusal(
            f"algorithm.name={settings.name}",
            f"needs settings of type {chosen.Settings.__name__}, got {type(settings).__name__}",
            "build the settings with megarl.config.algorithms.choice.algorithm_settings",
        )
    return chosen(settings, context)
