"""Where a weight push writes: the engine's tensors by vLLM's parameter names, in their shapes as loaded.

On a GPU these are the live parameters. The CPU backend packs linear weights after loading, so that the
parameter itself is empty: such a weight is written to a staging tensor and packed again by vLLM's own
code when its layer is complete. Packed copies that share a parameter, as a tied output head does with the
embedding, are packed again too. The experts of a layer are one module with stacks of weights; backends that
put these in an order of their own get them like packed ones (`megarl.rollout.experts`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn

from megarl.errors import MegarlError, Refusal
from megarl.ops.bits import Digest, as_numbers, digest
from megarl.ops.fp8 import E4M3, times_blocks
from megarl.reshard.boxes import Box
from megarl.reshard.copying import box_view
from megarl.rollout import experts
from megarl.rollout.phases import Memory, Phases

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """One engine parameter on this rank: `shape` and `dtype` as a checkpoint loader sees it.

    `num_rows` is shape[0] without the vocabulary's padding rows, which stay zero. `staged` says that it is
    written through a tensor that exists only between `buffer` and `finish`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_rows: int
    staged: bool


@dataclass(frozen=True, slots=True)
class _Print:
    """What a slot holds: digests of what can be read, and the packed copies. To most of these nothing can write: other
    weights come with another packed copy."""

    digests: tuple[Digest, ...]
    packed: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a slot lives: attribute of one module or, when tied, of several."""

    modules: tuple[nn.Module, ...]
    attribute: str


class Fillable(Protocol):
    """An engine that a push can fill: megarl's own, or plain vLLM."""

    phases: Phases

    def call_worker(self, function: Callable[..., T]) -> T: ...

    def weights_changed(self, version: int = 0) -> None: ...


def check_reloadable(engine: Fillable) -> None:
    """Raise `Refusal` where vLLM's own loader cannot fill an engine again."""
    model: nn.Module = engine.call_worker(lambda worker: worker.get_model())
    packed = next((path for path, module in model.named_modules() if experts.are_packed(module)), None)
    if packed is not None:
        raise Refusal(
            packed,
            "is packed by this backend in a way that vLLM's reload does not undo",
            "compare on a dense model, or on a backend that keeps experts as they are loaded",
        )


def load_by_name(engine: Fillable, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Fill an engine by vLLM's own loader, with whole tensors by their names in a Hugging Face checkpoint.

    vLLM restores its layers to what they were before packing, loads, and packs them again. Raises `PhaseError` where
    the engine's weights sleep.
    """
    engine.phases.require(Memory.ENGINE_WEIGHTS)
    engine.call_worker(lambda worker: worker.model_runner.reload_weights(weights_iterator=tensors))
    engine.weights_changed()


class EngineWeights:
    """The destination of a push: `begin`, then `buffer` for every slot and `finish` for complete layers, then `end`.

    Everything happens on this rank alone; nothing here communicates.
    """

    def __init__(self, engine: Fillable) -> None:
        self._engine = engine
        self._model: nn.Module = engine.call_worker(lambda worker: worker.get_model())
        self._slots, self._places = _find_slots(self._model)
        self.device = next(self._model.parameters()).device
        self._staged: dict[str, torch.Tensor] = {}
        # Staging tensors that were packed, for the next layer of their shape: fresh memory costs more than the copy.
        self._spare: dict[tuple[tuple[int, ...], torch.dtype], list[torch.Tensor]] = {}
        self._written: set[str] = set()
        self._finished: set[str] = set()
        self._open = False
        self._watched = False
        self._prints: dict[str, _Print] = {}
        # What slots that are not staged are digested by.
        self._boxes: dict[str, list[Box]] = {}

    def tensors(self) -> Mapping[str, WeightSlot]:
        """All slots by name; a tied output head has none of its own."""
        return self._slots

    def begin(self, *, watched: bool = False) -> None:
        """Start a push; `watched`: `changed` will be asked. Raises `PhaseError` where the engine's weights sleep."""
        self._engine.phases.require(Memory.ENGINE_WEIGHTS)
        self._watched = watched
        self._prints.clear()
        self._boxes.clear()
        self._written.clear()
        self._finished.clear()
        self._staged.clear()
        self._spare.clear()
        self._open = True

    def buffer(self, name: str) -> torch.Tensor:
        """The tensor to write slot `name` into, shape and dtype as in the slot; void after `finish`.

        Padding rows are zero already. Raises `MegarlError` outside of a push.
        """
        if not self._open:
            raise MegarlError(f"engine weight {name} written outside of a push")
        slot = self._slots[name]
        first = name not in self._written
        self._written.add(name)
        if slot.staged:
            if name not in self._staged:
                spare = self._spare.get((slot.shape, slot.dtype))
                made = spare.pop() if spare else torch.empty(slot.shape, dtype=slot.dtype, device=self.device)
                self._staged[name] = made
            found = self._staged[name]
        else:
            found = self._live(name).data
        if first and slot.num_rows < slot.shape[0]:
            found[slot.num_rows :].zero_()
        return found

    def finish(self, names: Iterable[str]) -> None:
        """Declare slots complete: vLLM packs their layers again, and other layers take the staging tensors.

        A layer's weight and bias are finished together; the two stacks of a layer's experts are packed when both
        are finished. Calling it layer by layer bounds the memory of a push; what is not finished by then is
        finished by `end`.
        """
        modules: dict[int, nn.Module] = {}
        packed: list[tuple[_Place, torch.Tensor]] = []
        filled: list[str] = []
        for name in names:
            self._finished.add(name)
            place = self._places[name]
            if experts.are_packed(place.modules[0]):
                self._finish_experts(name)
                continue
            filled.append(name)
            staged = self._staged.pop(name, None)
            if staged is not None:
                packed.append((place, staged))
            for module in place.modules:
                if staged is not None:
                    _replace(module, place.attribute, staged)
                if _is_packed(module):
                    modules[id(module)] = module
        with torch.no_grad():
            for module in modules.values():
                # The old copy goes before the new one is made.
                cast("Any", module).cpu_linear = None
                cast("Any", module.quant_method).process_weights_after_loading(module)
        for place, staged in packed:
            # Packing empties the parameter; where it did not, the tensor is the engine's now.
            if all(getattr(module, place.attribute).numel() == 0 for module in place.modules):
                self._spare.setdefault((tuple(staged.shape), staged.dtype), []).append(staged)
        self._note(filled)

    def _finish_experts(self, name: str) -> None:
        """Pack a layer's experts if `name` was the last of its stacks."""
        prefix = name.rpartition(".")[0]
        stacks = [f"{prefix}.{attribute}" for attribute in experts.STACKS]
        if self._finished.issuperset(stacks) and self._staged.keys() >= set(stacks):
            staged = {attribute: self._staged.pop(f"{prefix}.{attribute}") for attribute in experts.STACKS}
            experts.pack(self._places[name].modules[0], staged)
            self._note(stacks)

    def _note(self, names: Iterable[str]) -> None:
        """Remember what vLLM has made of staged slots."""
        if self._watched:
            self._prints.update((name, self._print(name)) for name in names if self._slots[name].staged)

    def end(self, known: Mapping[str, Sequence[tuple[Box, Digest]]] = MappingProxyType({}), version: int = 0) -> None:
        """Close the push of the weights `version`; the engine forgets cached prefixes.

        Raises `MegarlError` naming unwritten slots. Of a watched push `known` are digests of what was written into the
        boxes of slots: what is not staged need not be read again.
        """
        missing = [name for name in self._slots if name not in self._written]
        if missing:
            raise MegarlError(f"weight push incomplete: {len(missing)} engine weights not written, first {missing[0]}")
        self.finish([name for name in self._slots if name not in self._finished])
        self._spare.clear()
        self._open = False
        if self._watched:
            for name in self._slots.keys() - self._prints.keys():
                pieces = known.get(name, ())
                self._boxes[name] = [box for box, _ in pieces]
                digests = (*(one for _, one in pieces), *map(digest, self._in_use(name)))
                self._prints[name] = _Print(digests, self._packed(name)) if pieces else self._print(name)
        self._engine.weights_changed(version)

    def changed(self) -> list[str]:
        """Slots that no longer hold what the last push, a watched one, has left in them."""
        now = {name: self._print(name) for name in self._prints}
        found = {
            name
            for name, before in self._prints.items()
            if any(old is not new for old, new in zip(before.packed, now[name].packed, strict=True))
            or len(before.digests) != len(now[name].digests)
        }
        rest = [name for name in self._prints if name not in found]
        # All at once, as a GPU is waited for.
        old, new = (as_numbers([one for name in rest for one in of[name].digests]) for of in (self._prints, now))
        owners = [name for name in rest for _ in now[name].digests]
        found |= {name for name, differs in zip(owners, old != new, strict=True) if differs}
        return [name for name in self._prints if name in found]

    def _print(self, name: str) -> _Print:
        place = self._places[name]
        held = {id(one): one.detach() for one in (getattr(module, place.attribute) for module in place.modules)}
        parts = [part for one in held.values() if one.numel() for part in self._parts(name, one)]
        return _Print(tuple(map(digest, (*parts, *self._in_use(name)))), self._packed(name))

    def _parts(self, name: str, held: torch.Tensor) -> list[torch.Tensor]:
        boxes = self._boxes.get(name)
        return [box_view(held, box) for box in boxes] if boxes else [held]

    def _in_use(self, name: str) -> list[torch.Tensor]:
        """Stacks that a kernel multiplies with in place of a slot, where they can be read."""
        place = self._places[name]
        found = (_stacks_in_use(module).get(place.attribute) for module in place.modules)
        return [one for one in found if one is not None]

    def _packed(self, name: str) -> tuple[object, ...]:
        return tuple(vars(module).get("cpu_linear") for module in self._places[name].modules)

    def held(self, name: str) -> list[torch.Tensor]:
        """A slot's weight as the kernels of its modules use it, in the slot's shape; as in `read_back`."""
        place, slot = self._places[name], self._slots[name]
        found: list[torch.Tensor] = []
        for module in place.modules:
            parameter: nn.Parameter = getattr(module, place.attribute)
            if experts.are_packed(module):
                found.append(experts.unpack(module)[place.attribute])
                continue
            if parameter.numel():
                found.append(parameter.detach().view(slot.shape))
            if _is_packed(module) and slot.dtype == E4M3:
                found.append(_values_in_use(module, place.attribute))
            elif place.attribute == "weight" and _is_packed(module):
                found.append(_unpack(module))
        return found

    def read_back(self) -> dict[str, torch.Tensor]:
        """The weights as the engine's kernels use them, by module path; for tests and diagnosis.

        Packed weights cannot be looked at: a kernel multiplies the identity matrix, which gives every weight
        exactly. Packed copies beside a readable parameter come under `<name> (packed)`. Experts, packed or not, come
        in the shapes of their slots.
        """
        found: dict[str, torch.Tensor] = {}
        for path, module in self._model.named_modules():
            if experts.are_packed(module):
                found |= {f"{path}.{name}": stack for name, stack in experts.unpack(module).items()}
                continue
            for attribute, parameter in module.named_parameters(recurse=False):
                name = f"{path}.{attribute}"
                if parameter.numel():
                    found[name] = parameter.detach().clone()
                if attribute == "weight" and _is_packed(module):
                    found[f"{name} (packed)" if parameter.numel() else name] = _unpack(module)
                elif attribute in _stacks_in_use(module):
                    found[f"{name} (packed)"] = _stacks_in_use(module)[attribute].clone()
        return found

    def checksum(self) -> str:
        """BLAKE2b hash over `read_back`."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.read_back().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _live(self, name: str) -> nn.Parameter:
        place = self._places[name]
        return getattr(place.modules[0], place.attribute)


def _find_slots(model: nn.Module) -> tuple[dict[str, WeightSlot], dict[str, _Place]]:
    """All distinct parameters with their as-loaded shapes, and the modules that hold each."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    slots: dict[str, WeightSlot] = {}
    places: dict[str, _Place] = {}
    name_of: dict[int, str] = {}
    for path, module in model.named_modules():
        # vLLM records every layer's tensors on the meta device before it loads and packs them.
        loaded = get_layerwise_info(module).restore_metadata[0]
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) in name_of:
                known = places[name_of[id(parameter)]]
                places[name_of[id(parameter)]] = _Place((*known.modules, module), known.attribute)
                continue
            name = f"{path}.{attribute}"
            name_of[id(parameter)] = name
            pattern = loaded.get(attribute, parameter)
            # A bias may have been cast while packing; it was loaded in its weight's type, FP8 aside.
            cast_bias = attribute == "bias" and "weight" in loaded and loaded["weight"].element_size() > 1
            dtype = loaded["weight"].dtype if cast_bias else pattern.dtype
            shape = tuple(pattern.shape)
            # Packed experts can have the shape they were loaded in.
            staged = tuple(parameter.shape) != shape or parameter.dtype != dtype or experts.are_packed(module)
            vocabulary = cast("Any", getattr(module, "shard_indices", None))
            rows = vocabulary.num_org_elements if vocabulary is not None else shape[0]
            slots[name] = WeightSlot(name, shape, dtype, rows, staged)
            places[name] = _Place((module,), attribute)
    return slots, places


def _is_packed(module: nn.Module) -> bool:
    """Whether vLLM's CPU backend keeps a packed copy of this layer's weight."""
    return hasattr(module, "cpu_linear")


def _replace(module: nn.Module, attribute: str, staged: torch.Tensor) -> None:
    """Give a packed layer its weight back, as it was before packing."""
    parameter = nn.Parameter(staged, requires_grad=False)
    vars(parameter).update(vars(getattr(module, attribute)))
    setattr(module, attribute, parameter)


def _values_in_use(module: nn.Module, attribute: str) -> torch.Tensor:
    """The FP8 values of a weight or a stack by what the CPU multiplies with (`megarl.rollout.cpu_fp8`): exact."""
    scales = getattr(module, f"{attribute}_scale_inv")
    numbers = _unpack(module) if attribute == "weight" else _stacks_in_use(module)[attribute]
    return times_blocks(numbers.float(), 1.0 / scales).to(E4M3)


def _stacks_in_use(module: nn.Module) -> dict[str, torch.Tensor]:
    """What the CPU multiplies with of experts in FP8, by the names of the values it is made of; else nothing."""
    packed = vars(module).get("cpu_linear")
    return dict(zip(experts.STACKS, packed, strict=True)) if isinstance(packed, tuple) else {}


def _unpack(module: nn.Module) -> torch.Tensor:
    """Weight (N, K) of a packed layer, through its kernel."""
    layer = cast("Any", module)
    # A replicated layer has one size alone.
    columns = getattr(layer, "input_size_per_partition", None) or layer.input_size
    identity = torch.eye(columns, dtype=layer.params_dtype)
    with torch.no_grad():
        return layer.quant_method.apply(layer, identity, None).t().contiguous()
