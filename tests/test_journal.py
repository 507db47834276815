"""Completions of a step that no checkpoint has: what is read again, and what is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from config_case import RUN
from torch._C._distributed_c10d import HashStore

from megarl.config.schema import RunConfig
from megarl.records import Key
from megarl.rollout.engine import Completion
from megarl.train import journal
from megarl.train.journal import Journal

FIRST = Completion(0, (5, 6, 7), (-0.1, -2.5, -1e-8), "stop")
SECOND = Completion(1, (8,), (-0.30000001192092896,), "length")
KEYS = {"first": Key(3, 0, 0), "second": Key(3, 1, 0, "thinking", (2, 1))}


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """A world of one rank."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config(**changes: Any) -> RunConfig:
    return RunConfig.model_validate(RUN | changes)


def made(folder: Path, step: int = 4, rank: int = 0, **changes: Any) -> Journal:
    return journal.step_journal(folder, step, config(**changes), rank=rank, writes=True)


def written(folder: Path, rank: int = 0) -> None:
    """A journal of step 4 with both completions."""
    own = made(folder, rank=rank)
    own.add(KEYS["first"], FIRST)
    own.add(KEYS["second"], SECOND)


def test_what_was_kept_comes_back_bit_for_bit_without_being_closed(tmp_path: Path):
    written(tmp_path)
    again = made(tmp_path, rank=1)
    assert len(again) == 2 and again.knows(KEYS["first"]) and not again.knows(Key(3, 2, 0))
    found = again.take(KEYS["first"], 17)
    assert found == Completion(17, FIRST.token_ids, tuple(again.take(KEYS["first"], 0).log_probs), "stop")
    assert found.token_ids == (5, 6, 7) and found.log_probs[2] == pytest.approx(-1e-8)
    assert again.take(KEYS["second"], 1) == SECOND


def test_only_the_same_step_under_the_same_settings_is_read(tmp_path: Path):
    written(tmp_path)
    assert len(made(tmp_path, step=5)) == 0
    assert len(made(tmp_path, seed=99)) == 0
    # What changes no number of a rollout by more than rounding.
    assert len(made(tmp_path, name="other", parallel={"processes": 4, "tensor": 2}, resume="auto")) == 2


@pytest.mark.parametrize("cut", [1, 5, 12, 30])
def test_a_torn_record_ends_the_reading_and_what_follows_goes_elsewhere(tmp_path: Path, cut: int):
    written(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-cut])
    again = made(tmp_path)
    assert len(again) == 1 and again.knows(KEYS["first"])
    again.add(KEYS["second"], SECOND)
    assert len(list(tmp_path.iterdir())) == 2
    assert len(made(tmp_path)) == 2


def test_what_is_known_is_not_written_again_and_a_silent_rank_writes_nothing(tmp_path: Path):
    written(tmp_path)
    again = made(tmp_path, rank=1)
    again.add(KEYS["first"], FIRST)
    silent = journal.step_journal(tmp_path, 4, config(), rank=2, writes=False)
    silent.add(Key(9, 9, 0), FIRST)
    assert len(list(tmp_path.iterdir())) == 1


def test_all_ranks_files_are_read_and_steps_with_a_checkpoint_are_forgotten(tmp_path: Path):
    made(tmp_path, rank=0).add(KEYS["first"], FIRST)
    made(tmp_path, rank=6).add(KEYS["second"], SECOND)
    assert len(made(tmp_path, rank=1)) == 2
    journal.forget(tmp_path, 3)
    assert len(made(tmp_path)) == 2
    journal.forget(tmp_path, 4)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_journal_is_passed_over(tmp_path: Path):
    (tmp_path / "step_000004.rank_0000.bin").write_bytes(b"\x00\xff" * 100)
    assert len(made(tmp_path)) == 0
