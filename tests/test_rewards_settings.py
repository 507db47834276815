"""Reward settings that are refused, with their exact messages, and those that pass."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_case import run_file

from megarl.config.load import dump_config, load_config
from megarl.config.rules import broken_rules
from megarl.errors import Refusal

__all__ = ["run_file"]

JUDGE = "reward.kind=judge reward.judge.url=http://host:8000/v1 reward.judge.model=m "


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "reward.kind=f2",
            "reward.kind=f2: must be math, boxed, deepscaler, f1, judge, sum, package.module:function or "
            "folder/file.py:function. "
            "Fix: correct reward.kind.",
        ),
        (
            "reward.kind=judge",
            "reward.kind=judge: needs a judge to ask. Fix: set reward.judge.url and reward.judge.model.",
        ),
        (
            JUDGE + "reward.kind=f1",
            "reward.judge: is never asked, since reward.kind=f1. Fix: set reward.kind=judge, or remove reward.judge.",
        ),
        (
            JUDGE + "reward.judge.template={question}",
            "reward.judge.template='{question}': must contain {response}. "
            "Fix: put {response} where the answer belongs, and {question} and {reference} where they help.",
        ),
        (
            JUDGE + "reward.judge.extra.stream=true",
            "reward.judge.extra.stream: is a field of the request that megarl fills itself. "
            "Fix: remove it (replies are read whole).",
        ),
        (
            "evaluation.reward.kind=judge",
            "evaluation.reward.kind=judge: needs a judge to ask. "
            "Fix: set evaluation.reward.judge.url and evaluation.reward.judge.model.",
        ),
        (
            JUDGE.replace("reward", "evaluation.reward") + "evaluation.reward.judge.extra.n=2 evaluation.reward.low=1",
            "evaluation.reward.low=1: must be below evaluation.reward.high=1. Fix: widen the range.\n"
            "evaluation.reward.judge.extra.n: is a field of the request that megarl fills itself. "
            "Fix: remove it (one verdict is asked for at a time).",
        ),
        (
            JUDGE + "reward.judge.max_cost_per_step=2.5",
            "reward.judge.max_cost_per_step=2.5: needs prices to count by. "
            "Fix: set reward.judge.input_price and reward.judge.output_price.",
        ),
        (
            "data.extra_columns=[level,info.level]",
            "data.extra_columns=['level', 'info.level']: must differ in what stands behind the last dots, the names by "
            "which a reward function gets them. Fix: leave one of the like-named out.",
        ),
        (
            "reward.kind=sum",
            "reward.kind=sum: needs the rewards that it adds up. "
            "Fix: list them in reward.terms, each with a name, a kind and a weight.",
        ),
        (
            'reward.terms=[{"name":a}]',
            "reward.terms: are never asked, since reward.kind=math. Fix: set reward.kind=sum, or remove reward.terms.",
        ),
        (
            'reward.kind=sum reward.low=-1 reward.terms=[{"name":a,"weight":0},{"name":a,"kind":sum}]',
            "reward.terms with the name a: must have a name each. Fix: give one another name.\n"
            "reward.low=-1.0: belongs to each term, since reward.kind=sum. Fix: set it in reward.terms.\n"
            "reward.terms.0.weight=0: must not be 0. Fix: give another weight, or remove the term.\n"
            "reward.terms.1.kind=sum: must be math, boxed, deepscaler, f1, judge, package.module:function or "
            "folder/file.py:function. Fix: correct reward.terms.1.kind.",
        ),
    ],
)
def test_refused(run_file: Path, overrides: str, message: str) -> None:
    refusals = broken_rules(load_config(run_file, overrides.split()))
    assert [str(each) for each in refusals] == message.split("\n")


@pytest.mark.parametrize(
    "overrides",
    [
        "reward.kind=f1 reward.graded=response",
        'reward.kind=sum reward.terms=[{"name":a,"weight":-2},{"name":b,"kind":rewards/my.file.py:f,"low":-1}]',
        JUDGE + "reward.judge.max_cost_per_step=2 reward.judge.output_price=10 reward.judge.temperature=null",
        JUDGE + "reward.judge.extra.structured_outputs.regex=Score:[0-9] reward.judge.template={response}?",
        JUDGE.replace("http://host:8000/v1", "https://[::1]:8000"),
    ],
)
def test_allowed(run_file: Path, overrides: str, tmp_path: Path) -> None:
    config = load_config(run_file, overrides.split())
    assert list(broken_rules(config)) == []
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    "url", ["host:8000", "ftp://host", "http://", "http://me:secret@host/v1", "http://host/v1?key=1"]
)
def test_a_url_that_is_none_is_refused_when_it_is_read(run_file: Path, url: str) -> None:
    with pytest.raises(Refusal) as caught:
        load_config(run_file, [*JUDGE.split(), f"reward.judge.url={url}"])
    assert str(caught.value).startswith(f"reward.judge.url={url}: must be http://host[:port]/path or https://")


@pytest.mark.parametrize("override", ["concurrency=0", "concurrency=2000", "time_limit=0", "retries=-1", "model=''"])
def test_numbers_out_of_range_are_refused_when_they_are_read(run_file: Path, override: str) -> None:
    with pytest.raises(Refusal, match=rf"^reward\.judge\.{override.partition('=')[0]}="):
        load_config(run_file, [*JUDGE.split(), f"reward.judge.{override}"])
