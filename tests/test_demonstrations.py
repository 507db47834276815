"""Demonstrations: a second data set with an order of its own; what is skipped, passed over and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from config_case import RUN
from tokenizer_case import Characters

from megarl.config.data import DataSettings
from megarl.config.load import load_config
from megarl.config.rules import broken_rules
from megarl.config.schema import RunConfig
from megarl.data.preview import data_refusals
from megarl.errors import Refusal, TrainingStopped
from megarl.train import differences, run_data

ROWS = [
    {"q": "a", "long": "1+1=2"},
    {"q": "b", "long": None},
    {"q": "c", "long": "a text of more than ten characters"},
    {"q": "d", "long": "3"},
    {"q": "e", "long": "  "},
    {"q": "f", "long": "5"},
]


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(folder: Path, per_step: int = 2, **demonstrations: Any) -> RunConfig:
    write(folder / "rows.jsonl", [{"prompt": "1+1=", "answer": "2"}])
    write(folder / "shown.jsonl", ROWS)
    shown = {"path": str(folder / "shown.jsonl"), "prompt_column": "q", "solution_column": "long"} | demonstrations
    data = RUN["data"] | {"path": str(folder / "rows.jsonl"), "shuffle": False, "demonstrations": shown}
    batch = RUN["batch"] | {"prompts": 1, "demonstrations": per_step}
    return RunConfig.model_validate(RUN | {"algorithm": {"name": "bridge"}, "data": data, "batch": batch})


def demonstrations(config: RunConfig, per_step: int = 2) -> run_data.Demonstrations:
    found = run_data.load(
        config, Characters(), need_solution=False, evaluates=False, demonstrations=per_step
    ).demonstrations
    assert found is not None
    return found


def test_rows_without_a_response_are_skipped_and_long_ones_passed_over(tmp_path: Path) -> None:
    found = demonstrations(config_of(tmp_path, max_tokens=10))
    counters = found.data.counters
    assert (counters["rows"], counters["kept"], counters["no_solution"]) == (6, 4, 2)
    drawn = [found.draw(2) for _ in range(3)]
    assert [[prompt.text for prompt, _ in one] for one, _ in drawn] == [["a", "d"], ["f", "a"], ["d", "f"]]
    assert [counted["demonstrations_too_long"] for _, counted in drawn] == [1, 0, 1]
    # What is learned is the whole response with the end token.
    (_, ids), _ = drawn[0][0]
    assert len(ids) == len("1+1=2") + 1


def test_the_order_goes_on_where_a_state_says(tmp_path: Path) -> None:
    first, again = (demonstrations(config_of(tmp_path, max_tokens=10)) for _ in range(2))
    first.draw(2)
    state = first.stream.state()
    # The one that was passed over was drawn too.
    assert state == 3
    again.stream.restore(state)
    assert first.draw(3) == again.draw(3)


def test_fewer_responses_that_fit_than_a_step_learns_end_the_run(tmp_path: Path) -> None:
    """Not sooner: as long as enough may fit, those that do not are passed over, however many come in a row."""
    found = demonstrations(config_of(tmp_path, max_tokens=4))
    for _ in range(3):
        drawn, _ = found.draw(2)
        assert {prompt.text for prompt, _ in drawn} == {"d", "f"}
    again = demonstrations(config_of(tmp_path, max_tokens=4))
    with pytest.raises(TrainingStopped) as caught:
        again.draw(3)
    assert str(caught.value) == (
        "fewer than the 3 responses that a step learns are left of data.demonstrations: 2 of its 4 rows have one of "
        "more than 4 tokens. Fix: raise data.demonstrations.max_tokens, or give more rows"
    )


def test_fewer_rows_than_a_step_learns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal) as caught:
        demonstrations(config_of(tmp_path, per_step=5), per_step=5)
    assert str(caught.value) == (
        "data.demonstrations of 4 rows: must have the 5 that a step learns. Fix: set batch.demonstrations to 4 at "
        "most, or give more rows."
    )


def test_columns_and_files_are_looked_at_before_a_run(tmp_path: Path) -> None:
    config = config_of(tmp_path, solution_column="answer")
    said = [str(refusal) for refusal in data_refusals(config, Characters())]
    assert len(said) == 1 and said[0].startswith(
        "data.demonstrations.solution_column=answer: must be among the columns"
    )
    assert said[0].endswith("Fix: set data.demonstrations.solution_column.")
    missing = config_of(tmp_path, path=str(tmp_path / "none.jsonl"))
    (refusal,) = data_refusals(missing, Characters())
    assert str(refusal).startswith(f"data.demonstrations.path={tmp_path}/none.jsonl: is not a file")


def test_what_is_left_out_is_as_in_data() -> None:
    data = DataSettings.model_validate(
        {
            "path": "a.jsonl",
            "prompt_column": "question",
            "system": "Reason.",
            "extra_columns": ["x"],
            "demonstrations": {"sources": [{"path": "b.jsonl", "weight": 1}, {"path": "c.jsonl", "weight": 2}]},
        }
    )
    found = data.of_demonstrations()
    assert found is not None
    assert (found.prompt_column, found.solution_column, found.system) == ("question", "solution", "Reason.")
    assert found.path is None and [one.path for one in found.sources] == ["b.jsonl", "c.jsonl"]
    assert found.extra_columns == () and found.demonstrations is None
    assert data.model_copy(update={"demonstrations": None}).of_demonstrations() is None


SHOWN = "data.demonstrations={path: rows.jsonl, solution_column: answer}"
#: (overrides, message)
REFUSED: list[tuple[tuple[str, ...], str]] = [
    (
        ("algorithm=bridge",),
        "data.demonstrations: must be given: algorithm.name=bridge learns demonstrations. Fix: set "
        "data.demonstrations.path, and data.demonstrations.solution_column to the responses' column.",
    ),
    (
        ("algorithm=bridge", "data.demonstrations={}"),
        "data.demonstrations.path=null: names no data, and data.demonstrations.sources neither. Fix: give a file or a "
        "hub name.",
    ),
    (
        (SHOWN,),
        "data.demonstrations: has no effect with algorithm.name=grpo, which learns none. Fix: remove it, or choose an "
        "algorithm that learns demonstrations.",
    ),
    (
        ("batch.demonstrations=4",),
        "batch.demonstrations=4: has no effect with algorithm.name=grpo, which learns none. Fix: remove it, or choose "
        "an algorithm that learns demonstrations.",
    ),
    (
        ("algorithm=bridge", SHOWN, "data.demonstrations.max_tokens=200", "batch.tokens_per_microbatch=1024"),
        "data.max_prompt_tokens=64 + data.demonstrations.max_tokens=200: must fit the model's 256 positions. Fix: make "
        "them 8 tokens shorter.",
    ),
    (
        ("algorithm=bridge", SHOWN, "parameters=adapter"),
        "parameters=adapter: trains one adapter, and algorithm.name=bridge trains its base too. Fix: remove it, "
        "or use an algorithm that trains the policy alone.",
    ),
    (
        ("algorithm={name: bridge, shadow: none}", SHOWN, "adapter.rank=4"),
        "adapter.rank=4: has no effect with parameters=policy. Fix: set parameters=adapter, or remove it.",
    ),
    (
        ("algorithm={name: bridge, shadow: none, adapter_lr: 0.1}", SHOWN),
        "algorithm.adapter_lr=0.1: has no effect with algorithm.shadow=none. Fix: set algorithm.shadow to persistent "
        "or rebuilt, or remove it.",
    ),
    (
        ("algorithm={name: bridge, sft_weight: 1}", SHOWN),
        "algorithm.sft_weight=1: contradicts algorithm.shadow=persistent: BRIDGE's weights are λ and 1 - λ. Fix: "
        "remove it, or set algorithm.shadow=none.",
    ),
    (
        ("algorithm={name: bridge, rl_weight_schedule: linear}", SHOWN, "epochs=1", "steps=null"),
        "algorithm.rl_weight_schedule=linear: goes over the run's steps, of which epochs say no number. Fix: give "
        "steps in place of epochs.",
    ),
    (
        ("algorithm={name: bridge, shadow: none, rl_weight: 0, sft_weight: 0}", SHOWN),
        "algorithm.sft_weight=0: and algorithm.rl_weight=0 leave nothing to learn. Fix: raise one of the two.",
    ),
    (
        ("algorithm=bridge", SHOWN, "batch.demonstrations=2", "batch.updates=3"),
        "batch.demonstrations=2: gives an update 0, fewer than the 1 data-parallel ranks. Fix: use more "
        "demonstrations, fewer updates or fewer processes.",
    ),
    (
        ("algorithm=bridge", SHOWN, "batch.demonstrations=3", "parallel.processes=4"),
        "batch.demonstrations=3: gives an update 3, fewer than the 4 data-parallel ranks. Fix: use more "
        "demonstrations, fewer updates or fewer processes.",
    ),
    (
        ("algorithm=bridge", SHOWN, "megatron.use_precision_aware_optimizer=true"),
        "megatron.use_precision_aware_optimizer=true: keeps gradients where several passes' cannot be put together. "
        "Fix: remove it.",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_settings_that_do_not_fit_are_refused(run_file: Path, overrides: tuple[str, ...], message: str) -> None:
    said = [str(refusal) for refusal in broken_rules(load_config(run_file, [*overrides]))]
    assert message in said


@pytest.mark.parametrize("weight", ["-0.1", "1.5", "much"])
def test_a_weight_lies_between_0_and_1(run_file: Path, weight: str) -> None:
    with pytest.raises(Refusal, match=rf"algorithm\.rl_weight={weight}: "):
        load_config(run_file, [f"algorithm={{name: bridge, rl_weight: {weight}}}", SHOWN])


def test_bridge_breaks_no_rule(run_file: Path) -> None:
    for algorithm in ("bridge", "{name: bridge, shadow: rebuilt}", "{name: bridge, shadow: none, sft_weight: 1}"):
        assert [*broken_rules(load_config(run_file, [f"algorithm={algorithm}", SHOWN]))] == []
    assert [*broken_rules(load_config(run_file, ["algorithm=bridge", SHOWN, "adapter.rank=4"]))] == []


def test_a_run_that_goes_on_has_its_schedule_of_weights(run_file: Path) -> None:
    def changed(schedule: str, **changes: Any) -> list[str]:
        table = f"algorithm={{name: bridge, rl_weight_schedule: {schedule}, rl_weight: 0.5}}"
        config = load_config(run_file, [table, SHOWN, "resume=auto"])
        before = config.model_dump(mode="json")
        algorithm = before["algorithm"] | changes.pop("algorithm", {})
        saved = before | changes | {"algorithm": algorithm}
        return [refusal.value for refusal in differences.changed_parts(config, saved, Path("step"))]

    assert changed("constant", steps=5) == []
    # A linear one goes over the steps.
    assert changed("linear", steps=5) == ["steps=3 with resume=auto"]
    assert changed("linear", algorithm={"rl_weight": 0.25}) == ["algorithm.rl_weight=0.5 with resume=auto"]
    assert changed("constant", algorithm={"clip_low": 0.1}) == []
