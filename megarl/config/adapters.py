"""Adapters (LoRA): what a run says of them, and which linear layers of a model take one. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pydantic import Field, PositiveFloat, PositiveInt

from megarl.config.base import PathText, Settings
from megarl.config.model_shape import ModelShape

#: In place of names: every linear layer of the decoder that takes an adapter, but not the output layer.
ALL_LINEAR = "all-linear"

OUTPUT_LAYER = "lm_head"

_EXPERT = re.compile(r"\.experts\.[^.]+\.")


class AdapterSettings(Settings):
    rank: PositiveInt = Field(default=16, description="Rank of every adapter: the columns of B and rows of A.")
    alpha: PositiveFloat = Field(default=16.0, description="A weight W becomes W + alpha / rank x B A.")
    targets: tuple[str, ...] = Field(
        default=(ALL_LINEAR,),
        min_length=1,
        description="Linear layers with an adapter, by their names in the Hugging Face model or the ends of these: "
        "q_proj, mlp.down_proj, experts.up_proj, lm_head. all-linear: every one but lm_head.",
    )
    path: PathText | None = Field(
        default=None,
        description="A folder in PEFT's format (adapter_config.json, adapter_model.safetensors) to begin from; "
        "default: A drawn from seed, B zero.",
    )


class Linear(NamedTuple):
    """A kind of linear layer: its name in the Hugging Face model, `{layer}` and `{expert}` left open, and sizes."""

    name: str
    outputs: int
    inputs: int


def linears(shape: ModelShape) -> Iterator[Linear]:
    """The kinds of linear layers that can have an adapter."""
    hidden, query, key_value = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer = "model.layers.{layer}."
    for name, rows in (("q_proj", query), ("k_proj", key_value), ("v_proj", key_value)):
        yield Linear(f"{layer}self_attn.{name}", rows, hidden)
    yield Linear(f"{layer}self_attn.o_proj", hidden, query)
    names = ("gate_proj", "up_proj", "down_proj")
    if not (shape.is_moe and all(shape.sparse_layers)):
        yield from _mlp(f"{layer}mlp", names, shape.ffn_size, hidden)
    if shape.is_moe:
        mixtral = shape.family == "mixtral"
        block = "block_sparse_moe" if mixtral else "mlp"
        of_expert = ("w1", "w3", "w2") if mixtral else names
        yield from _mlp(f"{layer}{block}.experts.{{expert}}", of_expert, shape.expert_ffn_size, hidden)
    if shape.shared_expert_ffn_size:
        yield from _mlp(f"{layer}mlp.shared_expert", names, shape.shared_expert_ffn_size, hidden)
    if not shape.tied_embeddings:
        yield Linear(OUTPUT_LAYER, shape.vocab_size, hidden)


def _mlp(block: str, names: Sequence[str], size: int, hidden: int) -> Iterator[Linear]:
    gate, up, down = names
    yield Linear(f"{block}.{gate}", size, hidden)
    yield Linear(f"{block}.{up}", size, hidden)
    yield Linear(f"{block}.{down}", hidden, size)


def is_target(name: str, targets: Sequence[str]) -> bool:
    """Whether the linear layer `name` has an adapter: as PEFT matches names, by whole parts from the end.

    The number of an expert may be left out, so that `experts.up_proj` are those of experts alone.
    """
    if ALL_LINEAR in targets and name != OUTPUT_LAYER:
        return True
    names = name, _EXPERT.sub(".experts.", name)
    return any(one == target or one.endswith(f".{target}") for one in names for target in targets)
