"""Reads an adapter in PEFT's format into this rank's shard, and writes it from all ranks' shards."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import safe_open

from megarl.config.implied import Implied
from megarl.errors import Refusal
from megarl.formats import peft
from megarl.formats.huggingface import HfFiles
from megarl.parallel.exchange import gather_all
from megarl.parallel.whole_folder import whole_folder
from megarl.policy.adapter import Adapter, Factors
from megarl.policy.model import copy_number
from megarl.policy.policy import Policy
from megarl.reshard.adapter_map import LowRank
from megarl.reshard.boxes import whole


def load_adapter(policy: Policy, folder: Path) -> None:
    """Fill the policy's adapter from PEFT's files in `folder`; each rank reads its parts. Collective.

    Raises `Refusal` on all ranks as `megarl.formats.peft.open_adapter` does, and for numbers that are not finite or
    are another base's.
    """
    files = peft.open_adapter(folder, policy.config.adapter, policy.shape)
    with torch.no_grad():
        problems = gather_all(next(_read(policy, files), None))
    for problem in problems:
        if problem is not None:
            raise Refusal(f"{folder / peft.TENSORS}", problem, "use a whole copy of the adapter, with its own base")
    policy.weights_changed()


def _read(policy: Policy, files: peft.AdapterFiles) -> Iterator[str]:
    """Fill this rank's factors; yields what cannot be used, in words."""
    attachment = policy.network.attachment
    assert attachment is not None
    with safe_open(files.folder / peft.TENSORS, framework="pt") as stored:

        def read(part: peft.Part) -> torch.Tensor:
            return stored.get_slice(part.tensor)[part.rows, :][:, part.columns]

        for one in _adapter_of(policy).all_factors():
            name = one.place.name
            a, b = (read(part) for part in files.parts[name])
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                yield f"must be finite, and has NaN or infinity for {name}"
            if (beside := files.zeros.get(name)) is not None and read(beside).any():
                yield f"must have {beside.tensor} zero where {name} meets the other's A"
            one.lora_A.copy_(a[:, slice(*one.place.columns)])
            rows = b[slice(*one.place.rows)]
            one.lora_B.zero_()
            one.lora_B[: len(rows)] = rows
        if files.head is not None and (head := attachment.head_weight()) is not None:
            place, weight = head
            rows = stored.get_slice(files.head)[slice(*place.rows), :].to(weight)
            if not torch.equal(rows, weight[: len(rows)]):
                yield f"must have the output layer of this run's base as {files.head}"


def save_adapter(policy: Policy, folder: Path) -> None:
    """Write the policy's adapter to `folder` in PEFT's format, in the policy's precision.

    Collective. The folder appears under its name only when it is complete.
    """
    adapter, settings, shape = _adapter_of(policy), policy.config.adapter, policy.shape
    sizes, places = peft.written(shape, settings)
    files = HfFiles(sizes, policy.params_dtype, sys.maxsize, stem=Path(peft.TENSORS).stem)

    def begin(partial: Path) -> None:
        files.create(partial)
        config = peft.config_of(settings, shape, policy.config.model.path)
        (partial / peft.CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")

    with whole_folder(folder, begin) as partial:
        written: list[str] = []
        for name, own in _by_tensor(adapter, places).items():
            tensor = torch.zeros(sizes[name], dtype=policy.params_dtype, device=policy.world.device)
            for one, factor, part in own:
                _put(tensor[part.rows, part.columns], one, factor)
            group, is_first = _holders(own[0][0].place)
            # Each rank's part, and zeros elsewhere.
            dist.all_reduce(tensor, group=group)
            if is_first:
                files.write(partial, name, whole(sizes[name]), tensor.cpu())
                written.append(name)
        files.sync(partial, written)


def _by_tensor(
    adapter: Adapter, places: peft.AdapterFiles
) -> dict[str, list[tuple[Factors, torch.nn.Parameter, peft.Part]]]:
    """What this rank has of each tensor of the file, in the order of the forward pass."""
    found: dict[str, list[tuple[Factors, torch.nn.Parameter, peft.Part]]] = {}
    for one in adapter.all_factors():
        for factor, part in zip((one.lora_A, one.lora_B), places.parts[one.place.name], strict=True):
            found.setdefault(part.tensor, []).append((one, factor, part))
    return found


def _put(target: torch.Tensor, one: Factors, factor: torch.nn.Parameter) -> None:
    """Copy this rank's part of a factor into its place in the whole; of copies that several ranks have, the first's."""
    place = one.place
    if place.shard > 0 and any(factor is copy for copy in one.copies):
        return
    if factor is one.lora_A:
        target[:, slice(*place.columns)] = factor.detach()
    else:
        rows = target[slice(*place.rows)]
        rows.copy_(factor.detach()[: len(rows)])


def _holders(place: LowRank) -> tuple[Any, bool]:
    """The ranks that have a tensor of the file together, and whether this one writes it."""
    groups: Any = parallel_state
    if place.expert:
        group = groups.get_expert_tensor_and_model_parallel_group()
    else:
        group = groups.get_tensor_model_parallel_group()
    return group, copy_number(expert=place.expert) == 0 and group.rank() == 0


def _adapter_of(policy: Policy) -> Adapter:
    adapter = policy.network.adapter
    assert adapter is not None and Implied(policy.config).adapter is not None
    return adapter
