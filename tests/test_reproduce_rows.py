"""The rows of configs/reproduce/: each says what must be known of it, in words that others understand."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path
from statistics import fmean

import pytest

from megarl.config.data import DATA_SUFFIXES, DEMONSTRATIONS, each_source
from megarl.config.files import KNOWN_MODELS
from megarl.config.load import load_config
from megarl.config.rules import broken_setting_rules
from megarl.config.suites import asked, read_suite
from megarl.errors import Refusal
from megarl.evaluation.target import read_target
from megarl.reproduction.rows import Row, all_rows

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))
make_paper_data = importlib.import_module("make_paper_data")
reproduce_table = importlib.import_module("reproduce_table")

ROWS = {row.name: row for row in all_rows()}


def local_data(row: Row) -> set[str]:
    """The files that a run reads: its data, demonstrations and evaluation."""
    data = row.config.data
    evaluation = data.model_copy(update={"path": row.config.evaluation.path})
    sources = [*each_source(data), *each_source(evaluation, "evaluation")]
    if (demonstrations := data.of_demonstrations()) is not None:
        sources += each_source(demonstrations, DEMONSTRATIONS)
    return {one.settings.path for one in sources if one.settings.path and one.settings.path.endswith(DATA_SUFFIXES)}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_row_says_where_everything_comes_from(row: Row) -> None:
    about = row.about
    assert about.model is None or about.model.rpartition("/")[2] == Path(row.config.model.path).name
    assert local_data(row) <= {one.path for one in about.files}
    for one in about.files:
        program, *arguments = shlex.split(one.make)
        assert (TOOLS / program).is_file()
        if program == "make_paper_data.py":
            recipe = make_paper_data.RECIPES[arguments[0]]
            assert (one.path, one.hub) == (f"data/{recipe.file}", recipe.hub)
        else:
            assert one.hub is None
    assert row.config.resume == "auto"
    assert row.start is None or row.start in ROWS
    # A paper's row has GPUs; what has no source but ours has no published scores, unless it is measured here.
    assert (row.config.gpus is None) == (about.table == "quickstart_all")
    assert about.source != "ours" or about.table == "quickstart_all" or not (about.scores or about.average)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_published_scores_are_of_benchmarks_that_the_suites_have(row: Row) -> None:
    benchmarks = [one.name for name in row.about.suites for one in read_suite(name).benchmarks]
    assert row.about.suites and set(row.about.scores) <= set(benchmarks)
    if row.about.average is not None and row.about.scores:
        assert list(row.about.scores) and set(row.about.scores) == set(benchmarks)
        # The papers' own averages, to half of their last digit and what rounding of six scores adds.
        assert fmean(row.about.scores.values()) == pytest.approx(row.about.average, abs=0.11)


@pytest.mark.parametrize("row", [row for row in ROWS.values() if row.about.model], ids=lambda row: row.name)
def test_what_the_suites_ask_of_a_row_breaks_no_rule(row: Row) -> None:
    """Of a model of the row's sizes, on its GPUs: lengths, sampling, rewards, layout."""
    base = read_target(row.path, str(KNOWN_MODELS / Path(row.config.model.path).name)).base
    for name in row.about.suites:
        for one in asked(read_suite(name), base, row.about.suite_settings):
            broken = broken_setting_rules(one.config, processes=row.config.gpus)
            assert [str(refusal) for refusal in broken] == [], one.benchmark


def test_every_table_of_the_papers_has_its_rows() -> None:
    """The six algorithms and their baselines, and one larger recipe of ours for each."""
    wanted = {
        "nft_7b": "grpo dr_grpo dapo rft nft",
        "nft_32b": "dapo rft nft",
        "expo_3b": "grpo sft exp_grpo exp_dpo_offline exp_dpo_online",
        "expo_7b": "grpo exp_grpo",
        "bridge_3b": "sft rl sft_rl alternating chord bridge",
        "bridge_llama_3b": "sft rl sft_rl alternating chord bridge",
        "bridge_8b": "sft rl sft_rl alternating chord bridge no_gain",
        "attnrl_1.5b": "grpo treerl attnrl attention no_filter no_difficulty treerl_ahead",
        "attnrl_7b": "grpo treerl attnrl",
        "start_8b": "grpo start",
        "quickstart_all": "warmup grpo nft exp_grpo bridge attnrl start",
    }
    larger = {"nft_72b_nft", "expo_72b_exp_grpo", "bridge_32b_bridge", "bridge_72b_bridge", "attnrl_32b_attnrl"}
    larger |= {"attnrl_70b_attnrl", "start_32b_start", "start_235b_start"}
    assert set(ROWS) == {f"{table}_{row}" for table, rows in wanted.items() for row in rows.split()} | larger


def test_the_page_has_the_tables_of_the_files() -> None:
    page = reproduce_table.PAGE.read_text(encoding="utf-8")
    assert reproduce_table.filled(page) == page, "run python tools/reproduce_table.py"
    assert reproduce_table.filled(page.replace("| 51.7 |", "| 51.8 |")) != page.replace("| 51.7 |", "| 51.8 |")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("measure=best", "reproduces.measure=best: must be avg, maj or pass@k, such as pass@4. Fix: "),
        ("measure=pass@0", "reproduces.measure=pass@0: must be avg, maj or pass@k, such as pass@4. Fix: "),
        ("scores={aime24: 320}", "reproduces.scores.aime24=320: must be less than or equal to 100. Fix: "),
        ("tolerance=-1", "reproduces.tolerance=-1: must be greater than or equal to 0. Fix: "),
        ("scors={}", "reproduces.scors: is not a known key. Fix: use reproduces.scores."),
    ],
)
def test_a_wrong_value_is_refused(override: str, sentence: str) -> None:
    with pytest.raises(Refusal, match=f"^{re.escape(sentence)}"):
        load_config(ROWS["nft_7b_nft"].path, [f"reproduces.{override}"])
