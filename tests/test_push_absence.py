"""A rank that dies or stops in the midst of a push: the others end in time and say who and at which parameter."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from reshard_reference import make_shape, random_checkpoint, slice_reader
from reshard_worlds import Case, blank
from torch.multiprocessing import get_context

from megarl.config.sections import ParallelSettings
from megarl.reshard.copying import read_local
from megarl.weights.transfer import Mover, PushError

CASE = Case(make_shape(num_layers=4), ParallelSettings(tensor=2, pipeline=2), 1, False, 4, 4)
LIMIT = 4.0


class Failing(Mover):
    """A mover that sends its own process a signal at a round."""

    failure: tuple[int, int]
    posted = 0

    def _post(self, operations: list[dist.P2POp], messages: Any) -> list[Any]:
        number, deed = self.failure
        if self.posted == number:
            os.kill(os.getpid(), deed)
        self.posted += 1
        return super()._post(operations, messages)


class Tensors:
    def __init__(self, rank: int) -> None:
        self.tensors = {name: tensor.float() for name, tensor in blank(CASE.engine_of(rank)).items()}

    def buffer(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def complete(self, name: str) -> None:
        pass


def take_part(rank: int, folder: str, failing: int, deed: int) -> None:
    """Push twice; the second time rank `failing` does `deed` to itself. Writes what is said, after how long."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=CASE.world)
    reader = slice_reader(random_checkpoint(CASE.shape))
    sources = {name: read_local(tensor, reader, torch.float32) for name, tensor in CASE.policy(rank).items()}
    before = {name: tensor.clone() for name, tensor in sources.items()}
    plan = CASE.plan(rank, 300)
    assert len(plan.rounds) > 8
    mover = Failing(plan, dtype=torch.float32, device=torch.device("cpu"), time_limit=LIMIT)
    mover.failure = (len(plan.rounds) + 3 if rank == failing else -1, deed)
    mover.run(sources, Tensors(rank))
    start = time.monotonic()
    try:
        mover.run(sources, Tensors(rank))
        said = "all arrived"
    except PushError as error:
        said = str(error)
    intact = all(torch.equal(sources[name], before[name]) for name in before)
    Path(folder, str(rank)).write_text(f"{time.monotonic() - start} {intact} {said}")
    os._exit(0)


@pytest.mark.parametrize("deed, longest", [(signal.SIGKILL, 3.0), (signal.SIGSTOP, LIMIT + 12)])
@pytest.mark.parametrize("failing", [0, 3])
def test_the_others_end_in_time_and_name_the_rank(deed: int, longest: float, failing: int):
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("fork")
        ranks = [
            context.Process(target=take_part, args=(rank, folder, failing, int(deed))) for rank in range(CASE.world)
        ]
        for process in ranks:
            process.start()
        others = [rank for rank in range(CASE.world) if rank != failing]
        for rank in others:
            ranks[rank].join(60)
        ranks[failing].kill()
        ranks[failing].join()
        what = "is gone" if deed == signal.SIGKILL else f"took no part for {LIMIT:g} s (weights.time_limit)"
        for rank in others:
            seconds, intact, said = Path(folder, str(rank)).read_text().split(" ", 2)
            assert float(seconds) < longest and intact == "True"
            assert said.startswith(f"weight push: rank {failing} {what}; rank {rank} ")
            assert re.search(r"rank \d (waited for|had) (model|lm_head)[\w.]* (from|for) rank \d\. The policy's", said)
