"""One HTML file that shows runs beside each other: needs no network, no server, and nothing of the run any more."""

from __future__ import annotations

import base64
import contextlib
import functools
import gc
import gzip
import importlib.util
import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml

import megarl
from megarl.errors import Refusal
from megarl.report.charts import charts_of
from megarl.report.difficulty import SECTION as DIFFICULTY
from megarl.report.difficulty import charts_of_difficulty
from megarl.report.panels import ENGINE, LEARNING, LENGTHS, POLICY, TIME
from megarl.report.runs import Run, read_runs
from megarl.report.samples import counts, samples_of
from megarl.report.suites import Table, tables_of
from megarl.report.times import times_of

_TEMPLATE = Path(__file__).with_name("template")
#: Sections of charts, in the page's order; other numbers come last, and closed.
_SECTIONS = (LEARNING, DIFFICULTY, POLICY, ENGINE, LENGTHS, TIME)
#: What is first said of a run.
_FACTS = (
    ("algorithm", "algorithm"),
    ("steps", "steps"),
    ("processes", "processes"),
    ("accuracy_before", "accuracy before"),
    ("accuracy_after", "accuracy after"),
    ("reward_first", "first reward"),
    ("reward_last", "last reward"),
    ("seconds", "seconds of the last start"),
    ("skipped_updates", "skipped updates"),
)


class Written(NamedTuple):
    """A page that was written: where, of how many bytes, in how many seconds, and remarks about what is not in it."""

    file: Path
    size: int
    seconds: float
    remarks: tuple[str, ...]

    def sentence(self) -> str:
        """For the user."""
        return f"{self.file} ({self.size / 1e6:.1f} MB, {self.seconds:.1f} s)"


def write_page(directories: Sequence[Path], out: Path, *, reload: float | None = None) -> Written:
    """Write the page of the runs in these folders to `out`, whole or not at all. With `reload` it loads itself again
    every so many seconds. Raises `Refusal` where a folder is no run's, or the page cannot be written."""
    start = time.perf_counter()
    runs = read_runs(directories)
    text, remarks = page_of(runs, reload)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(out.name + ".partial")
        partial.write_bytes(text)
        partial.replace(out)
    except OSError as error:
        rule = f"must be a file that can be written ({error.strerror})"
        raise Refusal(str(out), rule, "give the page another place (--out), or make room there") from None
    return Written(out, len(text), time.perf_counter() - start, remarks)


def page_of(runs: Sequence[Run], reload: float | None = None) -> tuple[bytes, tuple[str, ...]]:
    """The page, and remarks about what of the runs is not in it."""
    with _without_collections():
        return _page_of(runs, reload)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """No collection of garbage meanwhile: over a hundred thousand samples it takes as long as all else."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _page_of(runs: Sequence[Run], reload: float | None) -> tuple[bytes, tuple[str, ...]]:
    charts = charts_of(runs) + charts_of_difficulty(runs)
    samples, left_out = samples_of(runs)
    remarks = tuple([f"{run.name}: {one}" for run in runs for one in run.remarks] + left_out)
    given = {
        "runs": [run.name for run in runs],
        "charts": charts,
        "thinking_end": [str(run.settings.get("rollout.thinking_end", "</think>")) for run in runs],
        "reload": reload,
    }
    text = (
        _environment()
        .get_template("page.html")
        .render(
            title=" · ".join(run.name for run in runs),
            runs=runs,
            facts=_facts(runs),
            remarks=remarks,
            sections=[name for name in _SECTIONS if any(one["section"] == name for one in charts)],
            difficulty=DIFFICULTY,
            time=TIME,
            suites=[table for run in runs for table in tables_of(run)],
            has_phases=any(run.phases for run in runs),
            counts=counts(samples),
            settings=_side_by_side([run.settings for run in runs]),
            versions=_side_by_side([run.versions for run in runs]),
            written=time.strftime("%Y-%m-%d %H:%M:%S"),
            megarl=megarl.__version__,
            # Scripts that a run's texts might bring have no such word, and do not run.
            nonce=secrets.token_urlsafe(16),
            library=_library(),
            given=_json(given),
            times=_packed(times_of(runs)),
            samples=_packed(samples),
        )
    )
    # Half of a surrogate pair, which a sample may hold, is no text.
    return text.encode("utf-8", "replace"), remarks


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@functools.cache
def _library() -> str:
    """BokehJS, as the wheel has it. Found without importing Bokeh, which takes longer than a page."""
    found = importlib.util.find_spec("bokeh")
    assert found is not None and found.origin is not None, "bokeh is one of megarl's requirements"
    folder = Path(found.origin).parent / "server" / "static" / "js"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in ("bokeh.min.js", "bokeh-api.min.js"))


def _json(value: Any) -> str:
    """JSON for the inside of a script element: in ASCII, and without what would end the element or begin a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _packed(value: Any) -> str:
    """JSON as gzip in base64, which the page unpacks."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")
    return base64.b64encode(gzip.compress(text, 6, mtime=0)).decode("ascii")


def _facts(runs: Sequence[Run]) -> Table:
    """What is known of the runs in a few words."""
    rows = []
    for run in runs:
        last = run.steps[-1] if run.steps else run.evaluations[-1]
        known = {"algorithm": last.get("algorithm"), "steps": last["step"]} | run.summary
        measured = [one["accuracy"] for one in run.evaluations if isinstance(one.get("accuracy"), float)]
        if measured and "accuracy_after" not in known:
            known |= {"accuracy_before": measured[0], "accuracy_after": measured[-1]}
        known.setdefault("processes", run.settings.get("parallel.processes"))
        rows.append([run.name, *("–" if known.get(name) is None else _cell(known[name]) for name, _ in _FACTS)])
    return Table("", ["run", *(title for _, title in _FACTS)], rows)


def _side_by_side(tables: Sequence[dict[str, Any]]) -> list[tuple[str, list[str], bool]]:
    """Keys with each run's value and whether these differ, those that do first."""
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, [_cell(table.get(key)) if key in table else "–" for table in tables]) for key in keys]
    marked = [(key, values, len(set(values)) > 1) for key, values in rows]
    return sorted(marked, key=lambda row: not row[2])


def _cell(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | dict):
        return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    return str(value)


def follow(directories: Sequence[Path], out: Path, every: float, say: Callable[[str], None]) -> None:
    """Write the page whenever a run has recorded something, until all have ended; it loads itself again meanwhile.

    Looks every so many seconds, also for runs that have not begun. A run has ended where summary.json is no older than
    metrics.jsonl.
    """
    seen: list[tuple[int, int]] = []
    while True:
        now = [_state(directory) for directory in directories]
        ended = all(summary >= metrics > 0 for metrics, summary in now)
        if now != seen and all(metrics for metrics, _ in now):
            written = write_page(directories, out, reload=None if ended else every)
            say(("the runs have ended: " if ended else "") + written.sentence())
            seen = now
        if ended:
            return
        time.sleep(every)


def _state(directory: Path) -> tuple[int, int]:
    """When metrics.jsonl, as far as it holds anything, and summary.json were last written, in nanoseconds; else 0."""
    found = [directory / name for name in ("metrics.jsonl", "summary.json")]
    first, second = (file.stat().st_mtime_ns if file.is_file() and file.stat().st_size else 0 for file in found)
    return first, second
