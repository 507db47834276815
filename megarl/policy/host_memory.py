"""Tensors that leave the device together and come back: what they hold lies in host memory meanwhile.

That memory is page-locked, allocated once and kept: the copies into it and out of it are the device's own, on a stream
beside the one that computes. Without CUDA it is ordinary memory, and copies are done when they are asked for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from megarl.errors import MegarlError
from megarl.parallel.cpu_platform import has_cuda

#: Bytes of a page, which memory is locked by.
PAGE = 4096
#: Bytes that a tensor's place in host memory is a multiple of. Our choice.
PLACE = 512


class Movable:
    """The tensors that `tensors` names, views of the memory that leaves.

    Those named when they leave come back; they stay the same tensors, and a view of one is valid again when it has come
    back. Without `contents` nothing is kept of them. `constant` tensors are copied once, until `changed` says that they
    were written. `stream`: where copies run, one after the other.
    """

    def __init__(
        self,
        tensors: Callable[[], Iterable[torch.Tensor]],
        stream: Any,
        *,
        contents: bool = True,
        constant: bool = False,
    ) -> None:
        self._tensors, self._stream = tensors, stream
        self._contents, self._constant = contents, constant
        # What is away, with its bytes on the device.
        self._away: list[tuple[torch.UntypedStorage, int]] = []
        self._host: HostMemory | None = None
        self._known = False
        self._arrived: Any = None

    def put_away(self) -> None:
        """Copy what they hold and free their memory; the caller's thread waits for the copies. Again: nothing."""
        if self._away:
            return
        found: dict[int, torch.UntypedStorage] = {}
        for tensor in self._tensors():
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found.setdefault(storage.data_ptr(), storage)
        self._away = [(storage, storage.nbytes()) for storage in found.values()]
        if self._away and self._contents and not (self._constant and self._known):
            self._reserve()
            self._copy(out=True)
            self._stream.synchronize()
            self._known = True
        for storage, _ in self._away:
            storage.resize_(0)

    def bring_back(self) -> None:
        """Give them memory again and begin to copy; whoever computes with them must `wait`. Again: nothing."""
        for storage, size in self._away:
            storage.resize_(size)
        if self._contents and self._away:
            self._copy(out=False)
            self._arrived = torch.cuda.Event()
            self._arrived.record(self._stream)
        self._away = []

    def wait(self) -> None:
        """Let the device compute on only when they have come back; the caller's thread goes on."""
        if self._arrived is not None:
            torch.cuda.current_stream().wait_event(self._arrived)
            self._arrived = None

    def changed(self) -> None:
        """They were written: what host memory has of them is no copy any more."""
        self._known = False

    def _copy(self, *, out: bool) -> None:
        """Between the device and their places in host memory."""
        assert self._host is not None
        # What the device still computes with them, or with the memory that they are given, comes first.
        self._stream.wait_stream(torch.cuda.current_stream())
        end = 0
        with torch.cuda.stream(self._stream), torch.no_grad():
            for storage, size in self._away:
                on_device = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                in_host = self._host.bytes[end : end + size]
                target, source = (in_host, on_device) if out else (on_device, in_host)
                target.copy_(source, non_blocking=True)
                end += _place(size)

    def _reserve(self) -> None:
        """Have memory for all: the second time only where something has come, as moments do with the first update."""
        needed = sum(_place(size) for _, size in self._away)
        if self._host is None or self._host.bytes.numel() < needed:
            self._host = None
            self._host = HostMemory(needed)


class HostMemory:
    """Host memory of `size` bytes, page-locked where there is CUDA, until nobody has it any more.

    Allocated and locked apart, since PyTorch's own page-locked memory comes in powers of two: up to twice as much.

    Raises `MegarlError` where it cannot be locked.
    """

    def __init__(self, size: int) -> None:
        # Whole pages, so that no other memory is on one of them.
        memory = torch.empty(size + 2 * PAGE, dtype=torch.uint8)
        start = -memory.data_ptr() % PAGE
        self.bytes = memory[start : start + size]
        if has_cuda():
            _lock(self.bytes.data_ptr(), size + -size % PAGE)
            # The memory stays until it is no longer locked; at the end of the process nobody has to.
            weakref.finalize(self, _unlock, self.bytes.data_ptr(), memory).atexit = False


def _place(size: int) -> int:
    return size + -size % PLACE


def _lock(pointer: int, size: int) -> None:
    runtime: Any = torch.cuda.cudart()
    # 1: locked for all contexts of the process.
    if error := int(runtime.cudaHostRegister(pointer, size, 1)):
        raise MegarlError(
            f"{size / 1e9:.2f} GB of host memory could not be page-locked (CUDA error {error}): it holds what the "
            "policy has on a GPU while the engine generates. Fix: give the job more host memory, or use more nodes"
        )


def _unlock(pointer: int, memory: torch.Tensor) -> None:
    """`memory` is what was locked."""
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(pointer)
