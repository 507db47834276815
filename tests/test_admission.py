"""What ends a run at its start is found by the one function that check, submit and train ask, each in a sentence."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import preloaded
import pytest
import tokenizer_case
from config_case import MODEL, TOKENIZER
from ports import free_port

from megarl.algorithms import build
from megarl.algorithms.base import AlgorithmContext
from megarl.cli import start
from megarl.config.load import load_config
from megarl.config.model_shape import model_shape_from_hf
from megarl.errors import Refusal
from megarl.formats import checkpoint_folder
from megarl.records import Body, Head, Key, Stretch, Trajectory
from megarl.train import admission
from megarl.train.replay import remove_step, save_samples

NO_SOLUTION = b'{"prompt": "x", "answer": "1", "solution": ""}'


def said(run_file: Path, *overrides: str, trains: bool = True) -> list[str]:
    return [str(refusal) for refusal in admission.refusals(load_config(run_file, overrides), trains=trains)]


def test_a_run_that_can_start_passes(run_file: Path) -> None:
    assert said(run_file) == []
    Path("mine.py").write_text("def grade(text, answer, source): return float(text == answer == '2')\n")
    assert said(run_file, "reward.kind=mine:grade", "evaluation.reward.kind=mine:grade") == []


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("nowhere.mine:grade", "No module named 'nowhere'"),
        ("mine:other", "other"),
        ("broken:grade", "invalid syntax"),
        ("raises:grade", "not today"),
        ("mine:nothing", "None"),
        ("mine:few", "few"),
    ],
)
def test_a_reward_that_cannot_be_imported(run_file: Path, kind: str, word: str) -> None:
    Path("mine.py").write_text("def nothing(text, answer, source): pass\ndef few(text): return 1.0\n")
    Path("broken.py").write_text("def grade(:\n")
    Path("raises.py").write_text("raise ValueError('not today')\n")
    (sentence,) = said(run_file, f"reward.kind={kind}")
    assert sentence.startswith(f"reward.kind={kind}: ") and word in sentence and "Fix: " in sentence
    (sentence,) = said(run_file, "reward.kind=f1", f"evaluation.reward.kind={kind}")
    assert kind in sentence and word in sentence


ENVIRONMENT = """
class NoTurn:
    def start(self, prompt): pass
class Fails:
    def __init__(self, size): self.size = size
    def start(self, prompt): return 5 if self.size else None
    def turn(self, said): pass
"""


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        ("nowhere.mine:Game", "must lead to a class with the methods start and turn (ModuleNotFoundError: No module"),
        ("mine:Other", "must lead to a class with the methods start and turn (AttributeError: module 'mine' has no"),
        ("mine:NoTurn", "must lead to a class with the methods start and turn (class NoTurn has no method turn)"),
        ("mine:Fails", "must start with the first row of the data, and called with () it raised TypeError: Fails."),
        (
            "mine:Fails rollout.environment.arguments={'size':1}",
            "must start with the first row of the data, and called with (size=1) it gave 5 (an int) from start instead",
        ),
        ("retry rollout.environment.arguments={'tries':0}", "must start with the first row of the data, and called"),
        ("calculator rollout.environment.arguments={'digits':3}", "must start with the first row of the data, and"),
        ("mine:Fails rollout.environment.arguments={'size':0}", None),
        ("calculator", None),
    ],
)
def test_an_environment_that_cannot_be_used(run_file: Path, overrides: str, rule: str | None) -> None:
    Path("mine.py").write_text(ENVIRONMENT)
    found = said(run_file, *f"rollout.environment.kind={overrides}".split())
    if rule is None:
        assert found == []
    else:
        (sentence,) = found
        assert sentence.startswith(f"rollout.environment.kind={overrides.split()[0]}: {rule}"), sentence


def test_data_that_cannot_be_used(run_file: Path) -> None:
    Path("rows.csv").write_text("prompt,reply\n1+1=,2\n")
    (sentence,) = said(run_file, "data.path=rows.csv")
    assert sentence.startswith("data.answer_column=answer: must be among the columns of rows.csv: prompt, reply.")
    assert said(run_file, "data.path=rows.csv", "data.answer_column=reply") == []
    Path("model/chat_template.jinja").write_text("{{ messages.missing.content }}")
    (sentence,) = said(run_file)
    assert sentence.startswith("the chat template of model, at row 1 of rows.jsonl: cannot render a prompt (")


def test_checkpoints_that_are_none(run_file: Path) -> None:
    graded = ["reward.graded=response", "rollout.thinking_end=</s>"]
    for setting, others in (("model.weights", []), ("evaluation.consumer", graded)):
        (sentence,) = said(run_file, f"{setting}=model", *others)
        assert sentence.startswith(f"{setting}=model: must be a checkpoint, or a folder whose `latest` names one.")
    folder = Path("other/step_000001")
    folder.mkdir(parents=True)
    shape = model_shape_from_hf(MODEL | {"intermediate_size": 128})
    checkpoint_folder.write_progress(folder, shape, {"step": 1, "optimizer": False})
    (sentence,) = said(run_file, "model.weights=other")
    assert sentence.startswith(f"{folder} of a model with ffn_size=128: must be of the model in config.json")
    checkpoint_folder.write_progress(folder, model_shape_from_hf(MODEL), {"step": 1, "optimizer": False})
    assert said(run_file, "model.weights=other") == []


def test_teachers_that_cannot_be(run_file: Path) -> None:
    """A checkpoint of another model or tokenizer is refused before the run, a server's key is looked for."""
    folder, teacher = Path("other/step_000001"), "algorithm={name: opd, teacher: {checkpoint: other}}"
    folder.mkdir(parents=True)
    shape, facts = model_shape_from_hf(MODEL), {"step": 1, "optimizer": False}
    checkpoint_folder.write_progress(folder, model_shape_from_hf(MODEL | {"intermediate_size": 128}), facts)
    (sentence,) = said(run_file, teacher)
    assert sentence.startswith(f"{folder} of a model with ffn_size=128: must be of the model in config.json")
    tokenizer_case.train(Path("ours"))
    tokenizer_case.byte_level(Path("theirs"))
    for made in ("ours", "theirs"):
        Path(made, "config.json").write_text("{}")
    # Where nothing is known of its tokenizer, and where it is the run's own.
    for more in ({}, {"model_path": "ours"}):
        checkpoint_folder.write_progress(folder, shape, facts | more)
        assert said(run_file, teacher, "model.tokenizer=ours") == []
    checkpoint_folder.write_progress(folder, shape, facts | {"model_path": "theirs"})
    (sentence,) = said(run_file, teacher, "model.tokenizer=ours")
    assert re.fullmatch(
        r"algorithm\.teacher\.checkpoint=other: must have been trained with this run's tokenizer, but token \d+ is "
        r"'.+' there and '.+' here\. Fix: use a checkpoint of the same vocabulary\.",
        sentence,
    )
    server = "{url: http://host/v1, model: m, api_key_env: NO_SUCH_KEY}"
    (sentence,) = said(run_file, f"algorithm={{name: opd, teacher: {{server: {server}}}}}")
    assert sentence == (
        "algorithm.teacher.server.api_key_env=NO_SUCH_KEY: must name an environment variable that holds the teacher's "
        "key, and it is not set. Fix: export NO_SUCH_KEY=."
    )


def test_a_judge_without_its_key(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOBODYS_KEY", raising=False)
    judge = ("reward.kind=judge", "reward.judge.url=http://127.0.0.1:9/v1", "reward.judge.model=m")
    assert said(run_file, *judge) == [], "the judge itself is asked by the run"
    (sentence,) = said(run_file, *judge, "reward.judge.api_key_env=NOBODYS_KEY")
    assert sentence.startswith("reward.judge.api_key_env=NOBODYS_KEY: must name an environment variable that holds")


def test_tokenizers_that_cannot_be_used(run_file: Path) -> None:
    file = Path("model/tokenizer.json")
    vocabulary = {f"t{number}": number for number in range(2, MODEL["vocab_size"] + 1)}
    larger = TOKENIZER | {"model": TOKENIZER["model"] | {"vocab": TOKENIZER["model"]["vocab"] | vocabulary}}
    file.write_text(json.dumps(larger))
    (sentence,) = said(run_file)
    assert sentence.startswith("a tokenizer of 301 tokens: must not exceed the model's vocabulary of 300")
    for text in ("", "{", "{}", "[1]", json.dumps(TOKENIZER | {"model": {"type": "Nothing"}})):
        file.write_text(text)
        (sentence,) = said(run_file)
        assert sentence.startswith("tokenizer model: ") and "Fix: " in sentence, text
    file.unlink()
    Path("model/tokenizer_config.json").unlink()
    (sentence,) = said(run_file)
    assert sentence.startswith("tokenizer model: holds neither tokenizer.json nor tokenizer.model")


@pytest.mark.parametrize(
    ("rows", "template", "overrides", "message"),
    [
        (
            b'{"prompt": "x", "answer": "1"}',
            None,
            ["data.answer_column=truth"],
            "data.answer_column=truth: must be among",
        ),
        (b'{"prompt": "gr\xfc\xdfe", "answer": "1"}', None, [], "data.path=rows.jsonl"),
        (b"no json", None, [], "data.path=rows.jsonl"),
        (b'{"prompt": "x", "answer": "1"}', "{{ raise_exception('no such role') }}", [], "no such role"),
        (
            NO_SOLUTION,
            None,
            ["algorithm=sft", "data.solution_column=solution"],
            "data.path=rows.jsonl: has no usable row",
        ),
    ],
)
def test_data_that_cannot_be_read(
    run_file: Path, rows: bytes, template: str | None, overrides: list[str], message: str
) -> None:
    Path("rows.jsonl").write_bytes(rows + b"\n")
    if template is not None:
        Path("model/chat_template.jinja").write_text(template)
    (sentence,) = said(run_file, *overrides)
    assert message in sentence and "Fix: " in sentence
    # An evaluation alone reads no solutions.
    config = load_config(run_file, overrides)
    alone = [str(refusal) for refusal in admission.refusals(config, trains=False, evaluates=True)]
    assert alone == ([] if rows == NO_SOLUTION else [sentence])


def test_a_thinking_that_ends_in_several_tokens(run_file: Path) -> None:
    parts = ["algorithm=start", "reward.graded=response", "algorithm.responses=2"]
    (sentence,) = said(run_file, *parts)
    assert sentence.startswith("rollout.thinking_end='</think>': must be one token of the tokenizer")
    assert said(run_file, *parts[:2]) == []


@pytest.mark.parametrize(
    "overrides", ["", "algorithm.responses=2", "algorithm.responder=initial", "algorithm.thinking_steps=0"]
)
def test_settings_and_algorithm_agree_on_answers_in_parts(run_file: Path, overrides: str) -> None:
    settings = load_config(run_file, ["algorithm=start", *overrides.split()]).algorithm
    algorithm = build(settings, AlgorithmContext(max_tokens=64, group_size=8))
    assert any(one.responder for one in algorithm.plan(1).generations) == settings.answers_in_parts


def test_the_past_counts_for_a_training_alone(run_file: Path) -> None:
    Path("runs/case").mkdir(parents=True)
    Path("runs/case/metrics.jsonl").write_text("")
    (sentence,) = said(run_file)
    assert sentence.startswith("name=case: already names a run")
    assert said(run_file, trains=False) == []


def test_the_commands_ask(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")})
    for trains in (True, False):
        with pytest.raises(Refusal, match=r"reward\.kind=nowhere\.mine:f"):
            start.prepare(run_file, ["reward.kind=nowhere.mine:f"], trains=trains)


def test_rollouts_that_do_not_serve_every_step(run_file: Path) -> None:
    folder = Path("saved")
    folder.mkdir()
    override = "rollout.replay=saved"
    head = Head(Key(0, 0, 0), 0, (Stretch(0, 1, "policy", 0),), reward=1.0)
    sample = Trajectory(head, Body((1,), (-0.5,), "2"))
    missing = (
        "rollout.replay=saved: holds no samples of step {}. "
        "Fix: give a rollouts/ folder that has it, or one of its files."
    )
    assert said(run_file, override) == [missing.format(1)]
    save_samples(folder, 1, 0, [])
    assert said(run_file, override) == [missing.format(1)]
    for step in (1, 2):
        save_samples(folder, step, 1, [sample])
    assert said(run_file, override) == [missing.format(3)]
    assert said(run_file, override, "steps=2") == said(run_file, override, "steps=null", "epochs=3") == []
    # A file serves every step, and an algorithm that does not generate, or an evaluation, replays nothing.
    assert said(run_file, "rollout.replay=saved/step_000001.rank_0001.jsonl") == []
    config = load_config(run_file, [override])
    assert list(admission.contents(config, evaluates=True)) == []
    # A run that continues wants those of what is left of it.
    progress = {"step": 2, "optimizer": True, "config": config.model_dump(mode="json")}
    Path("runs/case/checkpoints/step_000002").mkdir(parents=True)
    checkpoint_folder.write_progress(Path("runs/case/checkpoints/step_000002"), model_shape_from_hf(MODEL), progress)
    Path("runs/case/checkpoints/latest").write_text("step_000002")
    assert said(run_file, override, "resume=auto") == [missing.format(3)]
    save_samples(folder, 3, 0, [sample])
    for step in (1, 2):
        remove_step(folder, step)
    assert said(run_file, override, "resume=auto") == []
    for text in ("{}", "no sample", "\0\xff"):
        Path("saved/step_000003.rank_0000.jsonl").write_bytes(text.encode("latin1"))
        (sentence,) = said(run_file, override, "resume=auto")
        assert "save the rollouts again" in sentence and "saved" in sentence


@pytest.mark.processes
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_of_a_world_that_a_launcher_started_rank_0_alone_looks(run_file: Path, command: str) -> None:
    """And what it finds ends all of them, though nobody ends the others."""
    Path("mine.py").write_text("import os\nfrom pathlib import Path\nPath(f'seen.{os.environ[\"RANK\"]}').touch()\n")
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    overrides = ("parallel.tensor=2", "rollout.tensor=2", "reward.kind=mine:few", "health.join_limit=60")
    ranks = [
        preloaded.megarl(
            Path.cwd(), command, "run.yaml", *overrides, apart=False, RANK=str(rank), LOCAL_RANK=str(rank), **place
        )
        for rank in range(2)
    ]
    said = "".join(rank.communicate(60)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert said.count("megarl: reward.kind=mine:few: ") == 1 and "Traceback" not in said
    assert [file.name for file in Path.cwd().glob("seen.*")] == ["seen.0"]
    assert not Path("runs/case/preflight.json").exists()
