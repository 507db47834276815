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
#: On two nodes, each of which holds all.
PAIRS = Case(make_shape(num_layers=4), ParallelSettings(tensor=2), 1, False, 4, 2)
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
    def __init__(self, case: Case, rank: int) -> None:
        self.tensors = {name: tensor.float() for name, tensor in blank(case.engine_of(rank)).items()}

    def buffer(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def complete(self, name: str) -> None:
        pass


def take_part(rank: int, case: Case, folder: str, failing: int, deed: int, late: bool) -> None:
    """Push twice; the second time rank `failing` does `deed` to itself, or `late`, before the last round. Writes what
    is said, after how long."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=case.world)
    reader = slice_reader(random_checkpoint(case.shape))
    sources = {name: read_local(tensor, reader, torch.float32) for name, tensor in case.policy(rank).items()}
    before = {name: tensor.clone() for name, tensor in sources.items()}
    plan = case.plan(rank, 300)
    assert len(plan.rounds) > 8
    mover = Failing(plan, device=torch.device("cpu"), time_limit=LIMIT)
    posts = 2 * len(plan.rounds) - 1 if late else len(plan.rounds) + 3
    mover.failure = (posts if rank == failing else -1, deed)
    mover.run(sources, Tensors(case, rank), verify=late)
    start = time.monotonic()
    try:
        mover.run(sources, Tensors(case, rank), verify=late)
        said = "all arrived"
    except PushError as error:
        said = str(error)
    intact = all(torch.equal(sources[name], before[name]) for name in before)
    Path(folder, str(rank)).write_text(f"{time.monotonic() - start} {intact} {said}")
    os._exit(0)


def said_by_the_others(case: Case, failing: int, deed: int, late: bool) -> dict[int, tuple[float, str, str]]:
    """What every rank but `failing` says: seconds, whether its weights are intact, the error."""
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("fork")
        ranks = [
            context.Process(target=take_part, args=(rank, case, folder, failing, int(deed), late))
            for rank in range(case.world)
        ]
        for process in ranks:
            process.start()
        others = [rank for rank in range(case.world) if rank != failing]
        for rank in others:
            ranks[rank].join(60)
        ranks[failing].kill()
        ranks[failing].join()
        found = {}
        for rank in others:
            seconds, intact, said = Path(folder, str(rank)).read_text().split(" ", 2)
            found[rank] = float(seconds), intact, said
        return found


@pytest.mark.parametrize("deed, longest", [(signal.SIGKILL, 3.0), (signal.SIGSTOP, LIMIT + 12)])
@pytest.mark.parametrize("failing", [0, 3])
def test_the_others_end_in_time_and_name_the_rank(deed: int, longest: float, failing: int):
    what = "is gone" if deed == signal.SIGKILL else f"took no part for {LIMIT:g} s (weights.time_limit)"
    for rank, (seconds, intact, said) in said_by_the_others(CASE, failing, deed, False).items():
        assert seconds < longest and intact == "True"
        assert said.startswith(f"weight push: rank {failing} {what}; rank {rank} ")
        assert re.search(r"rank \d (waited for|had) (model|lm_head)[\w.]* (from|for) rank \d\. The policy's", said)


@pytest.mark.parametrize("deed", [signal.SIGKILL, signal.SIGSTOP])
def test_ranks_that_are_done_name_it_too(deed: int):
    """Two pairs of ranks that have nothing to do with each other; one of the second pair fails at the very end."""
    found = said_by_the_others(PAIRS, 3, deed, True)
    for rank, (seconds, intact, said) in found.items():
        assert seconds < LIMIT + 12 and intact == "True"
        assert said.startswith(("weight push: rank 3 is gone; ", "weight push: rank 3 took no part for "))
        assert rank == 2 or said.split("; ")[1].startswith(f"rank {rank} had done its part.")
