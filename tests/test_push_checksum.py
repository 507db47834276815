"""The push's checksum: silent where all arrived, and naming both ranks where one bit did not."""

from __future__ import annotations

from typing import Any

import parity
import torch
from reshard_reference import make_shape, random_checkpoint, rank_tensors, slice_reader
from reshard_worlds import layout_of, plan_of

SHAPE = make_shape(num_layers=2)


def verified(world: Any, cases: list[tuple[torch.dtype, int | None]]) -> list[str]:
    """What this rank says of pushes from TP 2 to TP 1, of each type, one rank sending a bit wrong. For `run_world`."""
    return [push(world, dtype, bad_rank) for dtype, bad_rank in cases]


def push(world: Any, dtype: torch.dtype, bad_rank: int | None) -> str:
    import torch.distributed as dist

    from megarl.reshard.copying import read_local
    from megarl.reshard.weight_map import vllm_tensors
    from megarl.weights.transfer import Mover, PushError

    class Flipping(Mover):
        def _post(self, operations: list[dist.P2POp], messages: Any) -> list[Any]:
            sent = [operation for operation in operations if operation.op is dist.isend]
            if self.plan.rank == bad_rank and sent:
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
    plan = plan_of(world.rank, layout_of(sources), layout_of(targets), [0, 0], None, 600 // dtype.itemsize)
    mover = Flipping(plan, dtype=dtype, device=torch.device("cpu"), time_limit=60.0)
    assert len(plan.rounds) > 3
    try:
        mover.run(mine, Tensors(), verify=True)
    except PushError as error:
        return str(error)
    return "as sent"


def test_one_wrong_bit_is_found_and_both_ranks_are_named():
    cases = [(torch.float32, None), (torch.bfloat16, None), (torch.float32, 1), (torch.bfloat16, 0)]
    for said in parity.run_world("test_push_checksum", "verified", 2, cases):
        assert said[:2] == ["as sent"] * 2
        assert "what rank 1 sent to rank 0 is not what lies in rank 0's engine" in said[2]
        assert "what rank 0 sent to rank 1 is not what lies in rank 1's engine" in said[3]
