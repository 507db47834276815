"""What a run carries from step to step beside its weights: where it is, and named states, in every checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

Value = TypeVar("Value")


class Stateful(Protocol):
    """Owner of a state that a run carries. All ranks have the same: rank 0's is saved, and restored on all."""

    def state(self) -> Any:
        """What there is to save, of JSON's types, keys being text. It is asked for at the end of every step: it should
        share what is large and not copy it, and later steps leave what was returned as it is."""
        ...

    def restore(self, state: Any) -> None:
        """Be as when `state` was returned."""
        ...


class Sharded(Protocol):
    """Owner of a state that is too large for every rank to have: each has a part, in files of a checkpoint."""

    def state(self) -> Any:
        """This rank's part, None where no rank has any; later steps leave what was returned as it is."""
        ...

    def write(self, state: Any, folder: Path) -> None:
        """Write what `state` has returned, under names of the owner's own."""
        ...

    def read(self, folder: Path) -> None:
        """Be as when what is in `folder` was written, by these ranks or by others."""
        ...


@dataclass
class Progress:
    """Saved with every checkpoint, beside the states of `Carry`. `step` counts finished steps."""

    step: int = 0
    accuracy_before: float | None = None
    skipped_updates: int = 0
    evaluation_due: bool = False
    """An evaluation was begun and not finished."""

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Be where a checkpoint was that has `saved`, among other things."""
        for field in dataclasses.fields(self):
            if field.name in saved:
                setattr(self, field.name, saved[field.name])


class Carry:
    """The states of a run, each by its name with its owner.

    A checkpoint has what they were when the last whole step ended: a step that is given up in its midst, as a run may
    be asked to stop there, leaves no trace, and is made again.
    """

    def __init__(self, owners: Mapping[str, Stateful], sharded: Mapping[str, Sharded] | None = None) -> None:
        self._owners, self._sharded = dict(owners), dict(sharded or {})
        self._states: dict[str, Any] = {}
        self._parts: dict[str, Any] = {}
        self.step_ends()

    def step_ends(self) -> None:
        """Take the states as they are now for those that are saved."""
        self._states = {name: owner.state() for name, owner in self._owners.items()}
        self._parts = {name: owner.state() for name, owner in self._sharded.items()}

    def states(self) -> dict[str, Any]:
        """What a checkpoint keeps, by name; of what is sharded, whether there is anything."""
        return self._states | {name: part is not None for name, part in self._parts.items()}

    def write(self, folder: Path) -> None:
        """Write this rank's part of the states that are sharded."""
        for name, owner in self._sharded.items():
            owner.write(self._parts[name], folder)

    def restore(self, states: Mapping[str, Any], folder: Path | None = None, *, anew: Collection[str] = ()) -> None:
        """Give every owner the state that was saved, in `states` or `folder`, but for those `anew`, which begin as in
        a new run."""
        for name, owner in self._owners.items():
            if name not in anew:
                owner.restore(states[name])
        for name, owner in self._sharded.items():
            if name not in anew and folder is not None:
                owner.read(folder)
        self.step_ends()


class Table(dict[str, Value], Generic[Value]):
    """A table that a run carries. A value is replaced as a whole, never changed in place: a saved one may be it."""

    def state(self) -> dict[str, Value]:
        """A copy."""
        return dict(self)

    def restore(self, state: Mapping[str, Value]) -> None:
        """Have what `state` has, and nothing else."""
        self.clear()
        self.update(state)


class Counters(Table[int]):
    """Counters of the whole run."""

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter; one that is 0 has no entry."""
        if amount:
            self[name] = self.get(name, 0) + amount
