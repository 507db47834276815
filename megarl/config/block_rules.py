"""What can be cut how where the engine's weights are quantised in FP8, in blocks of 128 x 128. Torch-free.

Blocks are counted in the checkpoint's tensors. Ranks of the policy quantise what they have, and engines compute with
what they are given: where a cut of either runs through a block, two ranks would need its scale. And vLLM keeps query,
key and value in one tensor, and gate and up: the blocks of what follows another begin there only if that is whole
blocks long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from megarl.config import splits
from megarl.config.model_shape import ModelShape
from megarl.config.quantisation import BLOCK
from megarl.config.schema import RunConfig
from megarl.config.sections import ParallelSettings
from megarl.errors import Refusal

_NEEDS = f"and rollout.precision=fp8 needs multiples of {BLOCK}"


class _Share(NamedTuple):
    """What a rank has of a layer: `axis` [start, stop) of `length`. `fused`: something follows it in vLLM's tensor."""

    layer: str
    axis: str
    start: int
    stop: int
    length: int
    fused: bool = False


def refusals(config: RunConfig, shape: ModelShape) -> Iterator[Refusal]:
    """What `config` cannot cut of `shape` for an engine in FP8, or cut anyhow."""
    if config.rollout.precision != "fp8":
        return
    whole = next(_unfit(_engine_shares(shape, 1, expert_parallel=False)), None)
    if whole is not None:
        yield Refusal(
            "rollout.precision=fp8",
            f"needs {whole.layer} with a multiple of {BLOCK} {whole.axis}, since vLLM keeps what follows in the same "
            f"tensor, and the model has {whole.length}",
            "set rollout.precision=bf16",
        )
        return
    yield from _of_policy(shape, config.parallel)
    yield from _of_engine(shape, config.rollout.tensor, config.rollout.expert_parallel)


def _of_policy(shape: ModelShape, parallel: ParallelSettings) -> Iterator[Refusal]:
    tensor, expert_tensor = parallel.tensor, parallel.expert_tensor or parallel.tensor
    cut = next(_unfit(_policy_shares(shape, tensor)), None)
    if cut is not None:

        def fits(size: int) -> bool:
            other = parallel.model_copy(update={"tensor": size})
            return not any(_unfit(_policy_shares(shape, size))) and not any(splits.policy_refusals(shape, other))

        yield _refusal("parallel.tensor", tensor, cut, fits)
    cut = next(_unfit(_expert_shares(shape, expert_tensor)), None)
    if cut is not None:
        name = "parallel.expert_tensor" if parallel.expert_tensor else "parallel.tensor"
        better = _nearest(expert_tensor, lambda size: not any(_unfit(_expert_shares(shape, size))))
        yield Refusal(
            f"{name}={expert_tensor}",
            f"cuts {_described(cut)}, {_NEEDS}",
            f"set parallel.expert_tensor={better}, or rollout.precision=bf16",
        )


def _of_engine(shape: ModelShape, tensor: int, expert_parallel: bool) -> Iterator[Refusal]:
    def unfit(size: int, whole_experts: bool) -> _Share | None:
        return next(_unfit(_engine_shares(shape, size, whole_experts)), None)

    def fits(size: int, whole_experts: bool = expert_parallel) -> bool:
        return unfit(size, whole_experts) is None and not any(splits.engine_refusals(shape, size, whole_experts))

    cut = unfit(tensor, expert_parallel)
    if cut is None:
        return
    if shape.is_moe and not expert_parallel and fits(tensor, True):
        rule = f"cuts {_described(cut)}, {_NEEDS}"
        yield Refusal(f"rollout.tensor={tensor}", rule, "set rollout.expert_parallel=true, or rollout.precision=bf16")
    else:
        yield _refusal("rollout.tensor", tensor, cut, fits)


def _refusal(setting: str, size: int, cut: _Share, fits: Callable[[int], bool]) -> Refusal:
    better = _nearest(size, fits)
    return Refusal(
        f"{setting}={size}",
        f"cuts {_described(cut)}, {_NEEDS}",
        f"set {setting}={better}, or rollout.precision=bf16" if better else "set rollout.precision=bf16",
    )


def _nearest(size: int, fits: Callable[[int], bool]) -> int | None:
    """The largest size below that divides as many processes, and fits."""
    return next((one for one in range(size - 1, 0, -1) if size % one == 0 and fits(one)), None)


def _described(cut: _Share) -> str:
    return f"the {cut.length} {cut.axis} of {cut.layer} into parts of {cut.stop - cut.start}"


def _unfit(shares: Iterator[_Share]) -> Iterator[_Share]:
    """Those that begin or end within a block."""
    for one in shares:
        within = one.stop % BLOCK and (one.fused or one.stop < one.length)
        if one.start % BLOCK or within or (one.fused and (one.stop - one.start) % BLOCK):
            yield one


def _policy_shares(shape: ModelShape, tensor: int) -> Iterator[_Share]:
    """What each rank of the policy has of all layers but the experts'."""
    for rank in range(tensor):
        yield from _attention_shares(shape, tensor, rank, splits.megatron_qkv, fused=False)
    yield from _mlp_shares(shape, tensor, fused=False)


def _engine_shares(shape: ModelShape, tensor: int, expert_parallel: bool) -> Iterator[_Share]:
    """What each rank of an engine has of all layers."""
    for rank in range(tensor):
        yield from _attention_shares(shape, tensor, rank, splits.vllm_qkv, fused=True)
    yield from _mlp_shares(shape, tensor, fused=True)
    yield from _expert_shares(shape, 1 if expert_parallel else tensor, fused=True)


def _attention_shares(
    shape: ModelShape,
    tensor: int,
    rank: int,
    qkv: Callable[[ModelShape, int, int], list[splits.Span]],
    *,
    fused: bool,
) -> Iterator[_Share]:
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    spans = qkv(shape, tensor, rank)
    for part, (layer, length) in enumerate((("q_proj", queries), ("k_proj", keys), ("v_proj", keys))):
        own = [(start, stop) for of, start, stop in spans if of == part]
        if own:
            # What follows them in the engine's tensor are keys and values.
            first, last = min(start for start, _ in own), max(stop for _, stop in own)
            yield _Share(layer, "rows", first, last, length, fused and part < 2)
    share = queries // tensor
    yield _Share("o_proj", "columns", rank * share, (rank + 1) * share, queries)


def _mlp_shares(shape: ModelShape, tensor: int, *, fused: bool) -> Iterator[_Share]:
    """The first rank's share of dense MLPs and shared experts; the others' are as long."""
    dense = not (shape.is_moe and all(shape.sparse_layers))
    for name, length in (("", shape.ffn_size if dense else 0), ("shared_expert.", shape.shared_expert_ffn_size)):
        yield from _gated_shares(name, length, tensor, fused=fused)


def _expert_shares(shape: ModelShape, tensor: int, *, fused: bool = False) -> Iterator[_Share]:
    yield from _gated_shares("experts.", shape.expert_ffn_size if shape.is_moe else 0, tensor, fused=fused)


def _gated_shares(name: str, length: int, tensor: int, *, fused: bool) -> Iterator[_Share]:
    if length:
        yield _Share(f"{name}gate_proj", "rows", 0, length // tensor, length, fused)
        yield _Share(f"{name}down_proj", "columns", 0, length // tensor, length)
