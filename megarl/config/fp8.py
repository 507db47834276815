"""The `precision:` setting and the `fp8:` section of a run's file. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from megarl.config.base import Settings

#: What the policy computes in. FP8 stands for the products of the decoder layers' linear layers, by one of Transformer
#: Engine's recipes (`megarl.ops.fp8.RECIPES`); all else is in bf16 there.
Precision = Literal["fp32", "bf16", "fp8-tensorwise", "fp8-delayed", "fp8-blockwise"]
DELAYED, BLOCKWISE = "fp8-delayed", "fp8-blockwise"

#: Of this cuBLAS wants the sides of FP8 matrices to be multiples: tokens, too, which the weights' gradient sums over.
MULTIPLE = 16


class Fp8Settings(Settings):
    """The names are Megatron's, without its prefix; amax_history_len and amax_compute_algo default to what Transformer
    Engine's DelayedScaling has."""

    num_layers_at_start_in_bf16: NonNegativeInt = Field(
        default=0, description="Decoder layers at the start of the model whose products stay in bf16; not with delayed."
    )
    num_layers_at_end_in_bf16: NonNegativeInt = Field(
        default=0, description="Decoder layers at the end of the model whose products stay in bf16; not with delayed."
    )
    param: bool = Field(
        default=False,
        description="Keep the weights of these layers in FP8 between steps, beside the optimizer's fp32 weights: one "
        "byte instead of two, and no cast before a product.",
    )
    amax_history_len: PositiveInt = Field(
        default=1024, description="With delayed: steps whose largest magnitudes are kept."
    )
    amax_compute_algo: Literal["max", "most_recent"] = Field(
        default="max", description="With delayed: scale by the largest magnitude that is kept, or by the newest."
    )
    margin: NonNegativeInt = Field(
        default=0, description="With delayed: powers of two that stay free above that magnitude."
    )


def layers_in_fp8(settings: Fp8Settings, num_layers: int) -> range:
    """Which of a model's `num_layers` decoder layers multiply in FP8, where `precision` says so."""
    return range(settings.num_layers_at_start_in_bf16, num_layers - settings.num_layers_at_end_in_bf16)
