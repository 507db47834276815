"""Every distinct shard of the policy, built by megarl's own builders in a fake world, and its parameters counted.

Ranks of a pipeline stage have equal shapes, whatever their tensor, context, data and expert coordinates; stages are
alike where their layers are of the same kinds and they stand at the same ends of the model.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from megarl.config.fp8 import layers_in_fp8
from megarl.config.grid import Chunk, Grid, chunks_of_stage
from megarl.config.implied import Implied
from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.errors import MegarlError, Refusal
from megarl.parallel.fake_world import rank_of_fake_world
from megarl.policy.adapter import Adapter
from megarl.policy.megatron_config import transformer_config
from megarl.policy.model import build_model, wrap_data_parallel
from megarl.rehearsal.report import Parameters, StageParameters
from megarl.reshard.weight_map import hf_tensors, padded_vocab_size

#: Kinds of parameters and how Megatron's names show them; the first that is found counts.
KINDS: tuple[tuple[str, str], ...] = (
    ("norms", r"norm"),
    ("embedding", r"^embedding\."),
    ("head", r"^output_layer\."),
    ("attention", r"\.self_attention\."),
    ("experts", r"\.mlp\.experts\."),
    ("shared experts", r"\.mlp\.shared_experts\."),
    ("router", r"\.mlp\.router\."),
    ("dense mlp", r"\.mlp\.linear_fc"),
)


#: Megatron's names of the linear layers' weights, with the layer's number in its chunk.
_LINEAR = re.compile(r"decoder\.layers\.(\d+)\..*\.linear_(?:qkv|proj|fc1|fc2)\.weight\d*")


@dataclass(frozen=True, slots=True)
class Buffer:
    """Parameters of one type that Megatron keeps end to end, padding included, and their gradients.

    The optimizer's state is split evenly over `shards` ranks.
    """

    numel: int
    parameter_bytes: int
    gradient_bytes: int
    shards: int


@dataclass(frozen=True, slots=True)
class Shard:
    """What a rank of pipeline stage `stage` holds.

    `by_kind`: its parameters; `once`: the parameters of all ranks of the stage together, each counted once, padding of
    the vocabulary left out; `largest_layer`: elements of the module whose weights are largest, a layer's local experts
    taken together. `buffers` are of the base, where that trains. Of an adapter `adapter` are its parameters,
    `adapter_buffers` what has them, and `merged` the elements of the largest weight that it changes; 0 without one.
    `fp8`: elements of the weights that are multiplied in FP8; `largest_linear`: those of the largest weight of a linear
    layer, of experts of one.
    """

    stage: int
    chunks: tuple[Chunk, ...]
    by_kind: dict[str, int]
    once: dict[str, int]
    buffers: tuple[Buffer, ...]
    largest_layer: int
    adapter: int = 0
    adapter_buffers: tuple[Buffer, ...] = ()
    merged: int = 0
    fp8: int = 0
    largest_linear: int = 0

    @property
    def parameters(self) -> int:
        return sum(self.by_kind.values())

    @property
    def trained(self) -> tuple[Buffer, ...]:
        """What trains of the policy."""
        return self.buffers + self.adapter_buffers

    @property
    def frozen(self) -> int:
        """Parameters that are in no buffer."""
        return 0 if self.buffers else self.parameters

    @property
    def num_layers(self) -> int:
        return sum(len(chunk.layers) for chunk in self.chunks)


def kind_of(name: str) -> str:
    """The kind of a parameter by Megatron's name within a model chunk.

    >>> kind_of("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight")
    'norms'
    """
    return next(kind for kind, pattern in KINDS if re.search(pattern, name))


def shards_of(config: RunConfig, shape: ModelShape, world: int) -> list[Shard]:
    """The shard of one rank of each pipeline stage, in order; stages that are alike are built once.

    Raises `Refusal` for what Megatron's configuration refuses.
    """
    parallel, fp8_layers = config.parallel, layers_in_fp8(config.fp8, shape.num_layers)
    built: dict[Any, Shard] = {}
    shards: list[Shard] = []
    for stage in range(parallel.pipeline):
        chunks = chunks_of_stage(shape.num_layers, parallel, stage)
        content = tuple(
            (c.first, c.last, tuple((shape.is_sparse(layer), layer in fp8_layers) for layer in c.layers))
            for c in chunks
        )
        if content not in built:
            built[content] = _build(config, shape, world, stage, chunks)
        one = built[content]
        shards.append(replace(one, stage=stage, chunks=chunks))
    return shards


def _build(config: RunConfig, shape: ModelShape, world: int, stage: int, chunks: tuple[Chunk, ...]) -> Shard:
    rank = stage * (world // config.parallel.pipeline)
    with rank_of_fake_world(rank, world, config.parallel) as grid:
        try:
            megatron_config = transformer_config(config, shape)
        except (ValueError, AssertionError) as error:
            raise Refusal(
                "the configuration", f"is refused by Megatron ({error})", "change the settings named"
            ) from None
        models = build_model(megatron_config, shape, chunks)
        by_kind: Counter[str] = Counter()
        once: Counter[str] = Counter()
        modules: dict[tuple[int, str], int] = defaultdict(int)
        fp8_elements = largest = 0
        fp8_layers = layers_in_fp8(config.fp8, shape.num_layers) if config.uses_fp8 else range(0)
        for number, model in enumerate(models):
            for name, parameter in model.named_parameters():
                by_kind[kind_of(name)] += parameter.numel()
                once[kind_of(name)] += _once(name, parameter, shape, grid)
                modules[number, name.rpartition(".")[0]] += parameter.numel()
                if _LINEAR.fullmatch(name):
                    largest = max(largest, parameter.numel())
                if _is_in_fp8(name, chunks[number], fp8_layers):
                    fp8_elements += parameter.numel()
        implied = Implied(config)
        buffers: tuple[Buffer, ...] = ()
        if not implied.base_is_frozen:
            buffers = tuple(_buffers(wrap_data_parallel(config, megatron_config, models)))
        shard = Shard(
            stage,
            chunks,
            dict(by_kind),
            dict(once),
            buffers,
            max(modules.values()),
            fp8=fp8_elements,
            largest_linear=largest,
        )
        if implied.adapter is None:
            return shard
        adapter = Adapter(implied.adapter, shape, config.parallel, grid, models, config.seed)
        changed = (one.module.get_parameter(one.attribute).numel() for one in adapter.attached(models).merged.values())
        return replace(
            shard,
            adapter=sum(one.numel() for one in adapter.parameters()),
            adapter_buffers=tuple(_buffers(wrap_data_parallel(config, megatron_config, [adapter]))),
            merged=max(changed, default=0),
        )


def _is_in_fp8(name: str, chunk: Chunk, fp8_layers: range) -> bool:
    """Whether a parameter of a chunk is the weight of a linear layer of one of the decoder layers `fp8_layers`."""
    found = _LINEAR.fullmatch(name)
    return found is not None and chunk.layers.start + int(found[1]) in fp8_layers


def _once(name: str, parameter: Any, shape: ModelShape, grid: Grid) -> int:
    """Elements that all ranks of the stage hold of a parameter together, copies and padding left out."""
    kind = kind_of(name)
    if kind == "head" and shape.tied_embeddings:
        # The last stage's copy of the embedding.
        return 0
    if kind == "experts":
        return parameter.numel() * grid.expert * grid.expert_tensor
    if not getattr(parameter, "tensor_model_parallel", False):
        return parameter.numel()
    whole = parameter.numel() * grid.tensor
    if kind in ("embedding", "head"):
        padding = padded_vocab_size(shape.vocab_size, grid.tensor) - shape.vocab_size
        whole -= padding * parameter.shape[1]
    return whole


def _buffers(wrapped: list[Any]) -> Iterator[Buffer]:
    for chunk in wrapped:
        for one in (*chunk.buffers, *chunk.expert_parallel_buffers):
            yield Buffer(one.numel, one.param_dtype.itemsize, one.grad_dtype.itemsize, one.data_parallel_world_size)


def count_parameters(shape: ModelShape, shards: list[Shard]) -> Parameters:
    """The model's parameters by its configuration, and by its shards. Raises `MegarlError` where they differ."""
    exact = sum(prod(dims) for dims in hf_tensors(shape).values())
    by_kind: Counter[str] = Counter()
    alike: dict[tuple[Any, ...], list[Shard]] = defaultdict(list)
    for shard in shards:
        by_kind.update(shard.once)
        alike[shard.num_layers, tuple(sorted(shard.by_kind.items()))].append(shard)
    counted = sum(by_kind.values())
    if counted != exact:
        raise MegarlError(
            f"the shards of all ranks hold {counted:,} parameters, the model has {exact:,}: this is an error of "
            "megarl's, and no figure of the plan can be trusted"
        )
    stages = tuple(
        StageParameters(tuple(one.stage for one in same), same[0].num_layers, same[0].by_kind)
        for same in alike.values()
    )
    return Parameters(exact, counted, dict(by_kind), stages)
