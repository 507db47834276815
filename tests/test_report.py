"""What the page of a run is made of: runs that are read as far as they can be, curves, samples, and the command."""

from __future__ import annotations

import base64
import gzip
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from report_case import CONTROLS, HOSTILE, LEVEL, step_line, write_lines, write_run
from typer.testing import CliRunner

from megarl.cli.main import app
from megarl.errors import Refusal
from megarl.report import samples as samples_module
from megarl.report.charts import POINTS, charts_of
from megarl.report.difficulty import charts_of_difficulty, evaluation_files
from megarl.report.page import write_page
from megarl.report.runs import read_lines, read_run, read_runs
from megarl.report.samples import COLUMNS, samples_of
from megarl.report.times import STEPS, times_of

ROOT = Path(__file__).resolve().parents[1]


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def charts(*directories: Path) -> dict[str, dict[str, Any]]:
    runs = read_runs(directories)
    return {one["title"]: one for one in charts_of(runs) + charts_of_difficulty(runs)}


# --- reading -------------------------------------------------------------------------------------------------------


def test_a_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, why in (("empty", "is not in it"), ("absent", "is not there"), ("file", "is a file")):
        result = call(tmp_path / name)
        assert isinstance(result.exception, Refusal) and result.exception.exit_code == 2
        assert str(result.exception) == (
            f"{tmp_path / name}: must be the folder of a run, with metrics.jsonl, which {why}. "
            "Fix: give the folder that a run writes, such as runs/quickstart."
        )
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1, "loss"')
    with pytest.raises(Refusal, match="must have the line of a step or an evaluation, and has none"):
        read_run(tmp_path / "empty", "empty")
    assert not list(tmp_path.glob("**/*.html*"))


def test_what_cannot_be_read_is_counted_and_the_rest_is_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", steps=3)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "loss": NaN, "reward_mean": Infinity, "entropy": 1.0}\n')
        file.write(b"\x00\x00 not JSON \xff\n[1, 2]\n" + b'{"loss": 1.0}\n')
        file.write(b'{"step": 5, "loss": 0.0')
    found = read_run(run, "run")
    assert [line["step"] for line in found.steps] == [1, 2, 3, 4]
    assert found.remarks == (
        "metrics.jsonl: the last line is unfinished, as a crash leaves it, and is left out",
        "metrics.jsonl: 3 line(s) cannot be read and are left out",
        "metrics.jsonl: 2 number(s) are NaN or infinite and are not drawn",
    )
    reward = charts(run)["mean reward"]["series"][0]
    assert reward["x"] == [1, 2, 3, 4] and reward["y"][3] is None and reward["y"][0] == pytest.approx(0.181269)
    assert charts(run)["entropy (nats)"]["series"][0]["y"] == [
        pytest.approx(1.31873),
        pytest.approx(1.17032),
        None,
        1.0,
    ]
    result = call(run)
    assert (
        result.exit_code == 0
        and "metrics.jsonl: 3 line(s)" in capfd.readouterr().err
        and (run / "report.html").is_file()
    )


def test_a_last_line_that_is_whole_counts_though_nothing_ends_it(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"a": 1}\n\n{"a": 2}')
    assert read_lines(file).rows == [{"a": 1}, {"a": 2}] and read_lines(file).remarks("x") == []
    file.write_text('{"a": 1}\n' + 100_000 * "[")
    assert read_lines(file).unfinished and read_lines(tmp_path / "absent").rows == []


# --- curves --------------------------------------------------------------------------------------------------------


def test_a_long_run_has_no_more_points_than_a_screen(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_lines(tmp_path / "run" / "metrics.jsonl", [step_line(step) for step in range(1, 10_001)])
    reward = charts(tmp_path / "run")["mean reward"]
    assert len(reward["series"][0]["x"]) <= POINTS + 1 and reward["series"][0]["x"][-1] == 10_000
    assert reward["note"] == "every 7 steps"
    assert write_page([tmp_path / "run"], tmp_path / "page.html").size < 3e6


def test_phases_stand_upon_each_other(tmp_path: Path) -> None:
    found = charts(write_run(tmp_path / "run", steps=2))
    bars = found["seconds per phase"]["series"]
    assert [(one["name"], one["low"], one["y"]) for one in bars] == [
        ("push", [0, 0], [0.5, 0.5]),
        ("generate", [0.5, 0.5], [2.5, 2.5]),
        ("update", [2.5, 2.5], [3.5, 3.5]),
    ]
    memory = found["memory at the end of a phase, largest rank (GiB)"]["series"]
    assert [(one["name"], one["y"]) for one in memory] == [("push", [1.0, 1.0]), ("train", [2.0, 2.0])]
    assert found["weight pushes of a step (bytes between ranks)"]["series"][0]["y"] == [1 << 20, 1 << 20]
    assert found["weight_push/most_bytes"]["section"] == "Other numbers"


def test_difficulty_is_a_level_or_a_past(tmp_path: Path) -> None:
    found = charts(write_run(tmp_path / "run"))
    levels = found["mean reward by level, a column of the data"]["series"]
    assert [one["name"] for one in levels] == ["1", LEVEL] and levels[0]["y"][0] == pytest.approx(0.181269)
    past = found["share of right answers in evaluations, by the problem's past share in those before"]["series"]
    # Of 8 problems 3, then 6, then all were right; nothing is known before the first evaluation.
    assert [(one["name"], one["x"], one["y"]) for one in past] == [
        ("never right before", [8, 12], [0.6, 1.0]),
        ("right up to half of the time", [12], [1.0]),
        ("always right before", [8, 12], [1.0, 1.0]),
    ]


def test_evaluations_that_are_read_are_few_and_spread(tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    for step in range(0, 1000, 10):
        (tmp_path / "evaluations" / f"step_{step:06d}.jsonl").touch()
    (tmp_path / "evaluations" / "evaluate_step_000010.jsonl").touch()
    steps = [step for step, _ in evaluation_files(tmp_path)]
    assert len(steps) == 12 and steps[0] == 0 and steps[-1] == 990 and steps == sorted(set(steps))


def test_every_ranks_times_of_a_long_run_are_those_of_some_steps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=4)
    lines = [json.loads(line) for line in (run / "phases.jsonl").read_text().splitlines()]
    many = [lines[0] | {"step": step} for step in range(1, 500)]
    many[332] = many[332] | {"slowest": {"generate": 99.0}}
    write_lines(run / "phases.jsonl", many)
    (found,) = times_of(read_runs([run]))
    labels = [one["label"] for one in found["moments"]]
    assert len(labels) <= STEPS + 1 and {"step 1", "step 333", "step 499"} <= set(labels)
    assert found["moments"][0]["bars"][:2] == [["0", "push", 0.0, 0.5], ["0", "generate", 0.5, 2.5]]
    assert found["moments"][0]["push"][1] == ["1", 1.0, 1.0, 0.25]
    assert found["moments"][0]["memory"][3] == ["1", "train", 2]


# --- samples -------------------------------------------------------------------------------------------------------


def test_samples_have_characters_as_a_browser_counts_them(tmp_path: Path) -> None:
    payload, remarks = samples_of(read_runs([write_run(tmp_path / "run", steps=1)]))
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in payload["rows"]]
    assert payload["places"] == ["training"] and remarks == []
    assert rows[0]["pieces"][0] == [27, "policy", 1, 1.5, [1] * 27]
    hostile = next(row for row in rows if "hacked" in row["text"])
    assert hostile["text"] == HOSTILE + CONTROLS
    # The smiling face is two of UTF-16's units.
    assert sum(length for length, *_ in hostile["pieces"]) == len(hostile["text"]) + 1
    assert hostile["pieces"][-1][4][-1] == 2
    assert [row["branch"] for row in rows[-4:]] == [[], [0], [0, 0], [1]] and rows[-2]["fork"] == 6


def test_old_lines_and_lines_of_strange_types_are_shown_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1)
    write_lines(
        run / "samples.jsonl",
        [
            {"step": 1, "prompt": "p", "response": "r", "reward": math.nan},
            {
                "step": 1,
                "prompt": None,
                "response": 5,
                "pieces": "none",
                "reward": "high",
                "turns": [{"by": "x", "text": "y"}],
            },
        ],
    )
    with open(run / "samples.jsonl", "a") as file:
        file.write('{"step": 2, "resp')
    payload, remarks = samples_of(read_runs([run]))
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in payload["rows"]]
    assert [row["text"] for row in rows] == ["r", "5"] and [row["reward"] for row in rows] == [None, None]
    assert remarks[0] == "run: samples.jsonl: the last line is unfinished, as a crash leaves it, and is left out"
    write_page([run], tmp_path / "page.html")


def test_of_too_many_samples_whole_steps_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "MOST", 40)
    payload, remarks = samples_of(read_runs([write_run(tmp_path / "run", steps=12)]))
    steps = [row[COLUMNS.index("step")] for row in payload["rows"] if payload["places"][row[1]] == "training"]
    assert [steps.count(step) for step in sorted(set(steps))] == [7, 7, 7, 7] and sorted(set(steps)) == [1, 4, 7, 10]
    assert remarks == ["run: samples of every 3 steps, 28 of 84, are in this page"]


# --- the page ------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_without_a_way_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", name="</title><script>alert(1)</script>", data={"path": "\u2028"})
    (run / "preflight.json").write_text(json.dumps({"versions": {"</td><script>": "<img src=x>"}}))
    text = write_page([run], tmp_path / "page.html").file.read_text(encoding="utf-8")
    own = re.sub(r"<script nonce[^>]*>.*?</script>", "", text, flags=re.DOTALL)
    scripts = re.findall(r"<script[^>]*>", text)
    nonce = re.search(r"script-src 'nonce-([\w-]{22})'", text)
    assert nonce and len(scripts) == 8
    assert [one for one in scripts if f'nonce="{nonce[1]}"' not in one] == re.findall(r"<script[^>]*>", own)
    assert "alert(1)" in own and "<img" not in own and "src=" not in re.sub(r"&lt;img src=x&gt;", "", own)
    assert not re.search(r"(?:src|href)=\"(?!#)", own)
    given = re.search(r'id="given">(.*?)</script>', own, re.DOTALL)
    assert given and given[1].isascii() and "<" not in given[1] and json.loads(given[1])["runs"] == ["run"]
    assert LEVEL in [one["name"] for chart in json.loads(given[1])["charts"] for one in chart["series"]]
    packed = re.search(r'id="samples-packed">(.*?)</script>', own, re.DOTALL)
    assert packed and "hacked" in gzip.decompress(base64.b64decode(packed[1])).decode("ascii")
    assert "rollout.max_tokens" in own and "none" in own


def test_runs_beside_each_other_say_in_what_they_differ(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a" / "run", seed=1), write_run(tmp_path / "b" / "run", seed=2)]
    result = call(*runs, "--out", tmp_path / "both.html")
    assert result.exit_code == 0 and re.match(rf"{tmp_path}/both.html \(\d\.\d MB, \d+\.\d s\)", result.stdout)
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    differing = re.findall(r'<tr class="differ"><th scope="row">(\S+)', text)
    assert differing == ["seed"] and f"{runs[0]}" in text
    assert call(*runs).stdout.startswith(str(tmp_path / "report.html"))


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for out in (tmp_path, run / "metrics.jsonl" / "page.html"):
        result = call(run, "--out", out)
        assert isinstance(result.exception, Refusal), out
        assert str(result.exception).startswith(f"{out}: must be a file that can be written (")
    assert isinstance(call(run, "--follow", "--every", 0).exception, Refusal)


def test_following_ends_with_the_run(tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "page.html"
    command = [sys.executable, "-m", "megarl", "report", str(run), "--follow", "--every", "0.05", "--out", str(file)]
    following = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        # There is nothing yet, which it waits for.
        time.sleep(0.2)
        write_run(run, steps=2)
        until(file.is_file)
        assert '"reload":0.05' in file.read_text(encoding="utf-8") and following.poll() is None
        with open(run / "metrics.jsonl", "a") as metrics:
            metrics.write(json.dumps(step_line(3)) + "\n")
        until(lambda: '"x":[1,2,3]' in file.read_text(encoding="utf-8"))
        (run / "summary.json").write_text('{"steps": 3}')
        said = following.communicate(timeout=60)[1].splitlines()
    finally:
        following.kill()
    assert following.returncode == 0 and len(said) >= 3
    assert said[-1].startswith(f"megarl: the runs have ended: {file} (")
    assert '"reload":null' in file.read_text(encoding="utf-8")


def until(holds: Any) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
