"""Who owns the memory when: the states of the engine's parts, checked on every platform.

    TRAIN --wake_weights--> PUSH --wake_cache--> GENERATE --sleep--> TRAIN

On a GPU the transitions free and take memory (vLLM's sleep mode); on the CPU only the states change,
so that a mistake in the order shows on a laptop as it would on a cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from megarl.errors import PhaseError


class Phase(Enum):
    """What the processes are doing."""

    TRAIN = "train"
    PUSH = "push"
    GENERATE = "generate"


class Memory(Enum):
    """Whose memory can be away."""

    OPTIMIZER = "optimizer state"
    POLICY = "policy weights"
    ENGINE_WEIGHTS = "engine weights"
    ENGINE_CACHE = "engine KV cache"


#: What is awake in each phase. The policy's weights are the source of a push, so they sleep only while generating.
AWAKE: dict[Phase, frozenset[Memory]] = {
    Phase.TRAIN: frozenset({Memory.OPTIMIZER, Memory.POLICY}),
    Phase.PUSH: frozenset({Memory.POLICY, Memory.ENGINE_WEIGHTS}),
    Phase.GENERATE: frozenset({Memory.ENGINE_WEIGHTS, Memory.ENGINE_CACHE}),
}


class Sleeper(Protocol):
    """What really frees and takes memory. `NoSleeper` on the CPU."""

    def sleep(self) -> None:
        """Free the engine's weights and cache."""
        ...

    def wake(self, tags: Sequence[str]) -> None:
        """Take memory again for the tags `weights` or `kv_cache`."""
        ...


class NoSleeper:
    """Memory stays where it is."""

    def sleep(self) -> None:
        pass

    def wake(self, tags: Sequence[str]) -> None:
        pass


class Phases:
    """The phase machine. A new engine is in GENERATE: vLLM's constructor takes all of its memory.

    A sleeping engine forgets its weights, so generating needs a push since the last sleep.
    """

    def __init__(self, sleeper: Sleeper) -> None:
        self.phase = Phase.GENERATE
        self._sleeper = sleeper
        self._weights_written = False

    def sleep(self) -> None:
        """GENERATE → TRAIN: free the engine's memory and forget its weights."""
        self._leave(Phase.GENERATE, "put the engine to sleep")
        self._sleeper.sleep()
        self._weights_written = False
        self.phase = Phase.TRAIN

    def wake_weights(self) -> None:
        """TRAIN → PUSH: the engine's weight tensors exist again, with undefined contents."""
        self._leave(Phase.TRAIN, "wake the engine's weights")
        self._sleeper.wake(["weights"])
        self.phase = Phase.PUSH

    def wake_cache(self) -> None:
        """PUSH → GENERATE. Raises `PhaseError` where no push has filled the weights."""
        self._leave(Phase.PUSH, "wake the engine's KV cache")
        self._require_written()
        self._sleeper.wake(["kv_cache"])
        self.phase = Phase.GENERATE

    def weights_written(self) -> None:
        """Note that a push has ended."""
        self.require(Memory.ENGINE_WEIGHTS)
        self._weights_written = True

    def require(self, memory: Memory) -> None:
        """Raise `PhaseError`, naming it and the phase, where that memory is away."""
        if memory not in AWAKE[self.phase]:
            awake = ", ".join(sorted(p.value for p in AWAKE[self.phase]))
            raise PhaseError(f"{memory.value} touched in phase {self.phase.value}, in which only {awake} are awake")

    def require_ready(self) -> None:
        """Raise `PhaseError` where the engine cannot generate: asleep, or weights never pushed."""
        self.require(Memory.ENGINE_CACHE)
        self._require_written()

    def _require_written(self) -> None:
        if not self._weights_written:
            raise PhaseError(
                f"{Memory.ENGINE_WEIGHTS.value} used in phase {self.phase.value} before a push filled them"
            )

    def _leave(self, expected: Phase, action: str) -> None:
        if self.phase is not expected:
            raise PhaseError(f"cannot {action} in phase {self.phase.value}: possible only in phase {expected.value}")
