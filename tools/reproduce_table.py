"""Write the tables of docs/reproduce.md from the files of configs/reproduce/, or say that they are not current.

python tools/reproduce_table.py            # writes them
python tools/reproduce_table.py --check    # ends with code 1 where the page has others
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from megarl.config.cluster import read_cluster
from megarl.reproduction.listing import Facts, facts_of, shown_size
from megarl.reproduction.rows import Row, all_rows
from megarl.reproduction.verdict import AVERAGE

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reproduce.md"
#: What stands around the tables in the page.
BEGIN, END = "<!-- tables: python tools/reproduce_table.py -->\n", "<!-- end of tables -->\n"


def tables(rows: Sequence[Row]) -> str:
    """Markdown of all rows, a table for each table."""
    return "\n".join("\n".join([*_table(name, list(found)), ""]) for name, found in groupby(rows, _table_of))


def _table_of(row: Row) -> str:
    return row.about.table


def _table(name: str, rows: Sequence[Row]) -> Iterator[str]:
    benchmarks = list(dict.fromkeys(benchmark for row in rows for benchmark in row.about.scores))
    if any(row.about.average is not None for row in rows):
        benchmarks.append(AVERAGE)
    yield f"### {name}"
    yield ""
    sources = dict.fromkeys(f"{row.about.source} ({row.about.measure})" for row in rows)
    yield f"Source: {'; '.join(sources)}. Tolerance: {rows[0].about.tolerance:g} points."
    yield ""
    head = ["`megarl reproduce`", "row", "model", "size", "GPUs", "GPU-hours", *benchmarks]
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * 3 + "--:|" * (len(head) - 3)
    for row in rows:
        yield f"| {' | '.join(_cells(row, benchmarks))} |"


def _cells(row: Row, benchmarks: Sequence[str]) -> Iterator[str]:
    # A model that is made here has a size where it has been made.
    facts = facts_of(row, read_cluster("h100")) if row.about.model else Facts(None, row.config.gpus, None)
    yield f"`{row.name}`"
    yield row.about.row
    yield row.about.model or "made here"
    yield "" if facts.parameters is None else shown_size(facts.parameters)
    yield "" if facts.gpus is None else str(facts.gpus)
    yield "" if facts.gpu_hours is None else f"{facts.gpu_hours:,.0f}"
    for benchmark in benchmarks:
        score = row.about.average if benchmark == AVERAGE else row.about.scores.get(benchmark)
        yield "" if score is None else f"{score:.1f}"


def filled(page: str) -> str:
    """The page with its tables as they should be. Raises ValueError where it has no place for them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page must have the lines {BEGIN.strip()!r} and {END.strip()!r}")
    return f"{before}{BEGIN}\n{tables(all_rows())}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; code 1 where the tables are not current")
    options = parser.parse_args(arguments)
    page = PAGE.read_text(encoding="utf-8")
    current = filled(page)
    if options.check:
        if current != page:
            print(f"{PAGE}: tables are not current; run python tools/reproduce_table.py", file=sys.stderr)
        return int(current != page)
    PAGE.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
