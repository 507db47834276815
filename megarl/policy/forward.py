"""What the model's forward pass is called with, on the CPU and with Transformer Engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megarl.config.model_shape import ModelShape
from megarl.errors import Refusal
from megarl.parallel.cpu_platform import has_cuda
from megarl.policy.batch import MicroBatch


class ForwardArguments:
    """Turns a micro-batch into the arguments of the Megatron model's forward pass."""

    def __init__(self, config: TransformerConfig, shape: ModelShape, chunks: Sequence[GPTModel]) -> None:
        self.config = config
        self.inverse_frequencies, self.scaling = rotary_frequencies(shape)
        if has_cuda():
            check_rotary_on_gpu(shape)
            # Megatron knows fewer rope scalings than Hugging Face; the frequencies are ours in every case.
            for chunk in chunks:
                chunk.rotary_pos_emb.inv_freq = self.inverse_frequencies.cuda()

    def of(self, batch: MicroBatch) -> dict[str, Any]:
        """Keyword arguments for `GPTModel.forward`."""
        return {
            "input_ids": batch.tokens,
            "position_ids": batch.positions,
            "attention_mask": None,
            "packed_seq_params": self._packing(batch),
        }

    def _packing(self, batch: MicroBatch) -> PackedSeqParams | None:
        if not has_cuda():
            from megarl.policy.cpu_attention import cpu_packing

            group: Any = parallel_state.get_context_parallel_group()
            return cpu_packing(batch, self.inverse_frequencies, self.scaling, self.config.params_dtype, group)
        if not batch.packed:
            return None
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.boundaries,
            cu_seqlens_kv=batch.boundaries,
            max_seqlen_q=batch.longest,
            max_seqlen_kv=batch.longest,
        )


def check_rotary_on_gpu(shape: ModelShape) -> None:
    """Raise `Refusal` for a rotary embedding that Transformer Engine does not have."""
    _, scaling = rotary_frequencies(shape)
    if scaling != 1.0:
        raise Refusal(
            f"rope_scaling {shape.rope_scaling}",
            "scales cosine and sine, which Transformer Engine's rotary embedding does not",
            "use a model without yarn on GPUs",
        )


def rotary_frequencies(shape: ModelShape) -> tuple[torch.Tensor, float]:
    """Inverse frequencies (head_dim/2,) fp32 and the factor on cosine and sine, by transformers' own formulas."""
    if not shape.rope_scaling:
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
        return 1.0 / (shape.rope_theta**exponents), 1.0
    from transformers import PretrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = shape.rope_scaling["rope_type"]
    parameters = shape.rope_scaling | {"rope_theta": shape.rope_theta}
    sizes: dict[str, Any] = {
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
    }
    config = PretrainedConfig(**sizes, rope_parameters=parameters)  # pyright: ignore[reportCallIssue]
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies.float(), float(scaling)
