"""The parts of `megarl submit` that need no Slurm: arrays, time limits, resources, scripts, Slurm's words in ours."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from config_case import write_case

from megarl.config.load import load_config
from megarl.errors import Refusal
from megarl.submission import slurm
from megarl.submission.orders import parse_order
from megarl.submission.resources import Resources, seconds_of, shown_time
from megarl.submission.script import FOLDER, Template, filled_in, read_template
from megarl.submission.slurm import Partition
from megarl.submission.sweep import parse_sweep

TEMPLATE = """\
#!/usr/bin/env bash
# A comment.
#SBATCH --nodes=1
#SBATCH --time=24:00:00   # as long as it takes
#SBATCH --signal=B:USR1@300
#SBATCH --requeue

set -euo pipefail
printf '%s\\n' "$@"
"""


@pytest.mark.parametrize(
    ("text", "key", "values", "labels"),
    [
        ("seeds=0..2", "seed", ["0", "1", "2"], ["seed0", "seed1", "seed2"]),
        ("seed=1,5,9", "seed", ["1", "5", "9"], ["seed1", "seed5", "seed9"]),
        ("seeds=3..4,7", "seed", ["3", "4", "7"], ["seed3", "seed4", "seed7"]),
        ("optimizer.lr=1e-6, 2e-6", "optimizer.lr", ["1e-6", "2e-6"], ["lr1e-6", "lr2e-6"]),
        (
            "optimizer.betas=[0.9, 0.95],[0.9,0.99]",
            "optimizer.betas",
            ["[0.9, 0.95]", "[0.9,0.99]"],
            ["betas0.9-0.95", "betas0.9-0.99"],
        ),
        (
            "data.system='be brief, please','take your time'",
            "data.system",
            ["be brief, please", "take your time"],
            ["systembe-brief-please", "systemtake-your-time"],
        ),
    ],
)
def test_an_array_of_any_key(text: str, key: str, values: list[str], labels: list[str]) -> None:
    sweep = parse_sweep(text)
    assert (sweep.key, list(sweep.values), list(sweep.labels)) == (key, values, labels)
    assert sweep.overrides(1, "run") == (f"{key}={values[1]}", f"name=run-{labels[1]}")


FORM = "Fix: write KEY=FIRST..LAST or KEY=VALUE,VALUE,..., such as seeds=0..4 or optimizer.lr=1e-6,2e-6."


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seeds", f"--array seeds: must be a key and its values. {FORM}"),
        ("seeds=", f"--array seeds=: must be a key and its values. {FORM}"),
        (".seed=1", f"--array .seed=1: must be a key and its values. {FORM}"),
        ("seeds=[1", f"--array seeds=[1: must be a list of YAML values. {FORM}"),
        ("seeds=1]", f"--array seeds=1]: must be a list of YAML values. {FORM}"),
        ("seeds=4..0", "--array seeds=4..0: has a range that ends before it begins, 4..0. Fix: write 0..4."),
        ("seeds=0..1000", "--array seeds=0..1000: must be at most 1000 tasks. Fix: submit it in parts."),
        (
            "seeds=0..99999999999999",
            "--array seeds=0..99999999999999: must be at most 1000 tasks. Fix: submit it in parts.",
        ),
        (
            "seeds=1,0..3",
            "--array seeds=1,0..3: gives 1 and 1 the same run name, ending in -seed1. Fix: leave one of them out.",
        ),
        (
            "data.system=a b,a/b",
            "--array data.system=a b,a/b: gives a b and a/b the same run name, ending in -systema-b. "
            "Fix: leave one of them out.",
        ),
        (
            "name=a,b",
            "--array name=a,b: cannot give each task its name, which follows from the array. Fix: vary another key.",
        ),
    ],
)
def test_what_is_no_array(text: str, sentence: str) -> None:
    with pytest.raises(Refusal) as refusal:
        parse_sweep(text)
    assert str(refusal.value) == sentence


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("4:00:00", 14400),
        ("2-0", 172800),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-12:30:15", 131415),
        ("UNLIMITED", float("inf")),
    ],
)
def test_slurms_times(time: str, seconds: float) -> None:
    assert seconds_of(time) == seconds
    if seconds != float("inf"):
        assert 0 <= seconds_of(shown_time(seconds)) - seconds < 60


RESOURCES = Resources(nodes=2, tasks_per_node=8, gpus_per_node=8)
TIME = "Fix: write minutes, hours:minutes:seconds or days-hours, such as 90, 4:00:00 or 2-00."


@pytest.mark.parametrize(
    ("resources", "sentence"),
    [
        (Resources(0, 8, 8), "--nodes 0: must be at least 1. Fix: give the number of nodes of the run."),
        (Resources(1, 1, -1), "--gpus-per-node -1: must not be negative. Fix: use 0 for a job on CPUs."),
        (Resources(1, 0, 0), "--tasks-per-node 0: must be at least 1. Fix: leave it out for one task per GPU."),
        (
            Resources(1, 4, 8),
            "--tasks-per-node 4 with --gpus-per-node 8: must be one task per GPU. Fix: give --gpus-per-node alone.",
        ),
        (Resources(1, 8, 8, 0), "--cpus-per-task 0: must be at least 1. Fix: give the cores of a process."),
        (Resources(1, 8, 8, time="4h"), f"--time 4h: is not a time limit that Slurm knows. {TIME}"),
        (Resources(1, 8, 8, time="0:00"), f"--time 0:00: must be more than nothing. {TIME}"),
        (
            Resources(1, 8, 8, others=("-p gpu",)),
            "--sbatch -p gpu: must be one long option of sbatch. Fix: write it as --sbatch=--qos=high.",
        ),
        (
            Resources(1, 8, 8, others=("--comment=a\nrm -rf .",)),
            "--sbatch --comment=a\nrm -rf .: must be one long option of sbatch. Fix: write it as --sbatch=--qos=high.",
        ),
        (
            Resources(1, 8, 8, others=("--array=0-3",)),
            "--sbatch --array=0-3: is decided by megarl submit. Fix: use --array.",
        ),
    ],
)
def test_what_no_cluster_could_give(resources: Resources, sentence: str) -> None:
    with pytest.raises(Refusal) as refusal:
        resources.check()
    assert str(refusal.value) == sentence


KNOWN = [Partition("cpu", True, 3600, 2, 4), Partition("gpu", False, 172800, 16, 96)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"partition": "gpux"}, "--partition gpux: is no partition of this cluster. Fix: use cpu or gpu."),
        (
            {"partition": "gpu", "nodes": 17},
            "--nodes 17: is more than the 16 of partition gpu. Fix: use fewer nodes, or another partition.",
        ),
        ({"nodes": 3}, "--nodes 3: is more than the 2 of partition cpu. Fix: use fewer nodes, or another partition."),
        (
            {"time": "2:00:00"},
            "--time 2:00:00: is over the limit of partition cpu, 1:00:00. Fix: use a shorter time (a run that is cut "
            "goes on with resume=auto), or another partition.",
        ),
        ({"account": "lab9"}, "--account lab9: is not one of yours. Fix: use lab1 or lab2."),
    ],
)
def test_what_this_cluster_cannot_give(
    changes: dict[str, str | int], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    asked = {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0} | changes
    found = [str(refusal) for refusal in slurm.refusals(Resources(**asked), KNOWN, {"lab1", "lab2"})]  # pyright: ignore
    assert found == [sentence]


def test_what_this_cluster_can_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    fine = Resources(16, 8, 8, time="2-0", partition="cpu,gpu", account="lab1")
    assert not list(slurm.refusals(fine, KNOWN, {"lab1"}))
    unknown = Resources(99, 8, 8, time="9-0", account="lab9")
    assert not list(slurm.refusals(unknown, [], set())), "what is not known is no reason to refuse"
    no_default = [Partition("gpu", False, 3600, 2, 96)]
    sentence = "--partition: must be given, as this cluster has no default. Fix: use gpu."
    assert [str(refusal) for refusal in slurm.refusals(RESOURCES, no_default, set())] == [sentence]
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    assert not list(slurm.refusals(RESOURCES, no_default, set()))


LOOK = "Fix: lower what is asked of a node, or use another partition (sinfo -o '%P %D %c %G' shows nodes, cores, GPUs)."


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "invalid partition specified: gpux",
            "--partition big: is no partition of this cluster. Fix: use one that sinfo lists.",
        ),
        (
            "No partition specified or system default partition",
            "--partition big: must be given, as this cluster has no default. Fix: use one of sinfo's.",
        ),
        (
            "Invalid account or account/partition combination specified",
            "--account lab: is not an account of yours, or not one for partition big. "
            "Fix: use one that `sacctmgr show associations user=$USER` lists.",
        ),
        (
            "More processors requested than permitted",
            f"--nodes 2 with 8 tasks and 8 GPUs each: is more cores than partition big permits. {LOOK}",
        ),
        (
            "Requested node configuration is not available",
            f"--nodes 2 with 8 tasks and 8 GPUs each: is more than partition big has. {LOOK}",
        ),
        (
            "Node count specification invalid",
            "--nodes 2: is not a number of nodes that partition big permits. Fix: use another number of nodes.",
        ),
        (
            "Requested time limit is invalid (missing or exceeds some limit)",
            "--time 9-0: is missing, or over the limit of partition big. "
            "Fix: give a shorter --time (sinfo -o '%P %l' shows the limits).",
        ),
        (
            "Invalid qos specification",
            "--sbatch=--qos: is not one that you may use. Fix: use one that `sacctmgr show qos` lists.",
        ),
        (
            "Invalid generic resource (gres) specification",
            "--gpus-per-node 8: is a resource that this cluster does not know. "
            "Fix: use a partition with GPUs, or --gpus-per-node 0.",
        ),
        (
            "Invalid job array specification",
            "--array: has more tasks than this cluster permits. Fix: submit it in parts.",
        ),
        (
            "User's group not permitted to use this partition",
            "--partition big: is not for your group. Fix: use another partition.",
        ),
        (
            "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
            "--nodes 2 with 8 tasks and 8 GPUs each: is more than your account or its quality of service permits at "
            "once. Fix: lower the nodes or the time, or wait until other jobs of yours have ended.",
        ),
        (
            "Invalid feature specification",
            "the job: is refused by Slurm: Invalid feature specification. Fix: correct what it names.",
        ),
    ],
)
def test_slurms_words_in_ours(words: str, sentence: str) -> None:
    asked = Resources(2, 8, 8, time="9-0", partition="big", account="lab")
    assert str(slurm.explained(words, asked)) == sentence


def template(tmp_path: Path) -> Template:
    (tmp_path / "train.sbatch").write_text(TEMPLATE)
    return read_template("train", tmp_path)


def test_a_template_is_filled(tmp_path: Path) -> None:
    read = template(tmp_path)
    assert (read.option("time"), read.option("requeue"), read.option("partition")) == ("24:00:00", "", None)
    filled = read.fill(
        {"nodes": "4", "time": "1:00:00", "exclusive": "", "comment": "it's #1"}, ["set -- a"], "by\nhand"
    )
    assert filled == (
        "#!/usr/bin/env bash\n"
        "# A comment.\n"
        "#SBATCH --nodes=4\n"
        "#SBATCH --time=1:00:00\n"
        "#SBATCH --signal=B:USR1@300\n"
        "#SBATCH --requeue\n"
        "#SBATCH --exclusive\n"
        '#SBATCH --comment="it\'s #1"\n'
        "\n"
        "# by hand\n"
        "set -- a\n"
        "\n"
        "set -euo pipefail\n"
        "printf '%s\\n' \"$@\"\n"
    )


ARGUMENTS = [
    "configs/my run.yaml",
    "data.template='Q: {prompt}\n\"A\":'",
    "data.answer_pattern=####\\s*(.+)",
    "optimizer.betas=[0.9, 0.99]",
    "data.system=$HOME `id` $(id) !! * ~ ; & | \\",
    "data.source_column=",
    "name=Größe",
]


def ran(script: str, **environment: str) -> str:
    return subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True, check=True).stdout


def test_arguments_pass_through_the_shell_as_they_are(tmp_path: Path) -> None:
    """Blanks, quotes, brackets, dollars, line breaks and empty values."""
    lines = filled_in(Path("my runs/x/jobs/train"), [ARGUMENTS], is_array=False)
    script = template(tmp_path).fill({}, lines, "x") + 'printf \'%s %s\' "$MEGARL_LOGS" "$MEGARL_HOME"\n'
    said = "".join(f"{argument}\n" for argument in ARGUMENTS) + "my runs/x/jobs/train-17 "
    assert ran(script, SLURM_JOB_ID="17") == said + str(FOLDER.parent)
    assert ran(script, SLURM_JOB_ID="17", MEGARL_HOME="/a b") == said + "/a b", "the user's own repository"


def test_each_task_of_an_array_has_its_own_arguments(tmp_path: Path) -> None:
    of_task = [[*ARGUMENTS, "seed=0"], [*ARGUMENTS, "data.system=a 'b'"]]
    lines = filled_in(Path("runs/x/jobs/train"), of_task, is_array=True)
    script = template(tmp_path).fill({}, lines, "x") + "echo $MEGARL_LOGS ${MEGARL_ARRAY_KEY-unset}\n"
    for task, arguments in enumerate(of_task):
        logs = f"runs/x/jobs/train-17_{task}\n"
        said = ran(script, SLURM_ARRAY_JOB_ID="17", SLURM_ARRAY_TASK_ID=str(task), SLURM_JOB_ID="18")
        assert said == "".join(f"{argument}\n" for argument in arguments) + logs


def test_an_evaluation_of_suites_has_the_runs_place_and_none_of_its_settings(tmp_path: Path) -> None:
    run = load_config(write_case(tmp_path), ["name=mine", "runs_dir=there"])
    order = parse_order("evaluate --suite=nft evaluation.max_tokens=14336")
    given = ["run.yaml", "optimizer.lr=1e-6", "evaluation.temperature=0.5"]
    assert order.arguments(given, run) == [
        "run.yaml", "name=mine", "runs_dir=there", "checkpoint=there/mine", "--suite=nft",
        "evaluation.max_tokens=14336",
    ]  # fmt: skip
    # The suites say what is asked, so neither the run's data nor its own settings are judged.
    assert order.overrides == [] and list(order.refusals(run, is_array=False)) == []
    assert parse_order("evaluate").arguments(given, run)[1:3] == given[1:]


def test_a_conversion_of_a_models_files_is_of_its_own_arguments(tmp_path: Path) -> None:
    run = load_config(write_case(tmp_path), ["checkpoint.end=false"])
    order = parse_order("convert --hf models/7b --out checkpoints/7b --tensor 4")
    assert order.arguments(["run.yaml"], run) == ["--hf", "models/7b", "--out", "checkpoints/7b", "--tensor", "4"]
    assert list(order.refusals(run, is_array=False)) == []
    assert parse_order("convert --hf-config X").arguments(["run.yaml"], run)[0] == "--megatron"
