"""Sources that compute what leaves a policy: what arrives is what they made, and each tensor is made once a round."""

from __future__ import annotations

from typing import Any

import parity
import torch
from reshard_reference import make_shape, random_checkpoint, rank_tensors, slice_reader
from reshard_worlds import layout_of, plan_of

from megarl.reshard.wire import Kind, all_in

SHAPE = make_shape(num_layers=2)
SCALE = 3.0


def low_rank(name: str, dims: torch.Size) -> torch.Tensor:
    """A product of two thin matrices of small whole numbers, so that every sum of theirs is exact; 0 for vectors."""
    if len(dims) < 2:
        return torch.zeros(dims, dtype=torch.float64)
    drawn = torch.Generator().manual_seed(len(name))
    up, down = (torch.randint(-4, 5, size, generator=drawn).double() for size in ((dims[0], 2), (2, dims[1])))
    return SCALE * (up @ down)


def moved(world: Any, kinds: list[Kind]) -> list[tuple[list[str], list[str], int, int]]:
    """A push of merged weights from TP 2 to TP 1, of each type: tensors that are not the merged checkpoint's, matrices
    that are the unmerged one's, how often a tensor was computed, and how often one was due. For `run_world`."""
    return [push(world, kind) for kind in kinds]


def push(world: Any, kind: Kind) -> tuple[list[str], list[str], int, int]:
    from megarl.reshard.copying import read_local
    from megarl.reshard.weight_map import vllm_tensors
    from megarl.weights.transfer import TORCH, Mover

    dtype = TORCH[kind]
    cut = {"tensor": 2, "pipeline": 1, "pipeline_rank": 0}
    layouts = [rank_tensors(SHAPE, tensor_rank=rank, **cut) for rank in range(2)]
    targets = [vllm_tensors(SHAPE, tensor=1, tensor_rank=0) for _ in range(2)]
    plain = random_checkpoint(SHAPE)
    changes = {name: low_rank(name, tensor.shape) for name, tensor in plain.items()}

    class Merged:
        """This rank's weights, each with its share of the products added."""

        computed = 0

        def __getitem__(self, name: str) -> torch.Tensor:
            self.computed += 1
            parts = (
                read_local(layouts[world.rank][name], slice_reader(one), torch.float32) for one in (plain, changes)
            )
            return torch.add(*parts)

    class Tensors:
        def __init__(self) -> None:
            self.found = {name: torch.zeros(one.shape, dtype=dtype) for name, one in targets[world.rank].items()}

        def buffer(self, name: str) -> torch.Tensor:
            return self.found[name]

        def complete(self, name: str) -> None:
            pass

    plan = plan_of(world.rank, layout_of(layouts), layout_of(targets), [0, 0], None, 600, all_in(kind))
    source, arrived = Merged(), Tensors()
    Mover(plan, device=torch.device("cpu"), time_limit=60.0).run(source, arrived, verify=True)
    due = 0
    for one in plan.rounds:
        leaving = [t for message in one.messages if not message.incoming for t in message.transfers]
        due += len({t.source_name for t in (*leaving, *one.local)})

    def equal_to(checkpoint: dict[str, torch.Tensor]) -> set[str]:
        wanted = {name: read_local(one, slice_reader(checkpoint)) for name, one in targets[world.rank].items()}
        return {name for name, one in wanted.items() if torch.equal(arrived.found[name], one.float().to(dtype))}

    merged = equal_to({name: tensor + changes[name] for name, tensor in plain.items()})
    unmerged = sorted(name for name in equal_to(plain) if arrived.found[name].dim() > 1)
    return sorted(arrived.found.keys() - merged), unmerged, source.computed, due


def test_merged_weights_arrive_in_place_of_those_that_are_trained() -> None:
    for rank in parity.run_world("test_weight_source", "moved", 2, ["fp32", "bf16"]):
        for wrong, unmerged, computed, due in rank:
            assert (wrong, unmerged) == ([], [])
            assert computed == due > 10
