"""Reading a configuration: base, overrides, refusals with the nearest key, and the way back to YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megarl.config.algorithms import ALGORITHM_SETTINGS, AlgorithmSettings, GrpoSettings, SftSettings
from megarl.config.load import dump_config, load_config
from megarl.config.schema import RunConfig
from megarl.config.written import parse, settled
from megarl.config.yaml_dialect import Dumper
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
            'data.template={prompt}\n= 1e-6 # "so',
            r"data.answer_pattern=####\s*(.+)",
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
            "steps=x: must be a plain decimal number. Fix: give steps such a value "
            "(Steps of the run; with epochs: as many as these take).",
        ),
        (
            "rollout.temperature=0",
            "rollout.temperature=0: must be greater than 0. Fix: give rollout.temperature such a value "
            "(Sampling temperature; the policy's log-probs use the same).",
        ),
        (
            "precision=bf61",
            "precision=bf61: must be 'fp32', 'bf16', 'fp8-tensorwise', 'fp8-delayed' or 'fp8-blockwise'. "
            "Fix: use precision=bf16.",
        ),
        ("model=3", "model=3: must be a table of keys. Fix: write the keys of model indented below it."),
        (
            "name=a/b",
            "name=a/b: must be letters, digits, '.', '_' or '-', and begin with a letter or digit. "
            "Fix: give name such a value (Name of the run: it lives in runs/<name>/).",
        ),
        (
            "name=" + "n" * 300,
            f"name={'n' * 300}: must have at most 200 characters, and has 300. "
            "Fix: give name such a value (Name of the run: it lives in runs/<name>/).",
        ),
        (
            "data.split=null",
            "data.split=null: must be text. Fix: give data.split a text (Split of a hub data set).",
        ),
        ("steps.x=1", "argument 'steps.x=1': steps is 3 and not a table. Fix: set steps itself."),
        ("fast", "argument 'fast': must have the form key.path=value. Fix: for example optimizer.lr=1e-5."),
        (
            "steps=[",
            "the value of 'steps=[': must be valid YAML (expected the node content, but found '<stream end>' "
            "at line 1, column 2). Fix: correct it there; a text that begins with a sign or has ': ' or ' #' in it "
            "goes in quotes.",
        ),
        (
            "algorithm.name=gpro",
            "algorithm.name=gpro: is not an algorithm. "
            f"Fix: use one of {', '.join(ALGORITHM_SETTINGS)}, or an import path package.module:Class.",
        ),
        (
            "algorithm.name=nowhere.mine:Best",
            "algorithm.name=nowhere.mine:Best: cannot be imported (ModuleNotFoundError: No module named 'nowhere'). "
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
        (
            "name: !!python/object:os.system x\n",
            "must be valid YAML (tag:yaml.org,2002:python/object:os.system is a tag",
        ),
        ("name: &x y\n", "must be valid YAML (&x names a value, as a text in quotes would not at line 1, column 7)"),
        ("name: *x\n", "must be valid YAML (found undefined alias 'x' at line 1, column 7)"),
        ("name: x\n---\nsteps: 3\n", "must be valid YAML (but found another document at line 2, column 1)"),
        ("name:\tx\n", "must be valid YAML (found character '\\t' that cannot start any token"),
        ("? [a]\n: b\n", "must be valid YAML (a key must be a text at line 1, column 3)"),
        ("name: a\0b\n", "must be valid YAML (U+0000 is no character of a text at character 8)"),
        ("[" * 3000, "must be valid YAML (tables and lists are nested too deeply)"),
        (
            "a: &a [x]\n"
            + "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else '*a'] * 9)}]\n" for i in range(9)),
            "must be valid YAML (there are more than 100000 values)",
        ),
    ]:
        file.write_text(text)
        assert refusal(file).startswith(f"{file}: {rule}"), text
    file.write_bytes(b"name: \xff\xfe")
    assert refusal(file).startswith(f"{file}: cannot be read as text")
    file.write_text("steps: 1\n")
    assert refusal(file) == "name: must be given. Fix: set name (Name of the run: it lives in runs/<name>/)."


@pytest.mark.parametrize(
    "text",
    [
        "Solve it. # think step by step", "007", "7", "0x1F", "1_000", "1:30", "1e3", ".inf", "2024-01-02", "yes",
        "no", "true", "~", "NULL", "=", "<<", "*bold*", "&c", "!important", "a: b", "- x", "[draft]", "{prompt} x",
        "@x", "`x`", " blanks kept ", "tab\there", "two\nlines", "'tis", '"a" or "b"', "#", "%", "|", "x=y",
    ],
)  # fmt: skip
def test_a_text_setting_is_the_text_of_its_override(run_file: Path, text: str) -> None:
    assert load_config(run_file, [f"data.system={text}"]).data.system == text


@pytest.mark.parametrize(
    "text", ["007", "7", "0x1F", "1_000", "1:30", "1e3", ".inf", "2024-01-02", "yes", "true", "=", "<<", "a#b", "x=y"]
)
def test_a_text_setting_is_the_text_in_the_file(run_file: Path, text: str) -> None:
    assert load_config(with_data(run_file, f"system: {text}")).data.system == text


def test_numbers_switches_and_nothing_as_they_are_written(run_file: Path) -> None:
    config = load_config(
        run_file, ["steps=1e3", "optimizer.lr=+.5e-3", "seed=0", "data.shuffle=false", "optimizer.betas=[0, 1e-2]"]
    )
    assert (config.steps, config.optimizer.lr, config.seed, config.data.shuffle) == (1000, 5e-4, 0, False)
    assert config.optimizer.betas == (0.0, 0.01)
    table = load_config(run_file, ["vllm={a: 1e-6, b: on-x, c: 12, d: true, e: null, f: '007', g: [1, x]}"]).vllm
    assert table == {"a": 1e-6, "b": "on-x", "c": 12, "d": True, "e": None, "f": "007", "g": [1, "x"]}


#: Overrides, and what is said of what YAML would have made of them.
NOT_WHAT_WAS_WRITTEN = [
    ("seed=010", "seed=010: must be a plain decimal number, and YAML reads 010 as 8. "
     "Fix: write decimal digits, without zeros in front, '_' or ':'."),
    ("steps=1:30", "must be a plain decimal number, and YAML reads 1:30 as 90"),
    ("steps=0x1F", "YAML reads 0x1F as 31"),
    ("steps=0b11", "YAML reads 0b11 as 3"),
    ("steps=1_000", "YAML reads 1_000 as 1000"),
    ("optimizer.lr=1:30.5", "YAML reads 1:30.5 as 90.5"),
    ("optimizer.lr=.inf", "optimizer.lr=.inf: must be a plain decimal number, and YAML reads .inf as inf. "
     "Fix: give optimizer.lr a finite number (Peak learning rate)."),
    ("seed=.nan", "seed=.nan: must be a plain decimal number, and YAML reads .nan as nan. "
     "Fix: give seed a whole number (Seed of everything drawn)."),
    ("algorithm.importance_cap=-.inf", "Fix: give algorithm.importance_cap a finite number, or null for none ("),
    ("rollout.stop_token_ids=[true]", "rollout.stop_token_ids.0=true: must be a plain decimal number, and is a switch. "
     "Fix: give rollout.stop_token_ids.0 a whole number (Further ids that end a response, beside the end token)."),
    ("optimizer.lr=1e999", "is beyond what 64 bits hold"),
    ("steps=" + "9" * 5000, "must be a plain decimal number"),
    ("steps=9223372036854775808", "is beyond what 64 bits hold"),
    ("steps=2.5", "must be a valid integer, got a number with a fractional part"),
    ("steps=1,000", "must be a plain decimal number"),
    ("steps=٣", "must be a plain decimal number"),
    ("steps=true", "must be a plain decimal number, and is a switch"),
    ("steps=no", "must be a plain decimal number, and YAML reads no as false. Fix: give steps a whole number ("),
    ("steps='5'", 'steps="5": must be a plain decimal number, and is a text, in quotes. Fix: leave out the quotes.'),
    ("steps=5 # as agreed", "has a comment, which YAML leaves out"),
    ("steps=2024-01-02", "YAML reads 2024-01-02 as 2024-01-02"),
    (r'data.sources=[{path: "a\d"}]', "must be valid YAML (found unknown escape character 'd' at line 1, column 12). "
     "Fix: put the text in single quotes, in which a backslash is a backslash, or write two for one."),
    (r'data.sources=[{path: "\U00110000"}]', "must be valid YAML (an escape in double quotes names no character). "
     "Fix: put the text in single quotes, in which a backslash is a backslash, or write two for one."),
    ("data.shuffle=no", "must be true or false, and YAML reads no as false. Fix: write true or false."),
    ("data.shuffle=1", "must be true or false, and YAML reads 1 as 1"),
    ("vllm.x=010", "vllm.x=010: may be a text, and is 8 to YAML"),
    ("vllm.x=~", "vllm.x=~: is null to YAML"),
    ("vllm.x=on", "vllm.x=on: may be a text, and is true to YAML"),
    ("vllm={x: 1:30}", "vllm.x=1:30: may be a text, and is 90 to YAML"),
    ("data.system=", "data.system=: is empty. Fix: give data.system a text (System message for the chat template)"),
    ("data.system='a b'", "data.system='a b': is taken as it stands, and would keep its quotes"),
    ('data.system="a\\n\\"b"', "would keep its quotes"),
    ("data.system=a\0b", r"data.system=a\0b: has characters that are in no text"),
    ("data.system=\udcff", r"data.system=\udcff: has characters that are in no text"),
    ("name=null", "name=null: must be text"),
    ("optimizer.lr=1e-400", "optimizer.lr=1e-400: is so small that 64 bits hold 0 in its place"),
    ("recompute.modules=mlp", "recompute.modules=mlp: must be a list. Fix: write recompute.modules=[mlp]."),
    ("data.extra_columns=null", "must be a list. Fix: write data.extra_columns=[...] (Further columns"),
    ("optimizer.betas=[0.9, 0.9, 0.9]", "optimizer.betas=[0.9, 0.9, 0.9]: must have 2 items, and has 3"),
    ("data.sources.0.path=x", "data.sources={'0': {'path': 'x'}}: must be a list"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "said"), NOT_WHAT_WAS_WRITTEN, ids=[one[:30] for one, _ in NOT_WHAT_WAS_WRITTEN])
def test_what_yaml_would_have_made_of_it_is_said(run_file: Path, override: str, said: str) -> None:
    assert said in refusal(run_file, override)


def test_overrides_by_the_place_in_a_list(run_file: Path) -> None:
    """Refusals name settings of a list's items so; what they name can be set."""
    run_file.write_text(
        run_file.read_text()
        + "reward:\n  kind: sum\n  terms: [{name: a, kind: boxed}, {name: b, kind: f1, weight: 2}]\n"
    )
    config = load_config(run_file, ["reward.terms.1.weight=3", "reward.terms.0.name=007", "reward.terms.1.high=2"])
    assert [(term.name, term.weight, term.high) for term in config.reward.terms] == [("007", 1, 1), ("b", 3, 2)]
    config = load_config(run_file, ["rollout.stop_token_ids=[5, 7]", "rollout.stop_token_ids.1=8"])
    assert config.rollout.stop_token_ids == (5, 8)
    for overrides in (["reward.terms.2.weight=3"], ["reward.terms.0.weight=1", "reward.terms.-1.weight=3"]):
        assert refusal(run_file, *overrides) == (
            f"argument {overrides[-1]!r}: reward.terms is a list of 2, whose places count from 0. "
            "Fix: name one of them, or set reward.terms itself."
        )


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            r'"Put it in \boxed{}."',
            r"U+0008, which YAML makes of \b in double quotes. Fix: put the text in single",
        ),
        (r'"\frac12"', r"U+000C, which YAML makes of \f in double quotes"),
        (r'"a \rightarrow b"', r"U+000D, which YAML makes of \r"),
        (r'"3 \times 4"', r"U+0009, which YAML makes of \t"),
        (r'"a \neq b"', r"U+000A, which YAML makes of \n"),
    ],
)
def test_what_double_quotes_make_of_latex_is_refused(run_file: Path, written: str, said: str) -> None:
    sentence = refusal(with_data(run_file, f"system: {written}"))
    assert sentence.startswith("data.system=") and said in sentence
    text = written[1:-1]
    assert load_config(with_data(run_file, f"system: '{text}'")).data.system == text
    assert load_config(with_data(run_file, "system: " + written.replace("\\", "\\\\"))).data.system == text
    meant = load_config(with_data(run_file, r'system: "a\tb\nnext\texture\r\n"')).data.system
    assert meant == "a\tb\nnext\texture\r\n"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("system: Solve it. # think", "data.system=Solve it.: is a text followed by #, of which YAML makes a comment. "
         "Fix: put the text in quotes, with what belongs to it, or the comment on a line of its own."),
        (r"answer_pattern: #### (.+)", "data.answer_pattern: is empty, since what follows # is a comment to YAML"),
        ("template: {prompt}", "must be text"),
        ("system: ~", "data.system=~: is null to YAML"),
        ("system: [a, b]", "data.system=['a', 'b']: must be text"),
        ("max_rows: '5'", 'data.max_rows="5": must be a plain decimal number, and is a text'),
        ("max_rows: 0o17", "data.max_rows=0o17: must be a plain decimal number"),
    ],
)  # fmt: skip
def test_what_a_file_would_lose_is_refused(run_file: Path, lines: str, said: str) -> None:
    assert said in refusal(with_data(run_file, lines))


def test_what_a_file_says_is_kept(run_file: Path) -> None:
    """A comment may follow a number, a switch, one of some words, and a text in quotes."""
    lines = (
        "max_rows: 5  # few\n  shuffle: false  # in order\n  subset:   # none\n  system: 'Solve it. # think'  # said\n"
        "  template: |\n    {prompt} # not cut\n  split: 007"
    )
    with pytest.raises(Refusal, match=r"data\.subset: is empty"):
        load_config(with_data(run_file, lines))
    config = load_config(with_data(run_file, lines.replace("   # none", "")), ["resume=auto"])
    assert (config.data.max_rows, config.data.shuffle, config.data.subset) == (5, False, None)
    assert (config.data.system, config.data.template) == ("Solve it. # think", "{prompt} # not cut\n")
    assert config.data.split == "007"


def with_data(run_file: Path, lines: str) -> Path:
    """The run with further lines in its `data` section."""
    changed = run_file.with_name("changed.yaml")
    changed.write_text(run_file.read_text().replace("data:\n", f"data:\n  {lines}\n"))
    return changed


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(1 - 2**63, 2**63 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_characters="\0\a\b\v\f\x1b", exclude_categories=["Cs"])),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_yaml_dialect_round_trip(value: object) -> None:
    assert settled(parse(yaml.dump({"x": value}, Dumper=Dumper, allow_unicode=True), "x"), Any) == {"x": value}


def test_unknown_key_of_an_optional_record_is_explained(run_file: Path) -> None:
    judge = '{"kind": "judge", "judge": {"url": "http://host/v1", "model": "m", "patince": 3}}'
    with pytest.raises(Refusal, match=r"reward\.judge\.patince.*use reward\.judge\.patience"):
        load_config(run_file, [f"reward={judge}"])
