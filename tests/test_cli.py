"""The command line as a user meets it: one line per refusal, exit code 2, no torch before the rules have passed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from config_case import write_case

from megarl.cli import start
from megarl.cli.home import require_home
from megarl.config.load import dump_config, load_config
from megarl.errors import Refusal

ROOT = Path(__file__).parents[1]
#: A launcher's variables in the tests' own environment must not leak into the commands under test.
CLEAN = {
    key: value
    for key, value in os.environ.items()
    if not key.startswith(("SLURM_", "OMPI_", "PMI_")) and key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
}


def megarl(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "megarl", *arguments],
        cwd=folder,
        env=CLEAN | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "command",
    [["train"], ["evaluate"], ["generate"], ["check"], ["bench", "step"], ["bench", "rollout"], ["bench", "reshard"]],
)
def test_every_command_refuses_in_one_line(tmp_path: Path, command: list[str]) -> None:
    write_case(tmp_path)
    result = megarl(tmp_path, *command, "run.yaml", "batch.updates=5")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "megarl: batch.updates=5: must divide batch.prompts=12, so that every update gets an equal share. "
        "Fix: use 1, 2, 3, 4, 6 or 12.\n"
    )
    assert not (tmp_path / "runs").exists(), "a refused run leaves nothing behind"


def test_a_locale_of_another_encoding_changes_nothing(tmp_path: Path) -> None:
    write_case(tmp_path)
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    result = megarl(tmp_path, "check", "run.yaml", "data.system=Réponds, 日本", **ascii_only)
    assert (result.returncode, result.stderr) == (0, "")
    assert "system: Réponds, 日本\n" in result.stdout


def test_a_benchmark_has_steps(tmp_path: Path) -> None:
    write_case(tmp_path)
    result = megarl(tmp_path, "bench", "step", "run.yaml", "steps=null", "epochs=2")
    assert (result.returncode, result.stderr) == (
        2,
        "megarl: epochs=2: says how long a run is, and not how many steps are measured. "
        "Fix: give steps=N epochs=null.\n",
    )


def test_check_prints_the_resolved_file(tmp_path: Path) -> None:
    run = write_case(tmp_path)
    result = megarl(tmp_path, "check", "run.yaml", "optimizer.lr=3e-5", "parallel.tensor=2", "parallel.processes=2")
    assert result.returncode == 0, result.stderr
    config = load_config(run, ["optimizer.lr=3e-5", "parallel.tensor=2", "parallel.processes=2"])
    assert result.stdout == dump_config(config)
    assert yaml.safe_load(result.stdout)["optimizer"]["lr"] == 3e-5


def test_check_is_quick_and_free_of_torch(tmp_path: Path) -> None:
    write_case(tmp_path, vllm={"enforce_eager": True}, megatron={"moe_permute_fusion": False})
    code = (
        "import sys; from megarl.cli import main; sys.argv = ['megarl', 'check', 'run.yaml']\n"
        "try: main.main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'megatron', 'vllm', 'datasets'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy), file=sys.stderr)"
    )
    start_time = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=CLEAN | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - start_time
    assert result.stderr == "heavy: []\n"
    # 1.5 s on an idle machine, of which transformers takes 1.1; the bound leaves room for a busy one.
    assert seconds < 10


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "3"}, (0, 3)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"}, (1, 3)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3"}, (2, 3)),
        ({"PMI_RANK": "2", "PMI_SIZE": "3"}, (2, 3)),
        # A batch script's own step is no launched world.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "3"}, None),
    ],
)
def test_place_in_a_launched_world(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], place: tuple[int, int] | None
) -> None:
    monkeypatch.setattr(os, "environ", CLEAN | environment)
    assert start.launcher_place() == place


def test_a_launched_world_is_checked_and_joined(monkeypatch: pytest.MonkeyPatch, run_file: Path) -> None:
    monkeypatch.setattr(os, "environ", CLEAN | {"RANK": "1", "WORLD_SIZE": "3"})
    with pytest.raises(Refusal, match=r"^parallel.processes=3: must be a multiple of"):
        start.prepare(run_file, ["parallel.tensor=2"])
    assert start.prepare(run_file, []).parallel.processes is None
    calls: list[tuple[str, int]] = []
    for rank, result in ((0, "done"), (2, None)):
        monkeypatch.setattr(os, "environ", CLEAN | {"RANK": str(rank), "WORLD_SIZE": "3"})

        def worker(name: str, rank: int = rank) -> str:
            calls.append((name, rank))
            return "done"

        assert start.run(worker, "x", processes=None) == result, "only rank 0 has something to print"
    assert calls == [("x", 0), ("x", 2)], "every rank works in its own process"


def test_without_a_launcher_local_processes_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", CLEAN.copy())
    assert start.run(os.getpid, processes=None) == os.getpid(), "one process needs no other"
    assert start.run(os.getpid, processes=2) != os.getpid()


def test_evaluate_refuses_a_missing_checkpoint(tmp_path: Path) -> None:
    write_case(tmp_path)
    result = megarl(tmp_path, "evaluate", "run.yaml", "checkpoint=runs/nowhere")
    assert result.returncode == 2
    assert result.stderr == (
        "megarl: checkpoint=runs/nowhere: is not a directory. "
        "Fix: give a megarl checkpoint, or a run's checkpoints/ folder.\n"
    )


def test_own_algorithm_in_the_working_directory(tmp_path: Path) -> None:
    write_case(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from megarl.algorithms.sft import Sft\n"
        "from megarl.config.algorithms import AlgorithmSettings\n"
        "class Best(Sft):\n"
        "    class Settings(AlgorithmSettings):\n"
        "        generates = False\n"
        "        factor: float = 2.0\n"
        "class Other:\n"
        "    Settings = Best.Settings\n"
    )
    result = megarl(tmp_path, "check", "run.yaml", "algorithm=mine:Best", "data.solution_column=answer")
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)["algorithm"] == {"name": "mine:Best", "factor": 2.0}
    # What no run can use is refused before one starts.
    result = megarl(tmp_path, "check", "run.yaml", "algorithm=mine:Other", "data.solution_column=answer")
    assert result.returncode == 2 and "must name a subclass of megarl.algorithms.base.Algorithm" in result.stderr


def test_modules_in_the_working_directory_hide_no_others(tmp_path: Path) -> None:
    write_case(tmp_path)
    for name in ("random", "queue", "tokenize", "typer", "yaml", "pydantic", "datasets", "tokenizers"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('from the working directory')\n")
    result = megarl(tmp_path, "check", "run.yaml")
    assert result.returncode == 0, result.stderr


def test_reserved_stdout_holds_the_result_alone(tmp_path: Path) -> None:
    code = (
        "import os, sys; from megarl.cli.start import reserved_stdout, show\n"
        "with reserved_stdout(True) as stream:\n"
        "    print('from python'); os.write(1, b'from C\\n'); os.system('echo from a child')\n"
        "    show({'tokens': 3}, stream, True)\n"
        "print('after')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=CLEAN | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert result.stdout == '{"tokens": 3}\nafter\n'
    assert sorted(result.stderr.split("\n")) == ["", "from C", "from a child", "from python"]


def test_a_user_without_a_home_is_given_one(tmp_path: Path) -> None:
    """As in a container that runs under a number of no user: nothing is written to a folder called ~."""
    code = (
        "import os, pwd, sys\n"
        "def unknown(number): raise KeyError(number)\n"
        "pwd.getpwuid = unknown\n"
        "from megarl.cli import main; sys.argv = ['megarl', 'check', 'run.yaml']\n"
        "try: main.main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "print(os.path.expanduser('~'), os.environ['USER'], file=sys.stderr)"
    )
    write_case(tmp_path)
    environment = {key: value for key, value in CLEAN.items() if key not in ("HOME", "USER")}
    environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    home = tmp_path / f"megarl-home-{os.getuid()}"
    assert result.stderr.splitlines() == [
        f"megarl: HOME is not set and this user has none: libraries keep their caches in {home}",
        f"{home} user{os.getuid()}",
    ]
    assert home.is_dir() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("given", ["/dev/null", "/dev/null/nobody"])
def test_a_home_that_can_be_no_folder_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], given: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setenv("HOME", given)
    require_home()
    home = tmp_path / f"megarl-home-{os.getuid()}"
    assert os.environ["HOME"] == str(home) and home.is_dir()
    said = f"megarl: HOME={given} is no folder: libraries keep their caches in {home}\n"
    assert capfd.readouterr().err == said
    for usable in (str(tmp_path), str(tmp_path / "to/be/made")):
        monkeypatch.setenv("HOME", usable)
        require_home()
        assert os.environ["HOME"] == usable
    monkeypatch.setenv("HOME", "")
    require_home()
    assert os.environ.get("HOME") != "", "the system knows better"
    assert capfd.readouterr().err == ""


def test_results_for_people_and_programs() -> None:
    stream = io.StringIO()
    result = {"name": "case", "seconds": {"generate": 1.25, "update": 2.0}, "steps": 3}
    start.show(result, stream, as_json=True)
    assert json.loads(stream.getvalue()) == result
    assert stream.getvalue().count("\n") == 1
    stream = io.StringIO()
    start.show(result, stream, as_json=False)
    assert [line.split() for line in stream.getvalue().splitlines()] == [
        ["name", "case"],
        ["seconds.generate", "1.25"],
        ["seconds.update", "2"],
        ["steps", "3"],
    ]
    start.show(None, stream, as_json=True)
    assert "null" not in stream.getvalue()


@pytest.mark.parametrize(("minutes_left", "code"), [(None, 75), (600, 75), (3, 2)])
def test_a_stop_while_the_program_starts_has_a_sentence(tmp_path: Path, minutes_left: int | None, code: int) -> None:
    """Ahead of the end of a job, which would be too short again, nothing is to be repeated."""
    write_case(tmp_path)
    environment = CLEAN | {"PYTHONPATH": str(ROOT)}
    if minutes_left is not None:
        environment["SLURM_JOB_END_TIME"] = str(int(time.time() + 60 * minutes_left))
    command = [sys.executable, "-m", "megarl", "train", "run.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not listens(process.pid, signal.SIGUSR1):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    fix = "start it again" if code == 75 else "the time limit is shorter than the start. Fix: submit with"
    assert said.splitlines()[-1].startswith(f"megarl: stopped at SIGUSR1, while it started: {fix}")
    assert process.returncode == code


def listens(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = (line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)
