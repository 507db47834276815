"""Reads an adapter in PEFT's format into this rank's shard, and writes it from all ranks' shards."""

from __future__ import annotations

import json
import shutil
import sys
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
from megarl.parallel.exchange import first_decides
from megarl.policy.adapter import Adapter, Factors
from megarl.policy.policy import Policy
from megarl.reshard.adapter_map import adapters_of


def load_adapter(policy: Policy, folder: Path) -> None:
    """Fill the policy's adapter from PEFT's files in `folder`; each rank reads its parts.

    Raises `Refusal` as `megarl.formats.peft.open_adapter` does, and where a number is not finite.
    """
    adapter, settings = _adapter_of(policy), policy.config.adapter
    files = peft.open_adapter(folder, settings, policy.shape)
    with safe_open(folder / peft.TENSORS, framework="pt") as stored, torch.no_grad():
        for one in adapter.all_factors():
            a, b = (stored.get_slice(part.tensor)[part.rows, part.columns] for part in files.parts[one.place.name])
            for name, values in (("lora_A", a), ("lora_B", b)):
                if not torch.isfinite(values).all():
                    raise Refusal(
                        f"{one.place.name}.{name} in {folder / peft.TENSORS}",
                        "must be finite, and has NaN or infinity",
                        "use a whole copy of the adapter",
                    )
            one.lora_A.copy_(a[:, slice(*one.place.columns)])
            rows = b[slice(*one.place.rows)]
            one.lora_B.zero_()
            one.lora_B[: len(rows)] = rows
    policy.weights_changed()


def save_adapter(policy: Policy, folder: Path) -> None:
    """Write the policy's adapter to `folder` in PEFT's format, in the policy's precision.

    Collective. The folder appears under its name only when it is complete.
    """
    adapter, settings, shape = _adapter_of(policy), policy.config.adapter, policy.shape
    sizes = {
        peft.tensor_name(name, factor): dims
        for name, (outputs, inputs) in adapters_of(shape, settings.targets).items()
        for factor, dims in (("lora_A", (settings.rank, inputs)), ("lora_B", (outputs, settings.rank)))
    }
    files = HfFiles(sizes, policy.params_dtype, sys.maxsize, stem=Path(peft.TENSORS).stem)
    partial = folder.with_name(folder.name + ".partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        files.create(partial)
        config = peft.config_of(settings, shape, policy.config.model.path)
        (partial / peft.CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")

    first_decides(begin)
    written: list[str] = []
    for one in adapter.all_factors():
        for factor, box, data in _own(one):
            name = peft.tensor_name(one.place.name, factor)
            files.write(partial, name, box, data.detach().cpu())
            written.append(name)
    files.sync(partial, written)
    dist.barrier()
    if policy.world.is_first:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    dist.barrier()


def _own(one: Factors) -> list[tuple[str, tuple[tuple[int, int], ...], torch.Tensor]]:
    """What this rank writes of a layer's factors: name, rows and columns, and the data. Collective over the layer's
    tensor-parallel group."""
    place, groups = one.place, _groups(one.place.expert)
    a = one.lora_A.detach()
    if place.cut == "columns":
        parts = [torch.empty_like(a) for _ in range(place.shards)]
        dist.all_gather(parts, a.contiguous(), group=groups[0])
        a = torch.cat(parts, 1)
    if groups[1].rank() > 0:
        return []
    found: list[tuple[str, tuple[tuple[int, int], ...], torch.Tensor]] = []
    if place.shard == 0:
        found.append(("lora_A", ((0, len(a)), (0, place.inputs)), a))
    start, stop = place.rows[0], min(place.rows[1], place.outputs)
    if start < stop and (place.cut == "rows" or place.shard == 0):
        found.append(("lora_B", ((start, stop), (0, one.lora_B.shape[1])), one.lora_B[: stop - start]))
    return found


def _groups(expert: bool) -> tuple[Any, Any]:
    """The ranks that share out a layer, and those with the same share."""
    groups: Any = parallel_state
    if expert:
        return groups.get_expert_tensor_parallel_group(), groups.get_expert_data_parallel_group()
    return groups.get_tensor_model_parallel_group(), groups.get_data_parallel_group(with_context_parallel=True)


def _adapter_of(policy: Policy) -> Adapter:
    adapter = policy.network.adapter
    assert adapter is not None and Implied(policy.config).adapter is not None
    return adapter
