"""Suites of benchmarks, read from small YAML files: which problems, how they are sampled, and how answers are graded.

A suite speaks of a benchmark in the words of a run's sections `data` and `evaluation`; what it leaves out stands in
configs/benchmarks/NAME.yaml. Torch-free.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import PositiveInt

from megarl.config.base import Settings
from megarl.config.data import DATA_SUFFIXES
from megarl.config.load import config_of, merge, read_table, record_of
from megarl.config.schema import RunConfig
from megarl.config.yaml_dialect import Plain
from megarl.errors import Refusal

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
#: Where suites have names.
FOLDER = _CONFIGS / "suites"
#: Where benchmarks have names.
BENCHMARKS = _CONFIGS / "benchmarks"
#: Where a benchmark's file is looked for, from the working folder.
DATA = Path("data")

_SECTIONS = ("data", "evaluation")
#: What a benchmark may be called: its answers lie in a file of that name.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class _Head(Settings):
    """What a suite says beside its tables."""

    about: str = ""
    pass_at: tuple[PositiveInt, ...] | None = None


class _Asking(Settings):
    asks_again: bool = False


class Benchmark(NamedTuple):
    """One benchmark of a suite: `table` are the sections data and evaluation as they were written.

    `asks_again`: each of data.extra_columns is a further question, asked after the answer to the one before.
    """

    name: str
    table: dict[str, Any]
    asks_again: bool = False


class Suite(NamedTuple):
    """Benchmarks that are evaluated together. `pass_at`: the k of pass@k that are wanted; None: those that fit."""

    name: str
    about: str
    benchmarks: tuple[Benchmark, ...]
    pass_at: tuple[int, ...] | None = None


class Asked(NamedTuple):
    """A benchmark as it is evaluated: the run's settings with its own data and evaluation in them."""

    suite: str
    benchmark: str
    config: RunConfig
    pass_at: tuple[int, ...]
    asks_again: bool

    @property
    def turns(self) -> int:
        """Questions that are asked one after the other."""
        return 1 + len(self.config.data.extra_columns) if self.asks_again else 1


def known_suites() -> list[str]:
    """The names in configs/suites/."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def read_suites(names: str) -> list[Suite]:
    """The suites of `names`, NAME[,NAME] or the path of a file. Raises `Refusal` as `read_suite`."""
    if Path(os.path.expanduser(names)).is_file():
        return [read_suite(names)]
    listed = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not listed:
        raise Refusal(f"--suite {names!r}", "names no suite", f"use {', '.join(known_suites())}, or a YAML file")
    return [read_suite(name) for name in listed]


def read_suite(name: str) -> Suite:
    """The suite of a name in configs/suites/, or of a YAML file like those there.

    Raises `Refusal` for an unknown name, key or benchmark; the tables' own keys are checked by `asked`.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        path = Path(os.path.expanduser(name))
    if not path.is_file():
        known = known_suites()
        near = difflib.get_close_matches(name, known, 1)
        fix = f"use {near[0]}" if near else f"use {', '.join(known)}"
        rule = f"is neither the name of a suite ({', '.join(known)}) nor a file"
        raise Refusal(f"--suite {name}", rule, f"{fix}, or the path of a YAML file like configs/suites/{known[0]}.yaml")
    table = read_table(path, needed="benchmarks")
    origin = f"suite {path.stem}"
    benchmarks = table.pop("benchmarks", None)
    if not isinstance(benchmarks, dict) or not benchmarks:
        rule = "must name its benchmarks, a table with a key for each"
        raise Refusal(f"benchmarks of {origin}", rule, "write for example `benchmarks: {math500: }`")
    common = {section: _table(table.pop(section, None), f"{section} of {origin}") for section in _SECTIONS}
    head = record_of(table, _Head)
    found = tuple(_benchmark(one, own, common, origin) for one, own in benchmarks.items())
    return Suite(path.stem, head.about, found, head.pass_at)


def _benchmark(name: str, given: Any, common: dict[str, Any], origin: str) -> Benchmark:
    if not _NAME.fullmatch(name):
        raise Refusal(f"benchmark {name!r} of {origin}", "must be letters, digits, '.', '_' and '-'", "rename it")
    own = _table(given, f"benchmark {name} of {origin}")
    sections = {section: _table(own.pop(section, None), f"{name}.{section} of {origin}") for section in _SECTIONS}
    if "path" in sections["data"]:
        known: dict[str, Any] = {}
    else:
        known = _known(name, origin)
    asking = record_of({**({"asks_again": known["asks_again"]} if "asks_again" in known else {}), **own}, _Asking)
    table = {"data": merge(merge(_placed(known), common["data"]), sections["data"])}
    table["evaluation"] = merge(common["evaluation"], sections["evaluation"])
    return Benchmark(name, table, asking.asks_again)


def _known(name: str, origin: str) -> dict[str, Any]:
    """What configs/benchmarks/ says of it. Raises `Refusal` where it is not there."""
    file = BENCHMARKS / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(one.stem for one in BENCHMARKS.glob("*.yaml")))
        rule = f"is none that is known ({known}), and names no file of its own"
        raise Refusal(f"benchmark {name} of {origin}", rule, f"give {name}.data.path and its columns")
    return read_table(file)


def _placed(known: dict[str, Any]) -> dict[str, Any]:
    """The data section of a known benchmark: its file where it is there, else its set on the hub."""
    if not known:
        return {}
    file = DATA / str(known["file"]["path"])
    return {**known["file"], "path": Plain(str(file))} if file.is_file() else dict(known["data"])


def _table(value: Any, what: str) -> dict[str, Any]:
    if value is None or (isinstance(value, Plain) and value.text in ("", "null")):
        return {}
    if not isinstance(value, dict):
        raise Refusal(what, "must be a table of keys", "write one `key: value` per line below it, or nothing")
    return dict(value)


def asked(suite: Suite, base: dict[str, Any], overrides: Sequence[str], pass_at: Sequence[int] = ()) -> list[Asked]:
    """The benchmarks of a suite for the run that the table `base` describes, changed by `overrides`.

    `pass_at` replaces the suite's. Raises `Refusal` for settings that are none, as `load_config`, and for a pass@k with
    k beyond evaluation.samples.
    """
    found = []
    for benchmark in suite.benchmarks:
        table = copy.deepcopy(base) | copy.deepcopy(benchmark.table)
        config = config_of(table, overrides)
        # One data set, which is the evaluation's: nothing is trained on it.
        evaluation = config.evaluation.model_copy(update={"split": config.data.split})
        data = config.data.model_copy(update={"max_rows": evaluation.rows})
        config = config.model_copy(update={"data": data, "evaluation": evaluation})
        wanted = _pass_at(suite, benchmark, config.evaluation.samples, pass_at)
        found.append(Asked(suite.name, benchmark.name, config, wanted, benchmark.asks_again))
    return found


def _pass_at(suite: Suite, benchmark: Benchmark, samples: int, given: Sequence[int]) -> tuple[int, ...]:
    wanted = tuple(given) or suite.pass_at
    if wanted is None:
        return tuple(sorted({1, samples, *(2**power for power in range(samples.bit_length()))}))
    beyond = [k for k in wanted if k > samples]
    if beyond:
        raise Refusal(
            f"pass@{beyond[0]} of {benchmark.name}",
            f"needs at least {beyond[0]} samples of a problem, and evaluation.samples={samples}",
            f"set evaluation.samples={beyond[0]}, or ask for a smaller k",
        )
    return tuple(sorted(set(wanted)))


def is_local(config: RunConfig) -> bool:
    """Whether the problems come from a file, not from the hub."""
    return str(config.data.path).lower().endswith(DATA_SUFFIXES)
