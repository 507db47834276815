"""Lets Megatron-core run on a machine without CUDA.

Megatron-core names CUDA in a few places where it only means "the device": factory calls with
`device="cuda"`, `torch.cuda.current_device()`, tensor type names, the random-number tracker. This
module, and no other, redirects those names to the CPU. It does nothing where CUDA exists.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

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


def activate() -> None:
    """Redirect CUDA names to the CPU where there is no CUDA; idempotent."""
    global _active
    if _active or has_cuda():
        return
    _active = True
    # Megatron refuses to build overlapping communicators without this variable on older devices; it has no
    # meaning for gloo, but its absence is a warning per model.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _redirect_cuda_functions()
    _redirect_tensor_methods()
    _redirect_rng_tracker()


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
    """Stands for a CUDA stream or event: work on the CPU is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    wait_event = record = record_event = wait = wait_stream

    def synchronize(self) -> None:
        pass


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
    cuda.Stream = cuda.Event = _NullStream
    cuda.current_stream = cuda.default_stream = lambda *_: _NullStream()
    cuda.stream = lambda *_: nullcontext()
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
