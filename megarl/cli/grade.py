"""`megarl grade ANSWERS [--rule NAME] [--response-column NAME] [--answer-column NAME] [--json]`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from megarl.cli.start import AsJson
from megarl.config.rewards import RULE_KINDS
from megarl.evaluation.grading import Columns, GradedRow, grade_file, sentence

Answers = Annotated[
    Path, typer.Argument(metavar="ANSWERS", help=".jsonl, .json, .parquet, .csv or .tsv.", show_default=False)
]
Rule = Annotated[str, typer.Option("--rule", help=f"How answers are graded: {', '.join(RULE_KINDS)}.")]
Response = Annotated[str, typer.Option("--response-column", help="Column of the response; dots go into records.")]
Answer = Annotated[str, typer.Option("--answer-column", help="Column of the reference, or of a list of them.")]
Label = Annotated[
    str | None, typer.Option("--label-column", help="Column that says which are right, to be compared with.")
]
Last = Annotated[
    int | None, typer.Option("--last-characters", min=1, help="Look at the last characters alone (NFT: 100).")
]
Workers = Annotated[int, typer.Option("--workers", min=1, max=256, help="Grading processes.")]
OnlyDiffering = Annotated[bool, typer.Option("--differing", help="Print only rows that differ from their label.")]


def grade(
    answers: Answers,
    rule: Rule = "math",
    response_column: Response = "response",
    answer_column: Answer = "answer",
    label_column: Label = None,
    last_characters: Last = None,
    workers: Workers = 2,
    differing: OnlyDiffering = False,
    as_json: AsJson = False,
) -> None:
    """Grade a file of answers: what is taken for each answer, and why it is right or wrong."""
    rows: list[dict[str, Any]] = []

    def tell(row: GradedRow) -> None:
        if differing and (None in (row.right, row.label) or row.agrees):
            return
        if as_json:
            rows.append({name: value for name, value in row._asdict().items() if name != "label" or label_column})
            return
        print(line(row), flush=True)

    columns = Columns(response_column, answer_column, label_column)
    summary = grade_file(answers.expanduser(), rule, columns, last_characters, workers, tell)
    print(json.dumps(summary | {"graded": rows}) if as_json else sentence(summary), flush=True)


def line(row: GradedRow) -> str:
    """A row as a person reads it."""
    verdict = "not graded" if row.right is None else "right" if row.right else "wrong"
    if row.right is not None and row.label is not None and not row.agrees:
        verdict += f" (its label says {'right' if row.label else 'wrong'})"
    found = "" if row.found is None else f"  took {' '.join(row.found.split())[:200]}"
    return f"{row.number}  {verdict}{found}  {row.why}"
