"""Broken configurations of every kind: each is a run, or a sentence with value, rule and fix; no traceback, no hang.

CONFIGS_FUZZED=1000 python -m pytest tests/test_config_fuzz.py
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from config_case import TOKENIZER
from test_configs import CONFIGS, DATA_SUFFIXES, GPUS, write_files

from megarl.cli.start import prepare
from megarl.config.load import dump_config, load_config
from megarl.config.schema import RunConfig
from megarl.errors import Refusal

#: How many are tried; each has its own seed.
COUNT = int(os.environ.get("CONFIGS_FUZZED", "150"))
#: Seconds that one may take. Most take hundredths.
LIMIT = 30.0
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))

TEXTS = [
    "", " ", "x", "null", "~", "true", "no", "010", "0x1F", "1_000", "1:30", "1e3", ".inf", ".nan", "-.inf",
    "2024-01-02", "=", "<<", "*a", "&a b", "!!python/object:os.system x", "!t", "a # b", "# b", "a: b", "- a", "[", "]",
    "{", "}", "%a", "@", "`", "'", '"', "''", "'a'", '"a"', "|", ">", "?", "é😀\u2028\u202e", "\t", "a\nb", "a\0b",
    "\ud800", "../../etc", "/dev/null", "/", ".", "..", "~/x", "a" * 300, "a/" * 3000, "x" * 100_000, "9" * 5000,
    "math", "judge", "os:system", "nowhere.mine:f", "json:loads", "{prompt}", "(", "(a+)+$", "(?P<x>", "-1", "0",
    "1e999", "99999999999999999999", "1.5",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 10**9, 2**31, 2**63, 10**30, 10**400, 0.0, -0.5, 0.5, 1e-300, 1e308,
    float("inf"), float("nan"), [], {}, [1], [[]], [None], {"a": 1}, {"name": "grpo"}, {"name": 3}, {1: 2}, [{"a": []}],
    ["a", 1, None], {"path": "x"}, "", "x",
]  # fmt: skip


def places(table: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all entries of nested tables and lists."""
    entries = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    for key, value in entries:
        yield (*prefix, key)
        yield from places(value, (*prefix, key))


def keys_of(record: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all settings."""
    for name, field in record.model_fields.items():
        yield prefix + name
        inner = field.default
        if hasattr(inner, "model_fields"):
            yield from keys_of(type(inner), f"{prefix}{name}.")


KEYS = [
    *keys_of(RunConfig),
    "data.path",
    "data.system",
    "model.path",
    "model.tokenizer",
    "algorithm.name",
    "algorithm.x",
]
KEYS += [
    "reward.judge.url",
    "reward.judge.extra",
    "evaluation.reward.kind",
    "vllm.x",
    "megatron.x",
    "base",
    "nowhere.y",
]


def garbage(rng: random.Random) -> Any:
    """A value that is seldom what is wanted."""
    kind = rng.randrange(6)
    if kind < 3:
        return copy.deepcopy(rng.choice(VALUES))
    if kind < 5:
        return rng.choice(TEXTS)
    nested: Any = rng.choice(VALUES)
    for _ in range(rng.choice([2, 10, 200])):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    return nested


def mutated_table(table: dict[Any, Any], rng: random.Random) -> dict[Any, Any]:
    """The table with an entry replaced, removed, added, renamed or exchanged with another."""
    path = rng.choice(list(places(table)))
    parent: Any = table
    for key in path[:-1]:
        parent = parent[key]
    match rng.randrange(6):
        case 0 | 1:
            parent[path[-1]] = garbage(rng)
        case 2:
            del parent[path[-1]]
        case 3:
            value = garbage(rng)
            if isinstance(parent, dict):
                parent[rng.choice(["unknown", "Name", "steps ", "", 7, None, "a.b", "data", "algorithm"])] = value
            else:
                parent.append(value)
        case 4 if isinstance(parent, dict):
            key = str(path[-1])
            parent[key[:-1] + key[-1:].upper() if rng.random() < 0.5 else key[1:]] = parent.pop(path[-1])
        case _:
            other = rng.choice(list(places(table)))
            found: Any = table
            for key in other:
                found = found[key]
            parent[path[-1]] = copy.deepcopy(found)
    return table


def mutated_text(text: str, rng: random.Random) -> str:
    """YAML with lines lost, doubled, moved, cut or filled with what means something to YAML."""
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    match rng.randrange(7):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, rng.choice(lines))
        case 2:
            lines[at] = " " * rng.randrange(4) + lines[at]
        case 3:
            lines[at] = lines[at].rstrip("\n") + rng.choice(TEXTS) + "\n"
        case 4:
            key, colon, _ = lines[at].partition(":")
            lines[at] = f"{key}{colon} {rng.choice(TEXTS)}\n"
        case 5:
            return text[: rng.randrange(len(text))]
        case _:
            position = rng.randrange(len(text))
            return text[:position] + rng.choice(TEXTS) + text[position:]
    return "".join(lines)


def override(rng: random.Random) -> str:
    """An argument of the command line, of any form."""
    key = rng.choice(KEYS)
    value = garbage(rng)
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**9)
    match rng.randrange(8):
        case 0:
            return rng.choice(TEXTS)
        case 1:
            return f"{key}.{rng.choice(['a', '', 'x.y', '0'])}={text}"
        case 2:
            return f"{key}{rng.choice(['==', ' = ', ':', '=[', '={'])}{text}"
        case _:
            return f"{key}={text.removesuffix(chr(10)).removesuffix('...').strip()}"


def fuzzed(seed: int) -> tuple[str, bytes, list[str]]:
    """The name of a shipped configuration, a changed text of it, and overrides."""
    rng = random.Random(f"configuration {seed}")
    name = rng.choice(NAMES)
    text = (CONFIGS / f"{name}.yaml").read_text()
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        table = mutated_table(yaml.safe_load(text), rng)
        text = yaml.safe_dump(table, sort_keys=False, allow_unicode=rng.random() < 0.5) if table else "{}\n"
        try:
            if not isinstance(yaml.safe_load(text), dict):
                break
        except (yaml.YAMLError, ValueError, RecursionError):
            break
    for _ in range(rng.choice([0, 0, 1, 2])):
        text = mutated_text(text, rng) if text else text
    overrides = [override(rng) for _ in range(rng.choice([0, 0, 1, 1, 2, 3]))]
    return name, text.encode("utf-8", "surrogatepass"), overrides


class TookTooLong(BaseException):
    """No `Exception`, so that nothing under test takes it for one of its own."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `TookTooLong` where the block takes longer."""

    def late(*_: object) -> None:
        raise TookTooLong(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def write_contents(config: RunConfig) -> None:
    """A tokenizer and a row of data in the place of the empty files that the configuration names."""
    folder = Path(config.model.tokenizer or config.model.path)
    if folder.is_file():
        folder.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    row: dict[str, Any] = {}
    for column in (config.data.prompt_column, config.data.answer_column, config.data.solution_column):
        *outer, last = (column or "unused").split(".")
        inside = row
        for part in outer:
            inside = inside.setdefault(part, {})
        inside[last] = "#### 4"
    for name in (config.data.path, config.evaluation.path):
        if name is not None and name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), name)
        elif name is not None and name.endswith(DATA_SUFFIXES):
            Path(name).write_text(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each shipped configuration a folder with the files that it names."""
    found: dict[str, Path] = {}
    here = Path.cwd()
    for name in NAMES:
        found[name] = tmp_path_factory.mktemp(name) / "checkout"
        found[name].mkdir()
        os.chdir(found[name])
        try:
            config = load_config(CONFIGS / f"{name}.yaml")
            write_files(config)
            write_contents(config)
        finally:
            os.chdir(here)
    return found


def test_broken_configurations_are_refused_in_sentences(
    homes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(COUNT):
        name, text, overrides = fuzzed(seed)
        monkeypatch.chdir(homes[name])
        file = Path("fuzzed.yaml")
        file.write_bytes(text)
        for variable in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(variable, raising=False)
        if name in GPUS:
            monkeypatch.setenv("RANK", "0")
            monkeypatch.setenv("WORLD_SIZE", str(GPUS[name]))
        try:
            with within(LIMIT):
                config = prepare(file, overrides, trains=True)
                again = Path("again.yaml")
                again.write_text(dump_config(config), encoding="utf-8")
                assert load_config(again) == config
        except Refusal as refusal:
            assert all(part.strip() for part in (refusal.value, refusal.rule, refusal.fix)), f"seed {seed}: {refusal!r}"
            assert len(str(refusal)) < 5000, f"seed {seed}: {str(refusal)[:300]}"
            outcomes["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {name} with {overrides} {text[:3000]!r}") from error
        else:
            outcomes["run"] += 1
    # Neither all of them broken nor all as good as they were.
    assert min(outcomes["run"], outcomes["refused"]) > COUNT / 20, outcomes
