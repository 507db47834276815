"""Settings of the built-in algorithms, one file each; the algorithms themselves live in `megarl.algorithms`.

Torch-free, so that a wrong setting is refused on a login node at once.
"""

from megarl.config.algorithms.attnrl import AttnrlSettings
from megarl.config.algorithms.base import AlgorithmSettings, ExplanationSettings
from megarl.config.algorithms.bridge import BridgeSettings
from megarl.config.algorithms.expo import ExpDpoSettings, ExpGrpoSettings
from megarl.config.algorithms.grpo import ClippedSettings, GroupRelativeSettings, GrpoSettings
from megarl.config.algorithms.nft import NftSettings
from megarl.config.algorithms.opd import OpdSettings
from megarl.config.algorithms.sft import SftSettings
from megarl.config.algorithms.start import StartSettings

#: Built-in settings by algorithm name; `megarl.algorithms.ALGORITHMS` has the same keys.
ALGORITHM_SETTINGS: dict[str, type[AlgorithmSettings]] = {
    "grpo": GrpoSettings,
    "sft": SftSettings,
    "nft": NftSettings,
    "exp_grpo": ExpGrpoSettings,
    "exp_dpo": ExpDpoSettings,
    "start": StartSettings,
    "opd": OpdSettings,
    "bridge": BridgeSettings,
    "attnrl": AttnrlSettings,
}

__all__ = [
    "ALGORITHM_SETTINGS",
    "AlgorithmSettings",
    "AttnrlSettings",
    "BridgeSettings",
    "ClippedSettings",
    "ExpDpoSettings",
    "ExpGrpoSettings",
    "ExplanationSettings",
    "GroupRelativeSettings",
    "GrpoSettings",
    "NftSettings",
    "OpdSettings",
    "SftSettings",
    "StartSettings",
]
