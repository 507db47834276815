"""The push's checksum: silent where all arrived, and naming both ranks and the parameter where one bit did not."""

from __future__ import annotations

import re
from typing import Any

import parity
import pytest
import torch
from reshard_reference import make_shape, random_checkpoint, rank_tensors, slice_reader
from reshard_worlds import layout_of, plan_of

from megarl.ops.bits import as_numbers, digest, weighted_sum
from megarl.reshard.wire import Kind, Wire, all_in

SHAPE = make_shape(num_layers=2)


def mixed(name: str) -> Kind:
    """Types of tensors that travel together."""
    return ("e4m3", "bf16", "fp32")[len(name) % 3]


#: How tensors of a type travel.
WIRES: dict[str, tuple[torch.dtype, Wire]] = {
    "fp32": (torch.float32, all_in("fp32")),
    "bf16": (torch.bfloat16, all_in("bf16")),
    "mixed": (torch.float32, mixed),
}


def verified(world: Any, cases: list[tuple[str, int | None, bool]]) -> list[str]:
    """What this rank says of pushes from TP 2 to TP 1, of each of `WIRES`, one rank sending a bit wrong, or two
    elements in each other's place. For `run_world`."""
    return [push(world, *case) for case in cases]


def push(world: Any, wired: str, bad_rank: int | None, swapped: bool) -> str:
    import torch.distributed as dist

    from megarl.reshard.copying import read_local
    from megarl.reshard.weight_map import vllm_tensors
    from megarl.weights.transfer import Mover, PushError

    dtype, wire = WIRES[wired]

    class Flipping(Mover):
        def _post(self, operations: list[dist.P2POp], messages: Any) -> list[Any]:
            sent = [operation for operation in operations if operation.op is dist.isend]
            if self.plan.rank == bad_rank and sent and swapped:
                elements = sent[0].tensor.view(dtype)
                elements[:2] = elements[:2].flip(0)
            elif self.plan.rank == bad_rank and sent:
                sent[0].tensor.view(torch.int16)[3] ^= 4
            return super()._post(operations, messages)

    class Tensors:
        def __init__(self) -> None:
            self.tensors = {name: torch.zeros(one.shape, dtype=dtype) for name, one in targets[world.rank].items()}

        def buffer(self, name: str) -> torch.Tensor:
            return self.tensors[name]

        def complete(self, name: str) -> None:
            pass

    cut = {"tensor": 2, "pipeline": 1, "pipeline_rank": 0}
    sources = [rank_tensors(SHAPE, tensor_rank=rank, **cut) for rank in range(2)]
    targets = [vllm_tensors(SHAPE, tensor=1, tensor_rank=0) for _ in range(2)]
    reader = slice_reader(random_checkpoint(SHAPE))
    mine = {name: read_local(one, reader, dtype) for name, one in sources[world.rank].items()}
    plan = plan_of(world.rank, layout_of(sources), layout_of(targets), [0, 0], None, 600, wire)
    mover = Flipping(plan, device=torch.device("cpu"), time_limit=60.0)
    assert len(plan.rounds) > 3
    if bad_rank is not None:
        # What is known of one push does not help the next.
        bad_rank, bad = None, bad_rank
        mover.run(mine, Tensors(), verify=True)
        bad_rank = bad
    try:
        mover.run(mine, Tensors(), verify=True)
    except PushError as error:
        return str(error)
    return "as sent"


def test_one_wrong_bit_is_found_and_both_ranks_are_named():
    cases = [
        ("fp32", 1, False),
        ("bf16", 0, False),
        ("fp32", 0, True),
        ("mixed", 1, False),
        *((wired, None, False) for wired in WIRES),
    ]
    for said in parity.run_world("test_push_checksum", "verified", 2, cases):
        assert said[4:] == ["as sent"] * 3
        found = (
            r"what rank {} sent to rank {} is not what lies in rank {}'s engine, in [a-z_0-9.]+\.weight\. The policy"
        )
        assert re.search(found.format(1, 0, 0), said[0])
        assert re.search(found.format(0, 1, 1), said[1])
        assert re.search(found.format(0, 1, 1), said[2])
        assert re.search(found.format(1, 0, 0), said[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_digest_is_that_of_the_elements_in_their_order(dtype: torch.dtype):
    """Wherever they lie; on every device another element, and two in each other's place, give another."""
    whole = torch.randn(700, 320, generator=torch.Generator().manual_seed(1)).to(dtype)
    view = whole[100:600, 7:300]
    assert digest(view) == digest(view.contiguous()) == digest(view.contiguous().view(1, 500, 293))
    other, swapped = view.clone(), view.clone()
    other[499, 292] += 1
    swapped[[3, 498]] = swapped[[498, 3]]
    assert len({digest(one) for one in (view, other, swapped, view.t())}) == 4
    # What a GPU computes: the sum of the bits, each times an odd number that grows.
    numbers = view.contiguous().view(torch.int16 if dtype == torch.bfloat16 else torch.int32).flatten().tolist()
    wanted = sum(number * (2 * i + 1) for i, number in enumerate(numbers)) % 2**64
    assert int(as_numbers([weighted_sum(view)])[0]) == wanted
