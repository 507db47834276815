"""Lets Megatron-core run on a machine without CUDA.

Megatron-core names CUDA in a few places where it only means "the device": factory calls with
`device="cuda"`, `torch.cuda.current_device()`, tensor type names, the random-number tracker. This
module, and no other, redirects those names to the CPU. It does nothing where CUDA exists.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

#: Factory functions Megatron-core calls with device="cuda".
_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "empty_strided")

#: `Tensor.type()` names that Megatron's optimizers compare with `torch.cuda.…`.
_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
}

_active = False


def has_cuda() -> bool:
    """Whether this process can use a GPU."""
    return torch.cuda.is_available()


def order_queues() -> None:
    """Have a GPU take up work in the order in which it was asked for, which Megatron's overlapping communication relies
    on; to be called before CUDA starts, which reads it once. Without a GPU its absence is a warning per model."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def activate() -> None:
    """Redirect CUDA names to the CPU where there is no CUDA; idempotent."""
    global _active
    if _active or has_cuda():
        return
    _active = True
    order_queues()
    # `with torch.device(...)` knows factory functions by identity, from a set made at its first use: of the originals,
    # which are what it meets. Made later it would hold the wrappers, and the device would be passed over in silence.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _redirect_cuda_functions()
    _redirect_tensor_methods()
    _redirect_rng_tracker()
    _redirect_recompute()
    _redirect_experts()
    _redirect_uneven_collectives()
    _leave_out_gathers_of_one()


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a factory function: a CUDA device argument becomes the CPU; all else passes through."""

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapped


class _NullStream:
    """Stands for a CUDA stream or event, of Megatron-core's and of vLLM's: work on the CPU is already in order."""

    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, other: Any = None) -> None:
        pass

    wait_event = record = wait = wait_stream

    def record_event(self, *_: Any) -> _NullStream:
        return self

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def redirect_streams() -> None:
    """Put stand-ins in the place of CUDA's streams and events."""
    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = _NullStream
    cuda.current_stream = cuda.default_stream = cuda.stream = lambda *_, **__: _NullStream()


def _redirect_cuda_functions() -> None:
    cuda: Any = torch.cuda
    cpu = torch.device("cpu")
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda *_: None
    cuda.empty_cache = lambda: None
    cuda.set_device = lambda *_: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    redirect_streams()
    for name in ("Float", "Half", "BFloat16", "Int", "Long", "Byte"):
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))


def _redirect_tensor_methods() -> None:
    original_type = torch.Tensor.type

    def type_name(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is not None:
            return original_type(self, dtype, **kwargs)
        name = original_type(self)
        return _TYPE_NAMES.get(name, name)

    tensor: Any = torch.Tensor
    tensor.type = type_name
    tensor.cuda = lambda self, *_, **__: self


def _redirect_rng_tracker() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    module: Any = megatron_random
    module._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _redirect_recompute() -> None:
    """Keep recomputation that discards outputs from asking Transformer Engine about FP8: it does even where there is
    none."""
    from megatron.core.tensor_parallel import random as megatron_random

    checkpoint: Any = megatron_random.CheckpointWithoutOutput
    original = checkpoint.__init__

    def without_fp8(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.fp8 = False

    checkpoint.__init__ = without_fp8


def _redirect_experts() -> None:
    """What Megatron's mixtures of experts take for granted beside CUDA."""
    from megatron.core.transformer.moe import token_dispatcher

    dispatcher: Any = token_dispatcher
    original = dispatcher.maybe_move_tensor_to_cpu

    def moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Counts become an array on their way to the host; those that are there already must, too.
        found = original(tensor, as_numpy, record_stream)
        return found.numpy() if as_numpy and torch.is_tensor(found) else found

    dispatcher.maybe_move_tensor_to_cpu = moved


def _redirect_uneven_collectives() -> None:
    """Let ranks give and take parts of unlike lengths, as NCCL does and gloo does not: padded to the longest."""
    import torch.distributed as dist

    distributed: Any = dist
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    def uneven_all_gather(outputs: list[torch.Tensor], own: torch.Tensor, group: Any = None, **kwargs: Any) -> Any:
        longest = max(len(part) for part in outputs)
        if all(len(part) == longest for part in outputs):
            return all_gather(outputs, own, group=group, **kwargs)
        padded = [part.new_empty(longest, *part.shape[1:]) for part in outputs]
        all_gather(padded, _padded(own, longest), group=group)
        for part, found in zip(outputs, padded, strict=True):
            part.copy_(found[: len(part)])
        return None

    def uneven_reduce_scatter(own: torch.Tensor, parts: list[torch.Tensor], group: Any = None, **kwargs: Any) -> Any:
        longest = max(len(part) for part in parts)
        if all(len(part) == longest for part in parts):
            return reduce_scatter(own, parts, group=group, **kwargs)
        found = own.new_empty(longest, *own.shape[1:])
        reduce_scatter(found, [_padded(part, longest) for part in parts], group=group)
        own.copy_(found[: len(own)])
        return None

    distributed.all_gather, distributed.reduce_scatter = uneven_all_gather, uneven_reduce_scatter


def _leave_out_gathers_of_one() -> None:
    """Gather no updated weights where one rank has them all.

    Of such a gather nothing comes but harm: gloo copies large tensors in a thread of its own by a team of OpenMP
    threads, which outlives the copy. From then on there are more such threads than cores, so that OpenMP's threads no
    longer spin between loops but sleep, and small operations take twice as long, in generation too.
    """
    from megatron.core.distributed import param_and_grad_buffer

    group: Any = param_and_grad_buffer._ParamAndGradBucketGroup
    original = group.start_param_sync

    def start_param_sync(self: Any, force_sync: bool = False) -> None:
        if self.intra_distributed_optimizer_instance_size > 1 or self.ddp_config.overlap_param_gather:
            original(self, force_sync)
        else:
            self.param_gather_dispatched = True

    group.start_param_sync = start_param_sync


def _padded(part: torch.Tensor, length: int) -> torch.Tensor:
    """Zeros behind the rows of `part`, up to `length` rows."""
    return torch.cat((part, part.new_zeros(length - len(part), *part.shape[1:])))
