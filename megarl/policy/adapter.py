"""Low-rank adapters (LoRA, arXiv 2106.09685) of Megatron's linear layers, in the space of their weights.

A layer computes with W' = W + s B A, s = alpha / rank: one forward pass, of the merged weight, whatever the layer does
with it. Its gradient G gives B and A theirs, s G A^T and s B^T G, by the chain rule through the merge, and W its own
where W trains. So no parallel layout, and none of Transformer Engine's fused layers, knows of adapters.

W' is put in the place of a module's weight while its forward pass runs, and is not kept for the backward pass, which
computes it again: a merged weight is there of one layer at a time. The merge is in fp32, rounded once to the weight's
type, and the same wherever it is asked for, so that an engine is filled with the bits that the policy computes with.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from megarl.config.adapters import OUTPUT_LAYER, AdapterSettings
from megarl.config.grid import Grid
from megarl.config.model_shape import ModelShape
from megarl.config.sections import ParallelSettings
from megarl.policy.model import copy_number
from megarl.reshard.adapter_map import AdaptedTensor, LowRank, Piece, adapted_tensors
from megarl.reshard.weight_map import chunk_prefix

#: What the names of adapters begin with in Megatron's checkpoints.
KEY = "adapter."


class Factors(torch.nn.Module):
    """One linear layer's adapter: this rank's part of `lora_A` (rank, inputs) and `lora_B` (outputs, rank).

    A is drawn as PEFT draws it, uniformly between ±1/√inputs, by the seed and the layer's name, the same under every
    layout; B is zero, so that the merged weight begins as the base's.
    """

    def __init__(self, place: LowRank, rank: int, seed: int, like: torch.Tensor) -> None:
        super().__init__()
        self.place = place
        rows, columns = (stop - start for start, stop in (place.rows, place.columns))
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.lora_A = torch.nn.Parameter(torch.empty(rank, columns, **options))
        self.lora_B = torch.nn.Parameter(torch.zeros(rows, rank, **options))
        if like.device.type != "meta":
            bound = 1 / math.sqrt(place.inputs)
            drawn = torch.empty(rank, place.inputs).uniform_(-bound, bound, generator=_generator(seed, place.name))
            with torch.no_grad():
                self.lora_A.copy_(drawn[:, slice(*place.columns)])
        for name, parameter in self.named_parameters():
            _mark(parameter, place, whole=name != self.cut)

    @property
    def cut(self) -> str | None:
        """The factor of which this rank has a part of its own."""
        return None if self.place.cut is None else "lora_B" if self.place.cut == "rows" else "lora_A"

    @property
    def copies(self) -> list[torch.nn.Parameter]:
        """The factors of which all ranks of the layer's tensor-parallel group have whole copies, where there are
        several ranks: each rank's gradient is a part of theirs."""
        if self.place.shards == 1:
            return []
        return [parameter for name, parameter in self.named_parameters() if name != self.cut]

    def product(self) -> torch.Tensor:
        """B A of this rank's rows and columns, fp32."""
        return self.lora_B.float() @ self.lora_A.float()


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"adapter:{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _mark(parameter: torch.nn.Parameter, place: LowRank, *, whole: bool) -> None:
    """Say with Megatron's marks that a gradient norm counts each rank's own part, and of whole copies the
    first rank's."""
    attributes: Any = parameter
    if place.expert:
        attributes.allreduce = False
    if whole and place.shard > 0:
        attributes.shared = True
    else:
        # Megatron would count a whole copy on the first rank of the dense layers' group, which experts' need not have.
        set_tensor_model_parallel_attributes(parameter, True, 0, 1)


class Merged(NamedTuple):
    """A parameter that adapters change: `attribute` of `module`."""

    module: torch.nn.Module
    attribute: str
    factors: tuple[Factors, ...]
    pieces: tuple[Piece, ...]
    scale: float

    def __call__(self) -> torch.Tensor:
        """W + s B A of this rank's shard, merged in fp32 and rounded once to the type of W."""
        base = self.module.get_parameter(self.attribute)
        products = [one.product() for one in self.factors]
        columns = products[0].shape[1]
        rows = [
            products[0].new_zeros(stop - start, columns) if of is None else products[of][start:stop]
            for of, start, stop in self.pieces
        ]
        change = rows[0] if len(rows) == 1 else torch.cat(rows)
        return torch.add(base.float(), change, alpha=self.scale).to(base.dtype)


class _Again(NamedTuple):
    """What is kept for a backward pass in place of a merged weight, or of a view of it."""

    merged: Merged
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@contextmanager
def in_place(weights: Sequence[Merged]) -> Iterator[None]:
    """Compute with merged weights inside the block; what autograd would keep of them it computes again."""
    by_place: dict[int, Merged] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor | _Again:
        one = by_place.get(tensor.untyped_storage().data_ptr())
        if one is None:
            return tensor
        return _Again(one, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def unpack(kept: torch.Tensor | _Again) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        with torch.no_grad():
            return kept.merged().as_strided(kept.size, kept.stride, kept.offset)

    try:
        for one in weights:
            # An entry of the instance is found before the registered parameter, which stays where it is.
            found = one.module.__dict__[one.attribute] = one()
            by_place[found.untyped_storage().data_ptr()] = one
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for one in weights:
            one.module.__dict__.pop(one.attribute, None)


class Adapter(torch.nn.Module):
    """All adapters of a rank's part of a model, each under the name of its layer in the Hugging Face model.

    Beside the model's chunks and not in them, so that the base's parameters keep their names. `attached` to chunks it
    changes what these compute with; several models may have one adapter. `like` are chunks, whose weights say of what
    type and where the factors are.
    """

    def __init__(
        self,
        settings: AdapterSettings,
        shape: ModelShape,
        parallel: ParallelSettings,
        grid: Grid,
        like: Sequence[GPTModel],
        seed: int,
    ) -> None:
        super().__init__()
        self._scale = settings.alpha / settings.rank
        self._by_tensor: list[tuple[AdaptedTensor, tuple[Factors, ...]]] = []
        for tensor in adapted_tensors(shape, parallel, grid, settings.targets):
            base = like[tensor.chunk].get_parameter(tensor.name)
            factors = tuple(Factors(place, settings.rank, seed, base.detach()) for place in tensor.adapters)
            for one in factors:
                self._place(one)
            self._by_tensor.append((tensor, factors))

    def _place(self, factors: Factors) -> None:
        *path, leaf = factors.place.name.split(".")
        parent: torch.nn.Module = self
        for name in path:
            if name not in parent._modules:
                parent.add_module(name, torch.nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(leaf, factors)

    def attached(self, chunks: Sequence[GPTModel]) -> Attachment:
        """From here on these chunks compute with merged weights."""
        return Attachment(
            chunks,
            {
                chunk_prefix(tensor.chunk, len(chunks)) + tensor.name: _merged(
                    chunks[tensor.chunk], tensor, factors, self._scale
                )
                for tensor, factors in self._by_tensor
            },
        )

    def all_factors(self) -> Iterator[Factors]:
        """The adapter of each linear layer, in the order of the forward pass."""
        for _, factors in self._by_tensor:
            yield from factors

    def clear(self) -> None:
        """Change nothing of the base: B is zero as at first."""
        with torch.no_grad():
            for one in self.all_factors():
                one.lora_B.zero_()

    def sum_copies(self) -> None:
        """Add up the gradients of whole copies, of which every rank of a layer has a part. Collective."""
        groups: Any = parallel_state
        for expert, group in (
            (False, groups.get_tensor_model_parallel_group()),
            (True, groups.get_expert_tensor_parallel_group()),
        ):
            copies: list[Any] = [p for one in self.all_factors() if one.place.expert == expert for p in one.copies]
            if copies:
                flat = torch.cat([parameter.main_grad.flatten() for parameter in copies])
                dist.all_reduce(flat, group=group)
                for parameter, found in zip(copies, flat.split([p.numel() for p in copies]), strict=True):
                    parameter.main_grad.copy_(found.view_as(parameter))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Every factor as Megatron's checkpoints store it: under its layer's name, cut as it is, each copy numbered."""
        found: dict[str, Any] = {}
        copies = {expert: copy_number(expert=expert) for expert in (False, True)}
        for one in self.all_factors():
            for name, parameter in one.named_parameters():
                place, cut = one.place, name == one.cut
                key = f"{KEY}{place.name}.{name}"
                axis = 0 if name == "lora_B" else 1
                offsets = [(axis, place.shard, place.shards)] if cut else []
                found[f"{prefix}{place.name}.{name}"] = ShardedTensor.from_rank_offsets(
                    key,
                    parameter,
                    *offsets,
                    replica_id=(0, 0 if cut else place.shard, copies[place.expert]),
                    # The vocabulary is padded as the layout wants it.
                    allow_shape_mismatch=place.name == OUTPUT_LAYER and name == "lora_B",
                )
        return found


def _merged(chunk: GPTModel, tensor: AdaptedTensor, factors: tuple[Factors, ...], scale: float) -> Merged:
    path, _, attribute = tensor.name.rpartition(".")
    return Merged(chunk.get_submodule(path), attribute, factors, tensor.pieces, scale)


class Attachment:
    """An adapter's hold on a model's chunks, which compute with the `merged` weights.

    Only where the output layer's weight is read is for the reader to ask (`head`). `merged`: the parameters that the
    adapter changes, by their names in `megatron_tensors`.
    """

    def __init__(self, chunks: Sequence[GPTModel], merged: Mapping[str, Merged]) -> None:
        self.merged = merged
        self._head: list[Merged] = []
        by_module: dict[torch.nn.Module, list[Merged]] = {}
        for one in merged.values():
            by_module.setdefault(one.module, []).append(one)
        head = chunks[-1].output_layer if chunks[-1].post_process else None
        for module, weights in by_module.items():
            if module is head:
                self._head = weights
            else:
                attributes: Any = module
                attributes.forward = _with_merged(attributes.forward, weights)

    def head(self) -> AbstractContextManager[None]:
        """Within it the output layer's weight reads as it is computed with."""
        return in_place(self._head) if self._head else nullcontext()

    def head_weight(self) -> tuple[LowRank, torch.Tensor] | None:
        """Where the output layer's adapter is, and the base's weight there, on ranks that have it."""
        if not self._head:
            return None
        (one,) = self._head
        return one.factors[0].place, one.module.get_parameter(one.attribute).detach()


def _with_merged(forward: Callable[..., Any], weights: Sequence[Merged]) -> Callable[..., Any]:
    def merged_forward(*arguments: Any, **keywords: Any) -> Any:
        with in_place(weights):
            return forward(*arguments, **keywords)

    return merged_forward
