"""`megarl reproduce`: what is refused, what is done and not done again, and how a verdict comes about."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import arithmetic_run
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from test_cli import CLEAN, ROOT, megarl

from megarl.config.cluster import read_cluster
from megarl.config.files import KNOWN_MODELS
from megarl.config.load import load_config
from megarl.config.reproduces import ReproducesSettings
from megarl.errors import Refusal
from megarl.evaluation.target import read_target
from megarl.reproduction import chain, commands, jobs, listing, rows, stages, verdict
from megarl.submission.orders import parse_order

SAID: list[str] = []


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, where nothing is."""
    monkeypatch.chdir(tmp_path)
    SAID.clear()
    return tmp_path


def write_inputs(row: rows.Row) -> None:
    """A model and data in the places where the row looks for its own; what it begins with is not there."""
    model = Path(row.config.model.path)
    model.mkdir(parents=True)
    (model / "config.json").write_text((KNOWN_MODELS / model.name / "config.json").read_text())
    save_file({"model.norm.weight": np.ones(1, np.float32)}, model / "model.safetensors")
    for one in row.about.files:
        Path(one.path).parent.mkdir(exist_ok=True)
        Path(one.path).write_text("{}")


def refused(name: str) -> str:
    with pytest.raises(Refusal) as found:
        chain.carry_out(rows.find(name), SAID.append, io.StringIO())
    return str(found.value)


def test_an_unknown_name_is_refused_with_the_nearest(elsewhere: Path) -> None:
    result = megarl(elsewhere, "reproduce", "nft_7b_nfd")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "megarl: nft_7b_nfd: is no row and no table of configs/reproduce/, and no YAML file. "
        "Fix: use nft_7b_nft or nft_72b_nft or nft_7b_rft.\n"
    )
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--submit",), "--submit: needs a NAME. Fix: give a row or a table, as listed."),
        (
            ("nft_7b_nft", "--time", "1:00:00"),
            "--time: is for Slurm. Fix: add --submit, or remove it.",
        ),
        (
            ("quickstart_all_grpo", "--submit"),
            "quickstart_all_grpo: names no GPUs, and needs no cluster. "
            "Fix: run it here: megarl reproduce quickstart_all_grpo.",
        ),
        (
            ("run.yaml",),
            "run.yaml: says not what it reproduces. "
            "Fix: add the section reproduces, as the files of configs/reproduce/ have it.",
        ),
    ],
)
def test_what_is_refused(elsewhere: Path, arguments: tuple[str, ...], sentence: str) -> None:
    arithmetic_run.write_run(elsewhere)
    result = megarl(elsewhere, "reproduce", *arguments)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"megarl: {sentence}\n")


def test_what_must_be_fetched_is_said_with_its_commands() -> None:
    assert refused("nft_7b_nft") == (
        "nft_7b_nft without models/Qwen2.5-Math-7B: is not there. "
        "Fix: fetch it: hf download Qwen/Qwen2.5-Math-7B --local-dir models/Qwen2.5-Math-7B."
    )
    assert [said.split(": ", 1)[0] for said in SAID] == [
        "nft_7b_nft without data/dapo_math_17k.parquet",
        "nft_7b_nft without data/aime24.parquet",
    ]
    assert "Fix: fetch it: python " in SAID[0] and SAID[0].endswith("/tools/make_paper_data.py dapo_math_17k.")
    row = rows.find("nft_7b_nft")[0]
    write_inputs(row)
    (Path(row.config.model.path) / "model.safetensors").write_bytes(b"half")
    assert "models/Qwen2.5-Math-7B: is not whole. Fix: fetch it: hf download" in refused("nft_7b_nft")


def test_a_row_for_more_gpus_than_are_here_is_refused() -> None:
    write_inputs(rows.find("nft_7b_nft")[0])
    assert refused("nft_7b_nft") == (
        "nft_7b_nft: is written for 64 GPUs, and this machine has 0. "
        "Fix: use --submit on a cluster's login node, or --dry-run."
    )


def test_a_row_waits_for_the_run_that_it_begins_with(monkeypatch: pytest.MonkeyPatch) -> None:
    row = rows.find("bridge_3b_sft_rl")[0]
    write_inputs(row)
    monkeypatch.setattr(chain, "_GPUS", Path("gpus"))
    Path("gpus").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl"):
        (Path("gpus") / name).touch()
    sentence = (
        "bridge_3b_sft_rl: begins with the end of bridge_3b_sft, and runs/bridge_3b_sft/checkpoints has no checkpoint. "
        "Fix: first megarl reproduce bridge_3b_sft"
    )
    assert refused("bridge_3b_sft_rl") == f"{sentence}."
    assert listing.state_of(row) == "waits for bridge_3b_sft"
    wanted = jobs.Wanted(read_cluster("h100"))
    with pytest.raises(Refusal, match="then submit it"):
        jobs.submit([row], wanted, lambda _: (), SAID.append, io.StringIO(), dry=False)
    # In its table it comes after it.
    names = [one.name for one in rows.find("bridge_3b")]
    assert names.index("bridge_3b_sft") < names.index("bridge_3b_sft_rl")


def test_a_page_of_a_table_leaves_out_what_others_begin_with() -> None:
    table = rows.find("quickstart_all")
    others = [row.name for row in table if row.name != "quickstart_all_warmup"]
    assert [row.name for row in chain.shown_together(table)] == others and len(others) == 6
    assert chain.shown_together(table[:1]) == table[:1]


def test_the_list_has_a_line_for_every_row() -> None:
    stream = io.StringIO()
    listing.print_rows(rows.all_rows(), read_cluster("h100"), stream)
    lines = {line.split()[0]: line for line in stream.getvalue().splitlines() if line.strip()}
    assert set(rows.row_names()) <= set(lines)
    assert lines["nft_7b_nft"].split()[:5] == ["nft_7b_nft", "NFT", "7.6B", "64", "881"]
    assert lines["nft_7b_nft"].split(maxsplit=5)[5].strip() == "lacks models/Qwen2.5-Math-7B and 2 more"


def test_a_base_with_an_adapter_beside_it_is_asked_by_its_merged_export() -> None:
    row = rows.find("bridge_3b_bridge")[0]
    export = row.folder / "hf"
    assert stages.evaluation_arguments(row)[0] == f"checkpoint={export}"
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    target = read_target(row.path, str(export))
    assert target.label == "hf" and target.base["model"] == {"path": str(export), "weights": None}
    assert str(target.base["parallel"]["tensor"]) == "2" and not {"adapter", "parameters"} & set(target.base)
    assert stages.evaluation_arguments(rows.find("bridge_3b_rl")[0])[0] == "checkpoint=runs/bridge_3b_rl"
    unmerged = load_config(row.path, ["checkpoint.export_hf=false"])
    (refusal,) = parse_order("evaluate --suite=bridge").refusals(unmerged, is_array=False)
    assert str(refusal) == (
        "--then evaluate --suite=bridge: needs the base with its adapter merged, which checkpoint.export_hf=false does "
        "not write. Fix: set checkpoint.export_hf=true."
    )


def test_a_signal_is_the_running_commands_affair() -> None:
    """It gets to save, and its exit code is passed on."""
    inner = "trap 'echo saved; exit 75' TERM; trap 'echo no' INT; echo ready; while :; do sleep 0.05; done"
    code = (
        "import sys; from megarl.reproduction.commands import Command\n"
        f"try: Command('bash', ('-c', {inner!r})).run()\n"
        "except Exception as error: print(error); sys.exit(error.exit_code)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=CLEAN | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    # Of a terminal both would get this one; here it alone, which then goes on waiting.
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert output.startswith("saved\n") and "was stopped; give the same command again" in output


ABOUT = {"table": "t", "row": "r", "source": "s"}


def judged(measured: dict[str, Any], **about: Any) -> verdict.Verdict:
    found = {
        name: {"score": score, "interval": interval, "majority": None, "pass": {"4": score}}
        for name, (score, interval) in measured.items()
    }
    average = {"average_interval": [0.4, 0.6]}
    return verdict.judge(ReproducesSettings.model_validate(ABOUT | about), {"suite": {"benchmarks": found} | average})


def test_a_score_is_inside_where_it_is_near_the_interval() -> None:
    given = {"a": (0.50, [0.45, 0.55]), "b": (0.40, [0.35, 0.45])}
    found = judged(given, scores={"a": 56.9, "b": 48.0}, tolerance=2.0)
    a, b, average = found.lines
    assert (a.measured, a.published, a.word) == (50.0, 56.9, "inside")
    assert a.difference == pytest.approx(-6.9) and a.interval == pytest.approx((45.0, 55.0))
    assert b.word == "outside" and found.word == "not reproduced"
    assert average.measured == pytest.approx(45.0) and average.word == "not published"
    # With a published average it alone decides; its interval is 40 to 60.
    assert judged(given, scores={"a": 56.9, "b": 48.0}, average=61.9, tolerance=2.0).word == "reproduced"
    assert judged(given, average=62.2, tolerance=2.0).word == "not reproduced"
    # A mean of some of the published benchmarks is none.
    partly = judged({"a": given["a"]}, scores={"a": 50.0, "b": 48.0}, average=50.0)
    assert partly.lines[-1].measured is None and partly.word == "not measured"
    assert judged(given).word == "not published"


def test_pass_at_k_has_no_interval() -> None:
    (line,) = judged({"a": (0.50, [0.0, 1.0])}, scores={"a": 52.0}, measure="pass@4", tolerance=2.0).lines
    assert (line.measured, line.interval, line.word) == (50.0, None, "inside")
    assert judged({"a": (0.5, None)}, scores={"a": 52.2}, measure="pass@4", tolerance=2.0).word == "not reproduced"
    assert judged({"a": (0.5, None)}, scores={"a": 50.0}, measure="pass@8").word == "not measured"


def test_a_row_goes_from_its_model_to_its_verdict_and_nothing_is_done_twice(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real stages: a file that is made, a conversion, a run of two steps, its evaluation by an engine."""
    arithmetic_run.write_inputs(elsewhere)
    suite = {"benchmarks": {"sums": {"data": {"path": "more/heldout.jsonl", "answer_column": "answer"}}}}
    suite |= {"evaluation": {"samples": 2, "temperature": 1.0, "max_tokens": 8, "reward": {"kind": "boxed"}}}
    (elsewhere / "sums.yaml").write_text(yaml.safe_dump(suite))
    about = {
        "table": "mine",
        "row": "SFT",
        "source": "ours",
        "model": "somebody/model",
        "suites": ["sums.yaml"],
        "scores": {"sums": 3.0},
        "files": [{"path": "more/heldout.jsonl", "make": "make_arithmetic.py --out more --train 4 --heldout 3"}],
    }
    path = arithmetic_run.write_run(elsewhere, name="mine", steps=2, algorithm={"name": "sft"}, reproduces=about)
    ran: list[str] = []

    def run(self: commands.Command) -> None:
        ran.append(self.program if self.program != "megarl" else self.arguments[0])
        if self.program == "megarl":
            arithmetic_run.finish(arithmetic_run.start(elsewhere, *self.arguments))
        else:
            really(self)

    really = commands.Command.run
    monkeypatch.setattr(commands.Command, "run", run)
    (row,) = rows.find(str(path))
    stream = io.StringIO()
    chain.describe([row], stream)
    assert [line.split()[0] for line in stream.getvalue().splitlines()[1:]] == [
        "inputs", "convert", "train", "evaluate", "table",
    ]  # fmt: skip
    chain.carry_out([row], SAID.append, stream)
    assert ran == ["make_arithmetic.py", "convert_hf_to_megatron.py", "train", "evaluate", "report"]
    table = json.loads((elsewhere / "runs/mine/reproduction.json").read_text())
    (line,) = table["lines"]
    results = stages.results(row)["sums"]["benchmarks"]["sums"]
    assert line["measured"] == 100 * results["score"] and line["published"] == 3.0
    assert table["verdict"] in ("reproduced", "not reproduced")
    assert listing.state_of(row) == table["verdict"] and table["verdict"] in stream.getvalue()

    ran.clear()
    chain.carry_out([row], SAID.append, io.StringIO())
    assert ran == ["report"] and (elsewhere / "runs/mine/report.html").is_file()
    # What is gone is to be made again, and nothing else: the run has ended, and its inputs are no longer needed.
    (folder,) = stages.evaluation(row).folders
    (folder / "results.json").unlink()
    stage = stages.evaluation_stage(row)
    (elsewhere / "more/heldout.jsonl").unlink()
    assert stage.done is None and stages.inputs_stage(row).done is not None
    assert stages.training_stage(row).done is not None
