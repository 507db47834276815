"""Grading of a file of answers alone: what was taken for each answer, and why it was decided so. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from megarl.config.data import DataSettings, OneSource
from megarl.config.rewards import RULE_KINDS, RewardSettings
from megarl.data.cells import NoText, lookup, names_at, text_of
from megarl.data.tables import Row, Table, open_table
from megarl.errors import Refusal
from megarl.rewards.answers import GradedAnswer, GradingItem
from megarl.rewards.grader import Grader

#: Rows that are graded, and told, together. Our choice.
TOGETHER = 256
#: What a label says of a right and of a wrong answer.
_LABELS = {"true": True, "1": True, "right": True, "correct": True}
_LABELS |= {"false": False, "0": False, "-1": False, "wrong": False, "incorrect": False}


class Columns(NamedTuple):
    """Where a row has the response, its reference (or a list of them), and, if given, whether somebody found it right.

    Dots go into records.
    """

    response: str = "response"
    answer: str = "answer"
    label: str | None = None


class GradedRow(NamedTuple):
    """A row by its number, from 1: what became of it. `label` is what the file says."""

    number: int
    right: bool | None
    found: str | None
    why: str
    label: bool | None = None

    @property
    def agrees(self) -> bool:
        """Whether the rule and the file say the same, where both say something."""
        return None not in (self.right, self.label) and self.right == self.label


def grade_file(
    file: Path,
    rule: str,
    columns: Columns,
    last_characters: int | None,
    workers: int,
    tell: Callable[[GradedRow], None],
) -> dict[str, Any]:
    """Grade every row of a file by a rule of megarl's, `tell` each, and return what they add up to.

    A row without response or reference, or with a label that is none, is told as such and not graded. Raises `Refusal`
    for a rule, file or column that is none.
    """
    if rule not in RULE_KINDS:
        raise Refusal(f"--rule {rule}", f"must be one of {', '.join(RULE_KINDS)}", "choose one of them")
    settings = RewardSettings(kind=rule, workers=workers, max_failed_share=1.0)
    counted: Counter[str] = Counter()
    table = _table(file, columns)
    with Grader(settings, "--rule") as grader:
        rows = enumerate(table.rows(), 1)
        while block := list(islice(rows, TOGETHER)):
            for one in _graded(block, columns, last_characters, grader):
                tell(one)
                counted.update(_counts(one))
    return _summary(file, rule, counted)


def _table(file: Path, columns: Columns) -> Table:
    table = open_table(OneSource("ANSWERS", DataSettings(path=str(file))), [one for one in columns if one])
    for option, column in zip(("--response-column", "--answer-column", "--label-column"), columns, strict=True):
        if column is None:
            continue
        missing = names_at(iter([table.names]) if table.names is not None else table.rows(), column)
        if missing is not None:
            rule = f"must be among the columns of {file}: {', '.join(missing[1]) or 'none'}"
            raise Refusal(f"{option} {column}", rule, f"set {option}")
    return table


def _graded(
    block: Sequence[tuple[int, Row]], columns: Columns, last_characters: int | None, grader: Grader
) -> Iterator[GradedRow]:
    read = [(number, _read(row, columns, last_characters)) for number, row in block]
    graded = iter(grader.grade([item for _, (item, _) in read if isinstance(item, GradingItem)]))
    for number, (item, label) in read:
        if isinstance(item, str):
            yield GradedRow(number, None, None, item, label)
            continue
        yield _told(number, next(graded), label)


def _told(number: int, answer: GradedAnswer, label: bool | None) -> GradedRow:
    why = answer.why or f"no decision: {answer.counter}"
    return GradedRow(number, bool(answer.reward), answer.found, why, label)


def _read(row: Row, columns: Columns, last_characters: int | None) -> tuple[GradingItem | str, bool | None]:
    """What is to be graded of a row, or why nothing is; and its label."""
    label = None
    try:
        if columns.label is not None:
            label = _LABELS.get((text_of(lookup(row, columns.label)) or "").strip().lower())
            if label is None:
                return f"no label in {columns.label}", None
        response = text_of(lookup(row, columns.response)) or ""
        answers = lookup(row, columns.answer)
        listed = answers if isinstance(answers, list) else [answers]
        references = [text.strip() for one in listed if (text := text_of(one)) is not None]
    except NoText as error:
        return f"not readable: {error}", label
    if not references:
        return f"no reference in {columns.answer}", label
    text = response if last_characters is None else response[-last_characters:]
    return GradingItem(text, references[0], alternatives=tuple(references[1:])), label


def _counts(row: GradedRow) -> Iterator[str]:
    yield "answers"
    yield "not graded" if row.right is None else "right" if row.right else "wrong"
    if row.right is not None and row.label is not None:
        yield "labelled"
        if row.agrees:
            yield "agree"


def _summary(file: Path, rule: str, counted: Counter[str]) -> dict[str, Any]:
    graded = counted["right"] + counted["wrong"]
    found: dict[str, Any] = {"file": str(file), "rule": rule, "answers": counted["answers"], "right": counted["right"]}
    found |= {"wrong": counted["wrong"], "not_graded": counted["not graded"]}
    found["share_right"] = counted["right"] / graded if graded else None
    if counted["labelled"]:
        found |= {"labelled": counted["labelled"], "agreement": counted["agree"] / counted["labelled"]}
    return found


def sentence(summary: dict[str, Any]) -> str:
    """The summary in a line."""
    share = summary["share_right"]
    text = f"{summary['answers']} answers by the rule {summary['rule']}: {summary['right']} right"
    text += "" if share is None else f" ({share:.1%})"
    text += f", {summary['wrong']} wrong"
    if summary["not_graded"]:
        text += f", {summary['not_graded']} not graded"
    if "agreement" in summary:
        text += f"; agreement with {summary['labelled']} labels {summary['agreement']:.2%}"
    return text
