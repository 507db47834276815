"""Where the policy's memory is: on the device while it trains, in host memory while the engine generates.

On the CPU there is one memory, and nothing moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megarl.parallel.cpu_platform import has_cuda
from megarl.policy.host_memory import Movable


class Residence:
    """Moves a policy's optimizer state, gradients and weights out of and back into device memory.

    `chunks` have gradient buffers, and their weights in Megatron's; `frozen` are modules without. `moves`: by default
    where there is a GPU. Megatron's own offload makes new tensors, of which weights in fp32, whose optimizer works on
    the weights themselves, would no longer know.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        optimizer: Any,
        frozen: Sequence[torch.nn.Module] = (),
        *,
        moves: bool | None = None,
    ) -> None:
        self._chunks, self._optimizer, self._frozen = chunks, optimizer, frozen
        self._moves = has_cuda() if moves is None else moves
        #: Whether all is on the device that training takes; without a GPU, whether it would be.
        self.trainable = True
        stream = torch.cuda.Stream() if self._moves else None
        self._state = Movable(self._state_tensors, stream)
        # A pass zeroes them before it adds to them.
        self._gradients = Movable(lambda: [buffer.grad_data for buffer in self._buffers()], stream, contents=False)
        self._weights = Movable(lambda: [buffer.param_data for buffer in self._buffers()], stream)
        # Of parameters that stay as they are one copy in host memory serves for good.
        self._constant = Movable(self._frozen_parameters, stream, constant=True)

    def offload_optimizer(self) -> None:
        """Move optimizer state away and free the gradient buffers; the weights stay, as a push reads them."""
        for chunk in (*self._chunks, *self._frozen):
            _forget_copies(chunk)
        self.trainable = False
        self._put_away(self._gradients, self._state)

    def offload_weights(self) -> None:
        """Move the weights away as well, after the optimizer's state."""
        self._put_away(self._weights, self._constant)

    def onload_weights(self) -> None:
        """Bring the weights back, for a push."""
        for part in (self._weights, self._constant):
            part.bring_back()
            part.wait()

    def forget(self) -> None:
        """The frozen weights were written: what host memory has of them is no copy any more."""
        self._constant.changed()

    def onload_state(self) -> None:
        """Bring back the weights and the optimizer's state, which are saved; not the gradient buffers.

        Who reads or writes the state must `wait_for_state` first: it is copied while the weights are computed with.
        """
        self.onload_weights()
        self._state.bring_back()

    def wait_for_state(self) -> None:
        """Let the device use the optimizer's state only when it has come back; nothing waits where it has."""
        self._state.wait()

    def onload(self) -> None:
        """Bring everything back."""
        self.onload_state()
        self._gradients.bring_back()
        self.trainable = True

    def _put_away(self, *parts: Movable) -> None:
        if self._moves:
            for part in parts:
                part.put_away()
            torch.cuda.empty_cache()

    def _state_tensors(self) -> Iterator[torch.Tensor]:
        """The optimizer's own tensors: fp32 weights beside those of the model, and moments."""
        buffers = self._buffers()
        weights = {buffer.param_data.untyped_storage().data_ptr() for buffer in buffers}
        devices = {buffer.param_data.device for buffer in buffers}
        for one in self._optimizer.chained_optimizers:
            if one.is_stub_optimizer:
                continue
            groups, states = one.optimizer.param_groups, one.optimizer.state.values()
            owned = [parameter for group in groups for parameter in group["params"]]
            owned += [value for state in states for value in state.values()]
            for tensor in owned:
                # Weights in fp32 are the model's; what is elsewhere, Megatron's optimizers on the CPU have put there.
                if (
                    isinstance(tensor, torch.Tensor)
                    and tensor.device in devices
                    and tensor.untyped_storage().data_ptr() not in weights
                ):
                    yield tensor

    def _frozen_parameters(self) -> Iterator[torch.nn.Parameter]:
        for module in self._frozen:
            yield from module.parameters()

    def _buffers(self) -> list[Any]:
        return [buffer for chunk in self._chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def _forget_copies(chunk: torch.nn.Module) -> None:
    """Free what Transformer Engine keeps of weights while they are multiplied in FP8, which is as much as bf16 weights
    themselves: the values of bf16 ones (`TransformerEngineBaseModule._fp8_workspaces`), and FP8 ones transposed. The
    next pass makes them anew."""
    for module in chunk.modules():
        getattr(module, "_fp8_workspaces", {}).clear()
        for parameter in module.parameters(recurse=False):
            if (update_usage := getattr(parameter, "update_usage", None)) is not None:
                update_usage(rowwise_usage=True, columnwise_usage=False)
