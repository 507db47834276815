"""Reading a configuration: base, overrides, refusals with the nearest key, and the way back to YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megarl.config.algorithms import ALGORITHM_SETTINGS, AlgorithmSettings, GrpoSettings, SftSettings
from megarl.config.load import dump_config, load_config
from megarl.config.schema import RunConfig
from megarl.config.yaml_dialect import Dumper, Loader
from megarl.errors import Refusal


class DoubledAlgorithm:
    """Stands for a user's own algorithm, named by its import path."""

    class Settings(AlgorithmSettings):
        factor: float = 2.0


def refusal(path: Path | str, *overrides: str) -> str:
    with pytest.raises(Refusal) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_defaults_and_overrides(run_file: Path) -> None:
    config = load_config(
        run_file,
        ["optimizer.lr=3e-5", "parallel.tensor=2", "rollout.stop_token_ids=[5, 7]", "data.system=null", "resume=auto"],
    )
    assert config.optimizer.lr == 3e-5
    assert config.parallel.tensor == 2
    assert config.rollout.stop_token_ids == (5, 7)
    assert config.data.system is None
    assert config.resume == "auto"
    assert config.rollout.group_size == RunConfig.model_fields["rollout"].default.group_size
    assert isinstance(config.algorithm, GrpoSettings)


def test_an_override_replaces_a_whole_table(run_file: Path) -> None:
    assert load_config(run_file, ["algorithm={name: grpo, clip_high: 0.28}"]).algorithm == GrpoSettings(clip_high=0.28)
    assert load_config(run_file, ["algorithm.clip_high=0.3", "algorithm=sft"]).algorithm == SftSettings()


def test_override_inside_a_bare_algorithm_name(tmp_path: Path, run_file: Path) -> None:
    run_file.write_text(run_file.read_text().replace("algorithm:\n  name: grpo", "algorithm: grpo"))
    assert load_config(run_file, ["algorithm.clip_low=0.1"]).algorithm == GrpoSettings(clip_low=0.1)


def test_resolved_file_loads_to_an_equal_configuration(tmp_path: Path, run_file: Path) -> None:
    config = load_config(
        run_file,
        [
            "optimizer.lr=1e-6",
            "data.template='{prompt}\\n= 1e-6'",
            "data.answer_pattern='####\\s*(.+)'",
            "megatron.recompute_granularity=full",
            "vllm.note='1e-5'",
            "rollout.stop_token_ids=[1, 2]",
            "algorithm.overlong_buffer=8",
        ],
    )
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(config))
    again = load_config(resolved)
    assert again == config
    assert again.vllm == {"note": "1e-5"}
    assert dump_config(again) == dump_config(config)


def test_base_is_merged_below_the_file(tmp_path: Path, run_file: Path) -> None:
    folder = tmp_path / "more"
    folder.mkdir()
    top = folder / "top.yaml"
    top.write_text("base: ../run.yaml\nname: top\nrollout: {group_size: 2}\n")
    config = load_config(top)
    assert (config.name, config.steps) == ("top", 3)
    assert (config.rollout.group_size, config.rollout.max_tokens) == (2, 64)
    assert config.model.path == "model", "paths stay relative to the working directory, not to the file"


def test_another_algorithm_replaces_that_of_the_base(tmp_path: Path, run_file: Path) -> None:
    top = tmp_path / "top.yaml"
    top.write_text("base: base.yaml\nalgorithm: {name: sft}\n")
    (tmp_path / "base.yaml").write_text(run_file.read_text().replace("name: grpo", "name: grpo\n  clip_low: 0.1"))
    assert load_config(top).algorithm == SftSettings()


def test_a_base_may_have_no_base(tmp_path: Path, run_file: Path) -> None:
    (tmp_path / "middle.yaml").write_text("base: run.yaml\n")
    top = tmp_path / "top.yaml"
    top.write_text("base: middle.yaml\n")
    assert refusal(top) == (
        f"base=middle.yaml in {top}: a base may not have a base itself. "
        f"Fix: move what {tmp_path}/middle.yaml takes from its base into it."
    )
    top.write_text("base: [run.yaml, middle.yaml]\n")
    assert "must be the path of one YAML file" in refusal(top)


def test_own_algorithm_by_import_path(run_file: Path) -> None:
    config = load_config(run_file, ["algorithm={name: 'test_config_load:DoubledAlgorithm', factor: 3}"])
    assert isinstance(config.algorithm, DoubledAlgorithm.Settings)
    assert config.algorithm.factor == 3.0
    assert load_config(run_file, ["algorithm=test_config_load:DoubledAlgorithm"]).algorithm.name.endswith("Algorithm")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.temprature=1", "rollout.temprature: is not a known key. Fix: use rollout.temperature."),
        ("lr=3", "lr: is not a known key. Fix: use optimizer.lr."),
        ("paralel.tensor=2", "paralel: is not a known key. Fix: use parallel."),
        ("algorithm.clip=0.2", "algorithm.clip: is not a known key. Fix: use algorithm.clip_low."),
        (
            "model.q=1",
            "model.q: is not a known key. Fix: remove it; the keys there are "
            "model.path, model.tokenizer, model.weights, model.random_init.",
        ),
        (
            "steps=x",
            "steps=x: must be a valid integer, unable to parse string as an integer. "
            "Fix: give steps such a value (Steps of the run).",
        ),
        (
            "rollout.temperature=0",
            "rollout.temperature=0: must be greater than 0. Fix: give rollout.temperature such a value "
            "(Sampling temperature; the policy's log-probs use the same).",
        ),
        ("precision=bf61", "precision=bf61: must be 'fp32' or 'bf16'. Fix: use precision=bf16."),
        ("model=3", "model=3: must be a table of keys. Fix: write the keys of model indented below it."),
        ("name=7", 'name=7: must be text. Fix: write it in quotes, "7".'),
        (
            "name=a/b",
            "name=a/b: must be letters, digits, '.', '_' or '-', and begin with a letter or digit. "
            "Fix: give name such a value (Name of the run: it lives in runs/<name>/).",
        ),
        (
            "data.path=null",
            "data.path=null: must be text. Fix: give data.path a text (Hub name, or a .parquet, .jsonl or .json file).",
        ),
        ("steps.x=1", "argument 'steps.x=1': steps is 3 and not a table. Fix: set steps itself."),
        ("fast", "argument 'fast': must have the form key.path=value. Fix: for example optimizer.lr=1e-5."),
        (
            "steps=[",
            "the value of 'steps=[': must be valid YAML (expected the node content, but found '<stream end>' "
            "at line 1, column 2). Fix: correct the text there.",
        ),
        (
            "algorithm.name=gpro",
            "algorithm.name=gpro: is not an algorithm. "
            f"Fix: use one of {', '.join(ALGORITHM_SETTINGS)}, or an import path package.module:Class.",
        ),
        (
            "algorithm.name=nowhere.mine:Best",
            "algorithm.name=nowhere.mine:Best: cannot be imported (No module named 'nowhere'). "
            "Fix: put the module on PYTHONPATH and name its class.",
        ),
        (
            "algorithm.name=json:JSONDecoder",
            "algorithm.name=json:JSONDecoder: must name a class with an attribute Settings derived from "
            "megarl.config.algorithms.AlgorithmSettings. Fix: give JSONDecoder such a Settings record.",
        ),
    ],
)
def test_refused_values(run_file: Path, override: str, message: str) -> None:
    assert refusal(run_file, override) == message


def test_refused_files(tmp_path: Path, run_file: Path) -> None:
    assert refusal("nowhere.yaml") == (
        "nowhere.yaml: no such configuration file. "
        "Fix: give the path of a YAML file, relative to the working directory."
    )
    file = tmp_path / "bad.yaml"
    for text, rule in [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n", "must be a table of keys"),
        ("name: x\nname: y\n", "must be valid YAML (key name is given twice at line 2, column 1)"),
        ("name: [x\n", "must be valid YAML (expected ',' or ']', but got '<stream end>' at line 2, column 1)"),
        ("name: !!python/object:os.system x\n", "must be valid YAML (could not determine a constructor"),
    ]:
        file.write_text(text)
        assert refusal(file).startswith(f"{file}: {rule}"), text
    file.write_bytes(b"name: \xff\xfe")
    assert refusal(file).startswith(f"{file}: cannot be read as text")
    file.write_text("steps: 1\n")
    assert refusal(file) == "name: must be given. Fix: set name (Name of the run: it lives in runs/<name>/)."


def test_yaml_dialect() -> None:
    read = yaml.load("[1e-6, 1.5E3, .5, on, no, true, 2024-01-02, '1e-6', 007, ~]", Loader)
    assert read == [1e-6, 1500.0, 0.5, "on", "no", True, "2024-01-02", "1e-6", 7, None]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_yaml_dialect_round_trip(value: object) -> None:
    assert yaml.load(yaml.dump(value, Dumper=Dumper, allow_unicode=True), Loader) == value


def test_unknown_key_of_an_optional_record_is_explained(run_file: Path) -> None:
    judge = '{"kind": "judge", "judge": {"url": "http://host/v1", "model": "m", "patince": 3}}'
    with pytest.raises(Refusal, match=r"reward\.judge\.patince.*use reward\.judge\.patience"):
        load_config(run_file, [f"reward={judge}"])
