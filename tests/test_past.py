"""What an earlier run of a name means for one that starts: refused, continued with what differs said, finished."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from config_case import MODEL

from megarl.config.load import load_config
from megarl.config.model_shape import model_shape_from_hf
from megarl.config.schema import RunConfig
from megarl.errors import Refusal
from megarl.formats import checkpoint_folder
from megarl.records import Prompt
from megarl.train import differences, past
from megarl.train.saving import forgotten

CHECKPOINT = Path("runs/case/checkpoints/step_000002")


def leave_checkpoint(config: RunConfig, step: int = 2) -> None:
    """What a run of that many steps leaves, but for its weights."""
    folder = CHECKPOINT.with_name(f"step_{step:06d}")
    folder.mkdir(parents=True)
    facts: dict[str, Any] = {"step": step, "optimizer": True}
    facts["config"] = config.model_dump(mode="json")
    checkpoint_folder.write_progress(folder, model_shape_from_hf(MODEL), facts)
    (folder.parent / "latest").write_text(folder.name)


def said(config: RunConfig) -> list[str]:
    return [str(refusal) for refusal in past.refusals(config)]


def test_a_new_run_does_not_mix_with_an_old_one(run_file: Path) -> None:
    config = load_config(run_file)
    assert said(config) == []
    leave_checkpoint(config)
    assert said(config) == [
        "name=case: already names a run, in runs/case, which a new one would mix with. "
        "Fix: continue it with resume=auto, choose another name, or move the folder away."
    ]
    assert said(load_config(run_file, ["resume=auto"])) == []
    assert said(load_config(run_file, ["name=other"])) == []


@pytest.mark.parametrize(
    ("override", "shown", "before", "part"),
    [
        ("seed=7", "seed=7", "1234", "seed"),
        ("data.path=other.jsonl", "data.path=other.jsonl", "rows.jsonl", "data"),
        ("data.system=Be brief.", "data.system=Be brief.", "null", "data"),
        ("data.shuffle=false", "data.shuffle=false", "true", "data"),
        ("model.path=models/other", "model.path=models/other", "model", "model"),
    ],
)
def test_another_run_under_the_same_name_is_refused(
    run_file: Path, override: str, shown: str, before: str, part: str
) -> None:
    leave_checkpoint(load_config(run_file))
    assert said(load_config(run_file, ["resume=auto", override])) == [
        f"{shown} with resume=auto: differs from {before}, with which {CHECKPOINT} was trained. Fix: set it back, "
        f"begin a new run under another name, or go on all the same with resume_changes=[{part}]."
    ]
    assert said(load_config(run_file, ["resume=auto", override, f"resume_changes=[{part}]"])) == []
    other = next(one for one in differences.PARTS if one != part)
    assert len(said(load_config(run_file, ["resume=auto", override, f"resume_changes=[{other}]"]))) == 1


def test_other_settings_are_said_and_layouts_are_free(run_file: Path) -> None:
    before = load_config(run_file)
    leave_checkpoint(before)
    free = ["resume=auto", "steps=9", "parallel.tensor=2", "checkpoint.every=1", "logging.samples=3", "rollout.chunk=8"]
    free += [f"model.path={Path('model').resolve()}", "data.path=./rows.jsonl", "batch.tokens_per_microbatch=1024"]
    config = load_config(run_file, free)
    assert said(config) == [] and past.outlook(config) is None
    config = load_config(run_file, [*free, "rollout.group_size=4", "optimizer.lr=1e-3", "algorithm=nft"])
    assert said(config) == []
    words = past.outlook(config)
    assert words is not None and words.startswith("continues step_000002 with other settings: ")
    for change in ("algorithm.name=nft (was grpo)", "rollout.group_size=4 (was 8)", "optimizer.lr=0.001 (was 1e-06)"):
        assert change in words
    assert "steps" not in words and "parallel" not in words


@pytest.mark.parametrize(
    ("before", "override", "said"),
    [
        ("vllm={}", "vllm={max_logprobs: 7}", 'vllm={"max_logprobs": 7} (was {})'),
        ("vllm={a: 1}", "vllm={a: 1, b: 2}", 'vllm={"a": 1, "b": 2} (was {"a": 1})'),
        ("megatron={a: 1}", "megatron={}", 'megatron={} (was {"a": 1})'),
        ("reward.judge=null", "reward.judge={url: 'http://a', model: b}", "(was null)"),
        ("evaluation.reward={kind: f1}", "evaluation.reward=null", "evaluation.reward=null (was {"),
    ],
)
def test_tables_that_come_go_or_grow_are_said(run_file: Path, before: str, override: str, said: str) -> None:
    leave_checkpoint(load_config(run_file, [before]))
    words = past.outlook(load_config(run_file, ["resume=auto", override]))
    assert words is not None and said in words
    assert past.outlook(load_config(run_file, ["resume=auto", before])) is None


def test_other_rows_in_the_same_file_are_refused(run_file: Path) -> None:
    prompts = [Prompt(number, (1,), f"{number}+1=", str(number + 1)) for number in range(3)]
    known, config = differences.rows_of(prompts), load_config(run_file, ["resume=auto"])
    assert known["prompts"] == 3
    assert list(differences.changed_rows(config, differences.rows_of(list(prompts)), known, CHECKPOINT)) == []
    others = [dataclasses.replace(prompts[0], **change) for change in ({"text": "x"}, {"answer": "9"}, {"index": 7})]
    others.append(dataclasses.replace(prompts[0], solution="by heart"))
    for rows in ([*prompts[1:], prompts[0]], prompts[:2], *([other, *prompts[1:]] for other in others)):
        (refusal,) = differences.changed_rows(config, differences.rows_of(rows), known, CHECKPOINT)
        assert str(refusal) == (
            f"data of {len(rows)} prompts with resume=auto: has other rows than those that {CHECKPOINT} was trained "
            "on, 3 prompts. Fix: bring the data back, begin a new run under another name, or go on all the same with "
            "resume_changes=[data]."
        )
        allowed = load_config(run_file, ["resume=auto", "resume_changes=[data]"])
        assert list(differences.changed_rows(allowed, differences.rows_of(rows), known, CHECKPOINT)) == []


@pytest.mark.parametrize(
    ("overrides", "other_rows", "anew"),
    [
        (["seed=7", "batch.prompts=16", "algorithm.clip_high=0.3"], False, {}),
        (["data.system=Be brief."], False, {"texts": "the data changed"}),
        ([], True, {"texts": "the data changed"}),
        (["model.path=models/other"], False, {"texts": "the model changed"}),
        (["algorithm=nft"], False, {"algorithm": "the algorithm changed", "texts": "the algorithm changed"}),
    ],
)
def test_carried_states_that_say_nothing_to_the_run_begin_anew(
    run_file: Path, overrides: list[str], other_rows: bool, anew: dict[str, str]
) -> None:
    before = load_config(run_file).model_dump(mode="json")
    found = differences.begun_anew(load_config(run_file, overrides), before, other_rows=other_rows)
    assert found == anew


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ([], None),
        (["rollout.ahead=0"], "rollout.ahead is 0"),
        (["data.system=Be brief."], "the data changed"),
        (["algorithm={name: attnrl}"], "the algorithm changed"),
    ],
)
def test_groups_that_wait_say_nothing_to_another_run(run_file: Path, overrides: list[str], why: str | None) -> None:
    before = load_config(run_file, ["rollout.ahead=1"]).model_dump(mode="json")
    found = differences.begun_anew(load_config(run_file, ["rollout.ahead=1", *overrides]), before, other_rows=False)
    assert found.get("waiting") == why
    said = None if why is None else f"begins anew what the checkpoint carries of waiting ({why})"
    assert forgotten({"waiting": True}, {"waiting": why} if why else {}) == said


def test_a_checkpoint_that_cannot_be_continued_is_refused_before_the_start(run_file: Path) -> None:
    config = load_config(run_file, ["resume=auto"])
    leave_checkpoint(config)
    folder = CHECKPOINT.with_name("step_000003")
    folder.mkdir()
    checkpoint_folder.write_progress(folder, model_shape_from_hf(MODEL), {"step": 3, "optimizer": False})
    (folder.parent / "latest").write_text(folder.name)
    with pytest.raises(Refusal, match="without the optimizer's state"):
        said(config)
    wider = model_shape_from_hf(MODEL | {"intermediate_size": 128})
    facts = {"step": 3, "optimizer": True, "config": config.model_dump(mode="json")}
    checkpoint_folder.write_progress(folder, wider, facts)
    with pytest.raises(Refusal, match="of a model with ffn_size=128: must be of the model"):
        said(config)


@pytest.mark.parametrize("latest", [b"", b"junk", b"\xff", b"a\0b", b"/etc/x", b"step_", "step_٣".encode()])
def test_a_latest_that_names_no_checkpoint_is_as_good_as_none(run_file: Path, latest: bytes) -> None:
    config = load_config(run_file, ["resume=auto"])
    leave_checkpoint(config)
    (CHECKPOINT.parent / "latest").write_bytes(latest)
    assert checkpoint_folder.find("runs/case") == CHECKPOINT
    assert said(config) == []


@pytest.mark.parametrize("note", ["{}", "[]", '{"files": {}}', '{"files": {}, "step": 2, "optimizer": true}'])
def test_a_note_without_what_it_must_state_is_damage(run_file: Path, note: str) -> None:
    leave_checkpoint(load_config(run_file))
    (CHECKPOINT / "progress.json").write_text(note)
    assert "progress.json" in str(checkpoint_folder.damage_of(CHECKPOINT))


@pytest.mark.parametrize("place", ["runs", "runs/case", "runs/case/checkpoints"])
def test_a_place_where_no_run_can_be_written(run_file: Path, place: str) -> None:
    for resume in ("never", "auto"):
        config = load_config(run_file, [f"resume={resume}"])
        assert said(config) == []
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        for leave in (Path(place).touch, lambda: Path(place).symlink_to("/nowhere")):
            leave()
            assert said(config) == [
                f"runs/case: must be a folder that a run can write, and {Path(place).absolute()} is no folder. "
                "Fix: set runs_dir to a place where this user may write, or move away what is there."
            ]
            Path(place).unlink()


def test_a_checkpoint_of_an_older_version_gives_its_weights_alone(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(run_file, ["resume=auto"])
    monkeypatch.setattr(checkpoint_folder, "FORMAT", 1)
    leave_checkpoint(config)
    monkeypatch.undo()
    monkeypatch.chdir(run_file.parent)
    with pytest.raises(Refusal) as refusal:
        said(config)
    assert str(refusal.value) == (
        f"{CHECKPOINT} of format 1: was saved by an older megarl, and 0.1.0 is the last version that continues from "
        "it. Fix: finish the run with megarl 0.1.0, or start a new one with model.weights set to it."
    )
    assert said(load_config(run_file, ["name=other", f"model.weights={CHECKPOINT}"])) == []
    assert checkpoint_folder.read_progress(checkpoint_folder.require(CHECKPOINT, "model.weights"))["step"] == 2


def test_damaged_checkpoints_are_named(run_file: Path) -> None:
    leave_checkpoint(load_config(run_file))
    (CHECKPOINT / "progress.json").write_text("{")
    with pytest.raises(checkpoint_folder.Damaged, match=r"progress\.json that cannot be read"):
        said(load_config(run_file, ["resume=auto"]))


def test_a_finished_run_says_so(run_file: Path) -> None:
    config = load_config(run_file, ["resume=auto"])
    leave_checkpoint(config)
    summary = Path("runs/case/summary.json")
    assert past.finished(config) is None
    summary.write_text('{"steps": 2}')
    assert past.finished(config) is None
    summary.write_text('{"steps": 3}')
    assert past.finished(config) is None, "somebody went back to the checkpoint of step 2"
    assert (
        past.finished(load_config(run_file, ["resume=auto", "checkpoint.end=false", "checkpoint.every=2"])) is not None
    )
    leave_checkpoint(config, 3)
    sentence = "case is finished: 3 of {} steps are made, see runs/case/summary.json; raise steps to go on"
    assert past.finished(config) == sentence.format(3)
    assert past.finished(load_config(run_file, ["resume=must", "steps=1"])) == sentence.format(1)
    assert past.finished(load_config(run_file, ["resume=auto", "steps=4"])) is None
    assert past.finished(load_config(run_file)) is None, "a new run is refused instead"
    exports = load_config(run_file, ["resume=auto", "checkpoint.export_hf=true"])
    assert past.finished(exports) is None, "what was not exported yet still can be"
    Path("runs/case/hf").mkdir()
    assert past.finished(exports) is not None
    summary.write_text("{")
    assert past.finished(config) is None


def test_the_configuration_of_every_start_is_kept(run_file: Path) -> None:
    folder = Path("runs/case")
    folder.mkdir(parents=True)
    first = load_config(run_file)
    second, third = load_config(run_file, ["optimizer.lr=1e-3"]), load_config(run_file, ["optimizer.lr=1e-4"])
    for config, step in ((first, 0), (first, 2), (second, 2), (third, 2), (third, 5)):
        past.keep_configuration(config, step)
    kept = {file.name: load_config(file) for file in folder.glob("config*.yaml")}
    assert kept == {
        "config.until_step_000002.yaml": first,
        "config.until_step_000002.2.yaml": second,
        "config.yaml": third,
    }
