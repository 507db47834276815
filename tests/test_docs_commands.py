"""Every command of README.md, CONTRIBUTING.md and docs/: its words are the command line's, its configuration breaks no
rule, and it is run: here, by a test that the table names, or nowhere, where it says what it needs."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import click
import docs_case
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from docs_case import PAGES, ROOT, Command

from megarl.cli.main import app
from megarl.config import gpu_rules, rules
from megarl.config.cluster import read_cluster
from megarl.config.load import load_config
from megarl.config.model_shape import read_model_shape
from megarl.reproduction import rows

COMMANDS = [command for page in PAGES for command in docs_case.commands(page)]

REPLAY = "test_runs.py::test_replay_trains_as_the_run_that_made_the_rollouts"
LAUNCHERS = "test_runs.py::test_every_launcher_gives_the_same_run"
OPTIONS = "test_runs.py::test_every_option_of_the_loop_at_once"
ROW_TO_VERDICT = "test_reproduce.py::test_a_row_goes_from_its_model_to_its_verdict_and_nothing_is_done_twice"
ON_SLURM = "test_submit_slurm.py::test_slurm_accepts_the_script_of_a_32b_recipe_on_16_nodes"

#: What stands in capitals for something of the reader's.
PLACEHOLDERS = {
    "CONFIG": "grpo_qwen2.5_32b_16k",
    "PARTITION": "gpu",
    "CPU_PARTITION": "cpu",
    "FILE": "data/quickstart/arithmetic/heldout.jsonl",
    "JOB": "1",
}
#: Models that commands name, and whose sizes stand for them.
MODELS = {
    "models/Qwen2.5-32B": "configs/models/Qwen2.5-32B",
    "models/Qwen2.5-72B": "configs/models/Qwen2.5-72B",
    "checkpoints/32b/hf": "configs/models/Qwen2.5-32B",
}
#: Run here, in a folder with the quickstart's inputs: they take a moment.
RUN_HERE = ("megarl doctor", "megarl check", "megarl grade", "megarl reproduce nft_7b_nft --dry-run")
#: Run with small inputs by tests elsewhere. A command is of the first row all of whose words it has; the functions of
#: that row, of which one is a test, have the command's verb, options and settings among them, but for `ANYWHERE`.
RUN_BY: list[tuple[str, list[str]]] = [
    ("bash launch/quickstart.sh", ["test_docs_commands.py::quickstart", "test_docs_commands.py::test_cheap_ones_run"]),
    ("bash launch/test.sh", [".ci/run"]),
    ("megarl train rollout.replay parallel.processes", [REPLAY, LAUNCHERS, OPTIONS]),
    ("megarl train rollout.replay", [REPLAY]),
    ("megarl train rollout.save", ["test_runs.py::base", REPLAY]),
    ("megarl train parallel.processes", [LAUNCHERS, OPTIONS]),
    ("megarl train parallel.pipeline", [OPTIONS]),
    ("megarl train resume", ["test_runs.py::test_a_finished_run_is_not_touched"]),
    ("megarl doctor runs/", ["test_doctor.py::test_whole_ones_are_listed_newest_first"]),
    ("megarl generate", ["test_runs.py::test_generate_makes_the_first_steps_rollouts"]),
    (
        "megarl evaluate --suite",
        [
            "test_suite_runs.py::evaluated",
            "test_suite_runs.py::test_a_checkpoint_and_what_it_is_exported_to_have_the_same_scores",
        ],
    ),
    ("megarl evaluate checkpoint", ["test_runs.py::test_evaluate_repeats_the_runs_last_evaluation"]),
    ("megarl plan --schedule", ["test_plan_push.py::test_the_schedule_has_a_line_for_every_box"]),
    (
        "megarl plan",
        [
            "test_plan_cli.py::test_the_largest_recipe_is_planned_in_a_minute_and_little_memory",
            "test_plan_cli.py::test_a_run_that_does_not_fit_ends_with_1",
            "test_plan_cli.py::test_json_is_one_line_with_every_figure_and_this_process_stays_free_of_torch",
        ],
    ),
    ("megarl submit --dry-run", ["test_submit_slurm.py::RECIPE", ON_SLURM]),
    ("megarl reproduce quickstart_all", [ROW_TO_VERDICT]),
    ("megarl reproduce my.yaml", [ROW_TO_VERDICT]),
    ("megarl reproduce", ["test_reproduce.py::test_the_list_has_a_line_for_every_row", ROW_TO_VERDICT]),
    ("megarl report --follow", ["test_report.py::test_following_ends_with_the_run"]),
    (
        "megarl report",
        ["test_report.py::call", "test_report.py::test_runs_beside_each_other_say_in_what_they_differ"],
    ),
    ("megarl bench step", ["test_runs.py::test_benchmarks_measure_the_loop"]),
    ("megarl bench rollout", ["test_runs.py::test_benchmarks_measure_the_loop"]),
    (
        "megarl bench reshard",
        ["test_bench_reshard.py::bench", "test_bench_reshard.py::test_least_traffic_and_the_same_bits"],
    ),
    ("launch/local.sh", [LAUNCHERS]),
    ("launch/mpirun.sh", [LAUNCHERS]),
    (
        "python tools/convert_hf_to_megatron.py",
        ["test_docs_commands.py::quickstart", "test_docs_commands.py::test_cheap_ones_run"],
    ),
    (
        "python tools/convert_megatron_to_hf.py",
        ["test_tools_conversion.py::test_there_and_back_with_everything_that_belongs_to_it"],
    ),
    ("python tools/verify_conversion.py", ["test_tools_conversion.py::test_verification_of_a_good_conversion"]),
    (
        "python tools/compare_runs.py",
        ["test_tools_compare_runs.py::said", "test_tools_compare_runs.py::test_the_first_number_that_differs_is_said"],
    ),
]
#: Settings that say what a run is called, how long it is and where its files are.
ANYWHERE = {"name", "steps", "model.path", "evaluation.rows"}


def words_of(command: Command) -> tuple[str, ...]:
    """The command's words, with something in the place of what is the reader's."""

    def filled(word: str) -> str:
        return re.sub(r"\b[A-Z][A-Z_]+\b", lambda found: PLACEHOLDERS.get(found[0], found[0]), word)

    program, *others = map(filled, command.words)
    return ("megarl" if program == ".venv/bin/megarl" else program, *others)


def megarl_arguments(words: tuple[str, ...]) -> list[str] | None:
    """What `megarl` is called with by a command, also by launchers and templates of jobs."""
    program, *others = words
    if program == "megarl":
        return others
    if program in ("launch/local.sh", "launch/mpirun.sh"):
        return others[1:]
    if program == "launch/multinode.sh":
        return others[2:]
    if program == "sbatch":
        script = next(number for number, word in enumerate(others) if word.endswith(".sbatch"))
        verb = Path(others[script]).stem
        return [verb, *others[script + 1 :]] if verb != "convert" else None
    return None


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The parameters of a command, as the real command line reads them. Raises `click.UsageError`."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        if name not in command.commands:
            raise click.UsageError(f"no such command: {name}")
        command = command.commands[name]
    return command.make_context(command.name, list(arguments)).params


def of_page(command: Command) -> str:
    return f"{command.page}:{command.line}"


MEGARL = [command for command in COMMANDS if megarl_arguments(words_of(command)) is not None]


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 40 and len(MEGARL) > 25
    assert {command.page for command in COMMANDS} >= {"README.md", "docs/cluster.md", "docs/debugging.md"}
    joined = next(c for c in COMMANDS if "--then" in c.words and c.page == "docs/cluster.md")
    assert joined.words[-1] == "convert --sbatch=--partition=CPU_PARTITION"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the repository's scripts and configurations with the inputs that launch/quickstart.sh makes, by its
    own lines; in the place of the warm-up's checkpoint the model that it begins with, converted. Beside them, what
    stands for the files of the 32B run."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("configs", "launch", "slurm", "tools"):
        (folder / name).symlink_to(ROOT / name)
    script = (ROOT / "launch" / "quickstart.sh").read_text()
    settings = script[script.index("name=quickstart\n") : script.index("bash launch/setup.sh")]
    inputs = script[script.index("if [[ ! -f $inputs/complete") : script.index("if [[ ! -f runs/${name}_warmup")]
    started = run(folder, "bash", "-euc", settings + inputs)
    assert started.returncode == 0, started.stderr
    convert = "python tools/convert_hf_to_megatron.py --hf data/quickstart/model --out OUT --tensor 2 --pipeline 2"
    converted = run(folder, *convert.replace("OUT", "runs/quickstart_warmup/checkpoints/step_000600").split())
    assert converted.returncode == 0, converted.stderr
    (folder / "runs/quickstart_warmup/checkpoints/latest").write_text("step_000600")
    for place, sizes in MODELS.items():
        shutil.copytree(folder / "data/quickstart/model", folder / place)
        shutil.copy(ROOT / sizes / "config.json", folder / place)
    row = {"prompt": [{"role": "user", "content": "1+1="}], "reward_model": {"ground_truth": "2"}, "answer": "2"}
    pq.write_table(pa.Table.from_pylist([row] * 4), folder / "data" / "dapo_math_17k.parquet")
    answers = [{"answer": "3", "response": "1+2 = \\boxed{3}"}, {"answer": "4", "response": "so 4"}]
    file = folder / "runs/quickstart/evaluations/step_000040.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in answers))
    return folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` by this Python and this source."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "PMI_"))}
    environment = clean | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    own = [sys.executable, "-m", "megarl", *words[1:]] if words[0] == "megarl" else words
    return subprocess.run(own, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("command", MEGARL, ids=of_page)
def test_the_command_line_and_the_rules_take_it(command: Command, quickstart: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(quickstart)
    words = words_of(command)
    arguments = megarl_arguments(words)
    assert arguments is not None
    given = parsed(arguments)
    if arguments[0] == "reproduce" and given["name"] not in (None, "my.yaml"):
        assert rows.find(given["name"])
    path = given.get("config") or given.get("target")
    if path is None or path.suffix != ".yaml":
        return
    overrides = [text for text in given["overrides"] or () if not text.startswith("checkpoint=")]
    config = load_config(path, overrides)
    cluster = read_cluster(given.get("cluster") or "h100")
    processes = given.get("gpus") or processes_of(words, config, given, cluster.gpus_per_node)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"processes": processes})})
    assert [str(refusal) for refusal in rules.broken_setting_rules(config, processes=processes)] == []
    if given.get("cluster") is not None:
        found = gpu_rules.refusals(config, read_model_shape(config.model.path), cluster.capability)
        assert [str(refusal) for refusal in found] == []


#: Commands within sentences and tables: those that name a configuration, and tools.
INLINE = [
    (str(page.relative_to(ROOT)), code)
    for page in PAGES
    for code in docs_case.in_backticks(page)
    if re.match(r"megarl .*configs/[a-z][\w./-]*\.yaml|python tools/", code)
]


@pytest.mark.parametrize(("page", "code"), INLINE)
def test_commands_in_sentences_are_the_command_lines(page: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, *others = shlex.split(code)
    if program == "megarl":
        given = parsed(others)
        # Sizes that the reader chooses.
        load_config(given["config"], [re.sub(r"=[A-Z]$", "=1", text) for text in given["overrides"] or ()])
        return
    source = (ROOT / others[0]).read_text(encoding="utf-8")
    assert [word for word in others if word.startswith("--") and f'"{word}"' not in source] == []


def processes_of(words: tuple[str, ...], config: Any, given: dict[str, Any], per_node: int) -> int:
    """How many processes a command starts."""
    if words[0] in ("launch/local.sh", "launch/mpirun.sh"):
        return int(words[1])
    if words[0] == "launch/multinode.sh":
        return len(words[1].split(",")) * int(words[2])
    nodes = given.get("nodes") or next((int(w.split("=")[1]) for w in words if w.startswith("--nodes=")), None)
    if nodes is not None:
        return nodes * per_node
    return config.parallel.processes or getattr(config, "gpus", None) or 1


def is_cheap(command: Command) -> bool:
    words = shlex.join(words_of(command))
    return not command.needs and words.startswith(RUN_HERE) and words != "megarl doctor runs/quickstart"


CHEAP = [command for command in COMMANDS if is_cheap(command)]


@pytest.mark.parametrize("command", {words_of(c): c for c in CHEAP}.values(), ids=of_page)
def test_cheap_ones_run(command: Command, quickstart: Path) -> None:
    done = run(quickstart, *words_of(command))
    assert done.returncode == 0, done.stderr


def test_every_command_is_run_or_says_what_it_needs() -> None:
    left = [command for command in COMMANDS if not command.needs and command not in CHEAP]
    without = [str(command) for command in left if row_of(command) is None]
    assert not without, (
        f"no test runs these, and they do not say that they need GPUs, a cluster or a network: {without}"
    )
    for command in left:
        _, places = row_of(command) or ("", [])
        source = "".join(source_of(place) for place in places)
        # A fixture's settings are a table's.
        lacking = [w for w in telling(command) if w not in source and f'"{w.rpartition(".")[2]}"' not in source]
        assert not lacking, f"{command}: {places} should run it, and have nothing of {lacking}"


def row_of(command: Command) -> tuple[str, list[str]] | None:
    words = words_of(command)
    return next((row for row in RUN_BY if all(any(_is(word, key) for word in words) for key in row[0].split())), None)


def _is(word: str, key: str) -> bool:
    """Whether a command's word is that of a row: the same, a setting of that name, or something in that folder."""
    return word == key or word.startswith((key + "=", key.removesuffix("/") + "/"))


def telling(command: Command) -> list[str]:
    """The words of a command that a test which runs it must have: its program or verb, its options and settings."""
    arguments = megarl_arguments(words_of(command))
    first = Path(command.words[1 if command.words[0] in ("bash", "python") else 0]).stem
    found = [first] if arguments is None or first != "megarl" else arguments[: 2 if arguments[0] == "bench" else 1]
    for word in command.words[1:]:
        setting = re.match(r"([a-z_]+(?:\.[a-z_]+)*)=", word)
        if word.startswith("--"):
            found.append(word.partition("=")[0])
        elif setting and setting[1] not in ANYWHERE:
            found.append(setting[1])
    return [word for word in found if word != "--json"]


@cache
def source_of(place: str) -> str:
    """The source of a test, of a function or a constant that tests use, or of a file."""
    file, _, name = place.partition("::")
    if not name:
        return (ROOT / file).read_text(encoding="utf-8")
    text = (ROOT / "tests" / file).read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        names = [node.name] if isinstance(node, ast.FunctionDef) else []
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if name in names:
            return ast.get_source_segment(text, node) or ""
    raise AssertionError(f"there is no {name} in tests/{file}")


def test_the_table_names_tests() -> None:
    for _, places in RUN_BY:
        assert any("::test_" in place or "::" not in place for place in places), places
        for place in places:
            assert source_of(place)
