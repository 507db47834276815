"""docs/data_flow.md: its numbers are the quickstart's, and its example is what the code answers."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from docs_case import DOCS, ROOT

from megarl.config.grid import grid_of_rank
from megarl.config.implied import Implied
from megarl.config.load import load_config
from megarl.data.packing import microbatches
from megarl.parallel.bootstrap import World
from megarl.parallel.vocab import vocabulary_shard
from megarl.reshard.weight_map import padded_vocab_size

PAGE = DOCS / "data_flow.md"
SCRIPT = (ROOT / "launch" / "quickstart.sh").read_text()
QUICKSTART = load_config(ROOT / "configs" / "quickstart.yaml")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[World]:
    """A world of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield World(0, 1, 0, 1, (0,), torch.device("cpu"))
    dist.destroy_process_group()


def rows(header: str) -> list[list[str]]:
    """The cells of the table with that header."""
    lines = PAGE.read_text().splitlines()
    first = lines.index(header) + 2
    end = next(number for number in range(first, len(lines)) if not lines[number].startswith("|"))
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[first:end]]


def test_the_example_is_what_the_code_answers(alone: World) -> None:
    one = QUICKSTART.model_copy(
        update={"parallel": QUICKSTART.parallel.model_copy(update={"processes": 1, "tensor": 1})}
    )
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    found = doctest.testfile(
        str(PAGE), module_relative=False, globs={"config": one, "alone": alone}, optionflags=options, encoding="utf-8"
    )
    assert found.attempted > 30 and found.failed == 0


def test_ranks_are_where_the_page_has_them() -> None:
    shown = rows("| rank | tensor rank | data rank | engine | speaks for its engine | reports for its replica |")
    size, engine = QUICKSTART.parallel.processes, QUICKSTART.rollout.tensor
    assert size is not None
    word = {True: "yes", False: "no"}
    expected = []
    for rank in range(size):
        grid = grid_of_rank(rank, size, QUICKSTART.parallel)
        place = [rank, grid.tensor_rank, grid.data_rank, rank // engine, word[rank % engine == 0], word[grid.reports]]
        expected.append(list(map(str, place)))
    assert shown == expected


def test_numbers_are_those_of_the_configuration() -> None:
    shown = {row[0]: int(row[2].replace(",", "")) for row in rows("| number | from | here |")}
    implied, settings = Implied(QUICKSTART), QUICKSTART.batch
    processes, grid = QUICKSTART.parallel.processes or 1, grid_of_rank(0, 4, QUICKSTART.parallel)
    answers, longest = settings.prompts * QUICKSTART.rollout.group_size, implied.longest_trained_sequence
    share = answers // grid.data
    (words,) = map(int, re.findall(r"make_tiny_model.*?--vocab-size (\d+)", SCRIPT, re.DOTALL))
    rows_of = padded_vocab_size(words, grid.tensor) // grid.tensor
    shards = [vocabulary_shard(words, rows_of, rank, None) for rank in range(grid.tensor)]
    assert shown == {
        "prompts of a step": settings.prompts,
        "answers of a step": answers,
        "answers of an engine": answers // (processes // QUICKSTART.rollout.tensor),
        "updates of a step": settings.updates,
        "sequences of a replica's update": share,
        "longest sequence in tokens": longest,
        "bound of a micro-batch in tokens": settings.tokens_per_microbatch,
        "words of the vocabulary on tensor rank 0": shards[0].valid,
        "words on tensor rank 1, padding aside": shards[1].valid,
        "micro-batches of a replica, were all the longest": len(
            microbatches([longest] * share, settings.tokens_per_microbatch)
        ),
    }
    # What is said of the step that was seen adds up, too.
    text = PAGE.read_text()
    seen = [int(number.replace(",", "")) for number in re.findall(r"R = (?:T = )?(\d[\d,]*\d|\d+)", text)]
    held = [int(number.replace(",", "")) for number in re.findall(r"(\d[\d,]*\d)(?: of them)? on rank [02]", text)]
    assert len(seen) == 4 and sum(seen) == sum(held) == 7564
