"""The data of a run looked at before it starts: what makes it fail, or drops its rows, found within seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator

from megarl.config.data import DEMONSTRATIONS, OneSource, each_source
from megarl.config.implied import Implied
from megarl.config.schema import RunConfig
from megarl.data.dataset import SourceReader, evaluation_key, evaluation_settings
from megarl.data.tables import is_hub_name
from megarl.data.tokenizer import Tokenizer
from megarl.errors import Refusal
from megarl.records import Prompt

#: Rows at the start of a source that are tokenized; of the others only the cells are looked at. Our choice.
TOKENIZED_ROWS = 256
#: Seconds after which the rest of a source's rows is left to the run. Our choice.
SECONDS = 5.0


def data_refusals(
    config: RunConfig, tokenizer: Tokenizer, seconds: float = SECONDS, *, evaluates: bool = False
) -> Iterator[Refusal]:
    """Yield what the run would refuse of each file that it reads prompts from.

    `evaluates`: it is an evaluation alone, which needs no solutions.

    Rows are read in their order, the first `TOKENIZED_ROWS` as the run does it, until `seconds` have passed for a file.
    Data sets of the hub, which may have to be fetched, are left to the run.
    """
    for source, need_solution, need_answer in _sources(config, evaluates):
        if is_hub_name(str(source.settings.path)):
            continue
        try:
            reader = SourceReader(source, tokenizer, None, need_solution, several=False, need_answer=need_answer)
            _look_at(reader, seconds)
        except Refusal as refusal:
            yield refusal


def first_prompt(config: RunConfig, tokenizer: Tokenizer, *, held_out: bool) -> Prompt | None:
    """The first usable row of the training data, or of the evaluation's; None where it has to be fetched from a hub.

    Raises `Refusal` as the run would.
    """
    sources = each_source(evaluation_settings(config), evaluation_key(config)) if held_out else each_source(config.data)
    if is_hub_name(str(sources[0].settings.path)):
        return None
    return next(SourceReader(sources[0], tokenizer, None, need_solution=False, several=len(sources) > 1).prompts())


def _sources(config: RunConfig, evaluates: bool) -> Iterator[tuple[OneSource, bool, bool]]:
    """What the run reads, each file once where it is read alike, with whether its rows must have solutions, and
    answers."""
    training, implied = each_source(config.data), Implied(config, evaluates_alone=evaluates)
    yield from ((source, implied.needs_solutions, True) for source in training)
    demonstrations = config.data.of_demonstrations()
    if implied.demonstrations and demonstrations is not None:
        yield from ((source, True, False) for source in each_source(demonstrations, DEMONSTRATIONS))
    if implied.evaluates:
        seen = [_cells(source) for source in training]
        held_out = each_source(evaluation_settings(config), evaluation_key(config))
        yield from ((source, False, True) for source in held_out if _cells(source) not in seen)


def _cells(source: OneSource) -> dict[str, object]:
    """The file and what is read of its rows."""
    names = {
        "path",
        "prompt_column",
        "answer_column",
        "answer_pattern",
        "instruction",
        "source_column",
        "extra_columns",
    }
    return source.settings.model_dump(include=names)


def _look_at(reader: SourceReader, seconds: float) -> None:
    """Raise `Refusal` where a row cannot be read, or none is usable of all those that were looked at."""
    end = time.monotonic() + seconds
    for index, row in enumerate(reader.rows()):
        reader.count(reader.usable(row, tokenize=index < TOKENIZED_ROWS), index)
        if time.monotonic() > end and reader.counters["kept"]:
            return
    reader.refuse_if_empty()
