"""Where the policy's memory is: on the device while it trains, in host memory while the engine generates.

On the CPU there is one memory, and nothing moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megarl.parallel.cpu_platform import has_cuda


class Residence:
    """Moves a policy's optimizer state, gradients and weights out of and back into device memory.

    `chunks` have gradient buffers, and their weights in Megatron's; `frozen` are modules without.
    """

    def __init__(self, chunks: Sequence[Any], optimizer: Any, frozen: Sequence[torch.nn.Module] = ()) -> None:
        self._chunks, self._optimizer, self._frozen = chunks, optimizer, frozen
        # Of parameters that stay as they are one copy in host memory serves for good.
        self._in_host: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._optimizer_away = self._gradients_away = self._weights_away = False

    def offload_optimizer(self) -> None:
        """Move optimizer state away and free the gradient buffers; the weights stay, as a push reads them."""
        if has_cuda() and not self._optimizer_away:
            self._optimizer.offload_to_cpu()
        if has_cuda() and not self._gradients_away:
            for chunk in self._chunks:
                chunk.offload_grad_buffers(synchronize=True, empty_cache=True)
        self._optimizer_away = self._gradients_away = True

    def offload_weights(self) -> None:
        """Move the weights away as well."""
        if has_cuda() and not self._weights_away:
            for buffer in self._buffers():
                buffer.offload_to_cpu(move_params=True, move_grads=False)
            for parameter in self._frozen_parameters():
                if parameter not in self._in_host:
                    self._in_host[parameter] = parameter.data.cpu().pin_memory()
                parameter.data = self._in_host[parameter]
            torch.cuda.empty_cache()
        self._weights_away = True

    def onload_weights(self) -> None:
        """Bring the weights back, for a push."""
        if has_cuda() and self._weights_away:
            for buffer in self._buffers():
                buffer.reload_from_cpu(move_params=True, move_grads=False)
            for parameter in self._frozen_parameters():
                parameter.data = parameter.data.cuda()
        self._weights_away = False

    def forget(self) -> None:
        """The frozen weights were written: what host memory has of them is no copy any more."""
        if not self._weights_away:
            self._in_host.clear()

    def onload_state(self) -> None:
        """Bring back the weights and the optimizer's state, which are saved; not the gradient buffers."""
        self.onload_weights()
        if has_cuda() and self._optimizer_away:
            self._optimizer.restore_from_cpu()
        self._optimizer_away = False

    def onload(self) -> None:
        """Bring everything back."""
        self.onload_weights()
        if has_cuda() and self._gradients_away:
            for chunk in self._chunks:
                chunk.restore_grad_buffers()
        self._gradients_away = False
        self.onload_state()

    def _frozen_parameters(self) -> Iterator[torch.nn.Parameter]:
        for module in self._frozen:
            yield from module.parameters()

    def _buffers(self) -> list[Any]:
        return [buffer for chunk in self._chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
