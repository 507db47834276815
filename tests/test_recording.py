"""What a run says and draws: its lines in a log and on a terminal, its end, its curves, its trackers, warnings."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarl.config.load import load_config
from megarl.errors import Refusal
from megarl.parallel import noise
from megarl.report.curves import draw_curves, figure_of
from megarl.report.figures import flat
from megarl.train import display
from megarl.train.display import Display, Pace
from megarl.train.recorder import Recorder
from megarl.train.trackers import Wandb

RL = {
    "step": 12,
    "epoch": 0.125,
    "algorithm": "grpo",
    "loss": -0.00152576,
    "grad_norm": 0.675312,
    "lr": 1e-6,
    "entropy": 1.5,
    "clip_share": 0.25,
    "logprob_gap_mean": 1.944e-07,
    "logprob_gap_max": 1e-6,
    "tokens": 1200,
    "reward_mean": 0.5,
    "response_length_mean": 321.5,
    "truncated_share": 0.125,
    "seconds": {"push": 0.5, "generate": 1.0, "update": 1.0},
    "counters": {"groups_dropped": 2},
}
SFT = {name: RL[name] for name in ("step", "algorithm", "loss", "grad_norm", "lr", "entropy", "tokens", "seconds")}
SFT |= dict.fromkeys(("reward_mean", "response_length_mean", "clip_share", "logprob_gap_mean", "logprob_gap_max"))
EVALUATION = {
    "step": 12,
    "accuracy": 0.875,
    "evaluation_reward_mean": 0.75,
    "evaluation_length_mean": 100.0,
    "evaluation_truncated_share": 0.25,
    "evaluation_problems": 8,
    "evaluation_problems_in_training_data": 0,
    "seconds": {"evaluate": 2.0},
}


def said(*calls: tuple[str, dict[str, Any]], width: int = 30, terminal: bool = False) -> list[str]:
    """The lines that a display of 40 steps writes for these steps and evaluations."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    shown = Display("run", 40, enabled=True, console=console)
    for kind, values in calls:
        getattr(shown, kind)(values)
    shown.close()
    # What moves the cursor to write over a line begins one.
    written = re.sub(r"\x1b\[[0-9?]*[A-Za-z]|\r", "\n", file.getvalue())
    return [line for line in written.splitlines() if line.strip()]


def test_a_step_is_one_line_in_a_log_of_any_width() -> None:
    assert said(("step", RL), ("evaluation", EVALUATION)) == [
        "step 12/40  reward 0.5  loss -0.001526  grad 0.6753  gap 1.944e-07  length 321.5  1:10 left  epoch 0.12  "
        "2.5 s  480 tokens/s",
        "step 12/40  accuracy 0.875 on 8 held-out problems  reward 0.75  length 100  truncated 0.25  2.0 s",
    ]


def test_a_supervised_step_says_nothing_of_what_it_has_not() -> None:
    assert said(("step", SFT | {"step": 40})) == ["step 40/40  loss -0.001526  grad 0.6753  2.5 s  480 tokens/s"]
    fast = SFT | {"step": 40, "seconds": {"update": 0.0625}}
    assert said(("step", fast))[0].endswith("grad 0.6753  0.062 s  19200 tokens/s")


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (60, "step 12/40  reward 0.5  loss -0.001526  grad 0.6753"),
        (75, "step 12/40  reward 0.5  loss -0.001526  grad 0.6753  gap 1.944e-07"),
        (8, "step 12…"),
    ],
)
def test_a_terminal_shows_as_much_of_a_step_as_it_has_room_for(width: int, line: str) -> None:
    lines = said(("step", RL), width=width, terminal=True)
    assert line in [found.rstrip() for found in lines]
    assert sum("reward" in found or "step" in found for found in lines) == 1
    assert any("12/40" in found and "1:10 left" in found for found in lines) or width < 60
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        (8, "8 problems of the training data"),
        (3, "8 problems, 3 of them in the training data"),
        (0, "8 held-out problems"),
    ],
)
def test_accuracy_is_held_out_where_no_problem_is_trained_on(trained: int, words: str) -> None:
    line = EVALUATION | {"evaluation_problems_in_training_data": trained}
    assert f"accuracy 0.875 on {words}  reward" in said(("evaluation", line))[0]
    title = {0: "held-out accuracy", 3: "accuracy", 8: "accuracy on training data"}[trained]
    assert title in [axis.get_title() for axis in figure_of([RL, line], "run").axes]


def test_brackets_in_what_is_said_are_text() -> None:
    file = io.StringIO()
    shown = Display("run", 1, enabled=True, console=Console(file=file, width=20))
    shown.status("go on with resume_changes=[data] and more words than a line has")
    assert file.getvalue() == "go on with resume_changes=[data] and more words than a line has\n"


def test_time_left_follows_the_last_steps_and_what_lies_between_them() -> None:
    pace = Pace()
    assert pace.per_step == 0
    pace.step_ends(now=100, seconds=60)
    assert pace.per_step == 60
    # The first step warmed up; from the second on what lies between steps counts too.
    pace.step_ends(now=110, seconds=5)
    assert pace.per_step == 10
    for number in range(display.RECENT):
        pace.step_ends(now=112 + 2 * number, seconds=1)
    assert pace.per_step == 2


def test_no_panel_is_empty_and_none_that_has_data_is_missing() -> None:
    lines = [RL | {"step": step} for step in (1, 2, 3)]
    titles = [axis.get_title() for axis in figure_of([*lines, EVALUATION], "run").axes]
    assert titles == [
        "mean reward", "held-out accuracy", "loss", "gradient norm", "learning rate", "entropy (nats)",
        "response length (tokens)", "length in evaluation (tokens)", "truncated share (cut at the limit)", "clip share",
        "|policy - engine| log-prob", "tokens trained per second", "seconds per phase",
    ]  # fmt: skip
    supervised = figure_of([SFT | {"step": step} for step in (1, 2)], "run")
    assert [axis.get_title() for axis in supervised.axes] == [
        "loss", "gradient norm", "learning rate", "entropy (nats)", "tokens trained per second", "seconds per phase",
    ]  # fmt: skip
    assert all(axis.lines or axis.patches for axis in supervised.axes)


def test_the_legend_of_seconds_covers_neither_its_panel_nor_another(tmp_path: Path) -> None:
    phases = dict.fromkeys(("push", "generate", "score", "advantages", "old_log_probs", "update", "save"), 1.0)
    # One step alone must be seen too.
    figure = figure_of([RL | {"seconds": phases}], "run")
    figure.savefig(tmp_path / "drawn.png")
    seconds = figure.axes[-1]
    legend = seconds.get_legend().get_window_extent()
    assert [text.get_text() for text in seconds.get_legend().get_texts()] == list(phases)
    for other in figure.axes:
        assert not legend.overlaps(other.get_window_extent())
    assert not legend.overlaps(seconds.xaxis.label.get_window_extent())
    assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1 and figure.bbox.y0 <= legend.y0
    assert all(patch.get_window_extent().width > 10 for patch in seconds.patches)
    draw_curves([], tmp_path / "curves.png", "run")
    assert not (tmp_path / "curves.png").exists()


def recorder(folder: Path, *settings: str, finished: int | None = None) -> Recorder:
    given = ("model.path=model", "data.path=data.jsonl", "name=run", "steps=40", "algorithm.name=grpo")
    file = folder / "run.yaml"
    file.write_text("{}")
    made = Recorder(load_config(file, [*given, f"runs_dir={folder / 'runs'}", *settings]), writes=True, show=True)
    made.open(finished)
    return made


def record(made: Recorder, *steps: int) -> None:
    for step in steps:
        made.step(RL | {"step": step, "reward_mean": step / 40})
        made.samples([{"step": step, "prompt": "1+1=", "response": f"answer {step}", "reward": 1.0, "pieces": []}])


SUMMARY = {"name": "run", "steps": 40, "processes": 2, "seconds": 3675.0, "skipped_updates": 0}


def test_the_end_says_what_was_reached_and_where_it_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = recorder(tmp_path, "logging.tensorboard=false")
    made.evaluation(EVALUATION | {"step": 0, "accuracy": 0.0625})
    record(made, 1, 2)
    made.answers("step_000000", [{"prompt": "1+1=", "right": False}])
    made.close()
    # As after an interruption in step 2: what was reached is that of the whole run.
    made = recorder(tmp_path, "logging.tensorboard=false", finished=1)
    record(made, *range(2, 41))
    made.evaluation(EVALUATION | {"step": 40})
    made.answers("step_000040", [{"prompt": "1+1=", "right": True}])
    directory = tmp_path / "runs" / "run"
    (directory / "checkpoints").mkdir()
    (directory / "checkpoints" / "latest").write_text("step_000040")
    (directory / "hf").mkdir()
    capsys.readouterr()
    summary = made.finish(SUMMARY)
    made.close()
    assert capsys.readouterr().err.splitlines() == [
        "run: 40 step(s) done; this start took 1:01:15",
        "  accuracy    0.0625 -> 0.875 (steps 0 and 40) on 8 held-out problems",
        "  reward      0.025 -> 1 (steps 1 and 40)",
        f"  summary     {directory}/summary.json",
        f"  report      {directory}/report.html",
        f"  curves      {directory}/curves.png",
        f"  metrics     {directory}/metrics.jsonl",
        f"  samples     {directory}/samples.jsonl",
        f"  evaluations {directory}/evaluations",
        f"  settings    {directory}/config.yaml",
        f"  checkpoint  {directory}/checkpoints/step_000040",
        f"  model       {directory}/hf (Hugging Face)",
    ]
    assert json.loads((directory / "summary.json").read_text()) == summary
    assert summary == SUMMARY | {"reward_first": 0.025, "reward_last": 1.0} | dict.fromkeys(
        ("loss_first", "loss_last"), RL["loss"]
    )


def test_answers_of_evaluations_after_the_step_that_a_run_goes_on_from_are_removed(tmp_path: Path) -> None:
    made = recorder(tmp_path, "logging.tensorboard=false")
    for name in ("step_000000", "step_000002", "step_000004", "evaluate_step_000004"):
        made.answers(name, [{"prompt": name}])
    recorder(tmp_path, "logging.tensorboard=false", finished=2)
    kept = sorted(file.stem for file in made.answers_file("step_000000").parent.iterdir())
    assert kept == ["evaluate_step_000004", "step_000000", "step_000002"]
    assert made.answers_file("step_000002").read_text() == '{"prompt": "step_000002"}\n'


def test_tensorboard_has_the_numbers_of_the_metrics(tmp_path: Path) -> None:
    made = recorder(tmp_path)
    record(made, 1, 2)
    made.evaluation(EVALUATION)
    ranks = {"slowest": {"push": 0.5}, "fastest": {"push": 0.25}, "push_seconds": 0.125, "ranks": {"0": {}}}
    made.phases({"step": 2, "kind": "step"} | ranks)
    made.close()
    events = EventAccumulator(str(tmp_path / "runs" / "run" / "tensorboard"))
    events.Reload()
    names = set(flat(RL)) | set(flat(EVALUATION))
    assert {"seconds/generate", "counters/groups_dropped", "accuracy", "epoch"} <= names
    phases = {f"step_phases/{name}" for name in ("slowest/push", "fastest/push", "push_seconds")}
    assert set(events.Tags()["scalars"]) == names | phases
    assert [(point.step, point.value) for point in events.Scalars("step_phases/slowest/push")] == [(2, 0.5)]
    assert [(point.step, point.value) for point in events.Scalars("reward_mean")] == [
        (1, pytest.approx(0.025)),
        (2, pytest.approx(0.05)),
    ]


def test_wandb_goes_on_under_the_same_id_with_settings_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = ("logging.tensorboard=false", "logging.wandb=project", "logging.plot_every=2")
    for finished, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        made = recorder(tmp_path, *settings, finished=finished)
        record(made, *steps)
        made.evaluation(EVALUATION | {"step": steps[-1]})
        made.finish(SUMMARY)
        made.close()
    directory = tmp_path / "runs" / "run"
    name = (directory / "wandb_id").read_text().strip()
    written = sorted(directory.glob("wandb/offline-run-*"))
    assert [(folder / f"run-{name}.wandb").is_file() for folder in written] == [True, True]
    assert f"  wandb       wandb sync {written[-1]}\n" in capfd.readouterr().err
    tables = [json.loads(next(folder.glob("files/media/table/*.json")).read_text()) for folder in written]
    for table, steps in zip(tables, ((1, 2, 3), (3, 4)), strict=True):
        column = table["columns"].index("response")
        assert [row[column] for row in table["data"]] == [f"answer {step}" for step in steps]
    recorded = [(folder / f"run-{name}.wandb").read_bytes() for folder in written]
    for text in (b"max_tokens", b"group_size", b"reward_mean", b"accuracy"):
        assert all(text in content for content in recorded)
    # Begun anew, it is another run.
    recorder(tmp_path, *settings).close()
    assert (directory / "wandb_id").read_text().strip() != name


def test_wandb_that_cannot_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")

    def init(**_: Any) -> None:
        raise wandb.errors.UsageError("no key is known.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(Refusal) as refused:
        Wandb(load_config(_run_file(tmp_path), []), "project", tmp_path, None)
    assert str(refused.value) == (
        "logging.wandb=project: must be a project that wandb can start a run in (no key is known). "
        "Fix: log in (wandb login), set WANDB_MODE=offline, or leave logging.wandb out."
    )


def _run_file(folder: Path) -> Path:
    file = folder / "run.yaml"
    file.write_text("{name: run, steps: 1, model: {path: m}, data: {path: d}, algorithm: {name: grpo}}")
    return file


@pytest.fixture
def loggers() -> Any:
    """A library's logger with a handler of its own, and where it writes to."""
    counted = itertools.count()
    logger = logging.getLogger(f"library_{next(counted)}_{os.getpid()}")
    handler = logging.StreamHandler(io.StringIO())
    logger.addHandler(handler)
    logger.propagate = False
    yield logger, handler.stream
    logger.removeHandler(handler)


@pytest.mark.parametrize(("rank", "count"), [(None, 1), ("0", 1), ("1", 0)])
def test_a_warning_is_said_once_and_by_rank_0(
    rank: str | None,
    count: int,
    loggers: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger, stream = loggers
    for name in noise.RANK_NAMES:
        monkeypatch.delenv(name, raising=False)
    if rank is not None:
        monkeypatch.setenv("SLURM_PROCID", rank)
    monkeypatch.setattr(noise, "_said", set())
    monkeypatch.setattr("sys.warnoptions", [])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        noise.hold_back()
        for _ in range(2):
            # As libraries do, after whose end Python shows again what it has shown.
            with warnings.catch_warnings():
                warnings.simplefilter("default")
            warnings.warn("`old` is\n deprecated", FutureWarning, stacklevel=1)
            logger.warning("%s is slow", "it")
            logger.error("%s failed", "it")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == count
    assert all(re.fullmatch(r"FutureWarning: `old` is deprecated \(test_recording\.py:\d+\)", line) for line in lines)
    assert stream.getvalue() == "it is slow\n" * count + "it failed\n" * 2


def test_what_megatron_says_of_calls_that_work_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in noise.RANK_NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(noise, "_said", set())
    monkeypatch.setattr("sys.warnoptions", [])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        noise.hold_back()
    last = logging.StreamHandler(stream := io.StringIO())
    for name in ("models.gpt.gpt_model", "dist_checkpointing.strategies.common", "dist_checkpointing.serialization"):
        logger = logging.getLogger(f"megatron.core.{name}")
        monkeypatch.setattr(logger, "handlers", [last])
        monkeypatch.setattr(logger, "propagate", False)
        logger.warning("warning of %s", name)
        logger.error("error of %s", name)
    assert stream.getvalue().splitlines() == [
        "error of models.gpt.gpt_model",
        "error of dist_checkpointing.strategies.common",
        "warning of dist_checkpointing.serialization",
        "error of dist_checkpointing.serialization",
    ]
