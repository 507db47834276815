"""Reward functions of the user's own: where they are found, how they are called, and what becomes of broken ones."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from megarl.config.rewards import RewardSettings
from megarl.errors import Refusal, ScoringStopped
from megarl.rewards import grader as grader_module
from megarl.rewards.answers import GradedAnswer, GradingItem
from megarl.rewards.grader import Grader
from megarl.servers.failures import Failures

ROW = GradingItem("4", "4", "here", question="2 + 2?", extra={"difficulty": 3, "info.tags": ["a"], "day": None})

#: One function per way of going wrong, and what is said of it.
BROKEN = r"""
import os, signal, sys, time

def none(text, answer, source): pass
def table(text, answer, source): return {"score": 1.0}
def listed(text, answer, source): return [1.0]
def words(text, answer, source): return "1.0"
def two(text, answer, source): return 2.0
def nan(text, answer, source): return float("nan")
def infinite(text, answer, source): return float("inf")
def huge(text, answer, source): return 10 ** 400
def complex_number(text, answer, source): return 1j
def batched(prompts, completions): return [0.0]
def verl(data_source, solution_str, ground_truth, extra_info): return 0.0
def generator(text, answer, source): yield 1.0
async def coroutine(text, answer, source): return 1.0
def raises(text, answer, source): raise KeyError("no such\nthing")
def surrogate(text, answer, source): raise ValueError("\ud800" * 1000)
def unspeakable(text, answer, source):
    class Mute(Exception):
        def __str__(self): raise ValueError
    raise Mute
def leaves(text, answer, source): exit()
def exits(text, answer, source): sys.exit("bye")
def ends(text, answer, source): os._exit(3)
def killed(text, answer, source): os.kill(os.getpid(), signal.SIGKILL)
def hangs(text, answer, source): time.sleep(60)
number = 1.0
"""


def settings(kind: str, **changes: object) -> RewardSettings:
    return RewardSettings.model_validate({"kind": kind, "workers": 1, "time_limit": 5.0} | changes)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", "returned None, which is no number"),
        ("table", r"returned \{'score': 1.0\} \(a dict\), which is no number"),
        ("listed", r"returned \[1.0\] \(a list\), which is no number"),
        ("words", r"returned '1.0' \(a str\), which is no number"),
        ("two", "returned 2, outside reward.low=0 to reward.high=1. Fix: set reward.low and reward.high to its range"),
        ("nan", "returned nan, outside"),
        ("infinite", "returned inf, outside"),
        ("huge", "returned inf, outside"),
        ("complex_number", r"returned 1j \(a complex\), which is no number"),
        (
            "batched",
            r"raised TypeError: batched\(\) takes 2 positional arguments but 3 were given. Fix: correct the fun",
        ),
        ("verl", r"raised TypeError: verl\(\) missing 1 required positional argument: 'extra_info'"),
        ("generator", "returned a generator, which is no number"),
        ("coroutine", "returned a coroutine, which is no number"),
        ("raises", r"raised KeyError: 'no such\\nthing' \(broken.py, line 17\)"),
        ("surrogate", r"raised ValueError: \?{300}\.\.\. \(broken.py, line 18\)"),
        ("unspeakable", r"raised Mute \(broken.py, line 22\)"),
        ("leaves", r"raised SystemExit"),
        ("exits", r"raised SystemExit: bye \(broken.py, line 24\)"),
        ("ends", r"ended 3 processes in a row \(exit status 3\)"),
        ("killed", r"ended 3 processes in a row \(SIGKILL\)"),
        ("hangs", "gave no result within 1 s"),
    ],
)
def test_a_broken_function_is_refused_at_its_first_call(
    here: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.setattr(grader_module, "FIRST_CALL_LIMIT", 1.0)
    (here / "broken.py").write_text(BROKEN)
    rule = (
        r"must return a number in reward\.low=0 to reward\.high=1, and on being called with the first row of the data"
    )
    with pytest.raises(Refusal, match=rf"^reward\.kind=broken:{name}: {rule} it {said}") as caught:
        Grader(settings(f"broken:{name}", time_limit=1.0), trial=ROW)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def f(text, answer, source) return 1", r"SyntaxError: .*\(broken.py, line 1\)"),
        ("import no_such_module", r"ModuleNotFoundError: No module named 'no_such_module' \(broken.py, line 1\)"),
        ("x = 1\nraise RuntimeError('no key')", r"RuntimeError: no key \(broken.py, line 2\)"),
        ("import sys; sys.exit(4)", r"SystemExit: 4 \(broken.py, line 1\)"),
        ("import os; os._exit(5)", r"ended 3 processes in a row \(exit status 5\)"),
        ("", r"AttributeError: module 'broken' has no attribute 'f'"),
        ("f = 0.5", r"f is no function but 0.5 \(a float\)"),
    ],
)
def test_a_function_that_cannot_be_imported_is_refused(here: Path, code: str, said: str) -> None:
    (here / "broken.py").write_text(code)
    with pytest.raises(Refusal, match=rf"^reward\.kind=broken:f: must lead to a function that can be imp.* \({said}\)"):
        Grader(settings("broken:f"), trial=ROW)


def test_numbers_of_all_types(here: Path) -> None:
    code = "import decimal, fractions, functools, numpy\nVALUES = dict("
    code += (
        "true=True, whole=1, share=fractions.Fraction(1, 4), exact=decimal.Decimal('0.5'), single=numpy.float32(0.5),"
    )
    code += "array=numpy.array(0.25), bit=numpy.bool_(True))\n"
    code += "class Scale:\n    def __call__(self, text, answer, source): return VALUES[text]\n"
    code += "scale, partial = Scale(), functools.partial(Scale(), source='')\n"
    (here / "numbers_of.py").write_text(code)
    texts = ("true", "whole", "share", "exact", "single", "array", "bit")
    with Grader(settings("numbers_of:scale"), trial=GradingItem("whole", "")) as grader:
        assert [one.reward for one in grader.grade([GradingItem(text, "") for text in texts])] == [
            1.0,
            1.0,
            0.25,
            0.5,
            0.5,
            0.25,
            1.0,
        ]


# --- during the run -------------------------------------------------------------------------------------------------

SOMETIMES = """
import os, time
print("loading", flush=True)
def some(text, answer, source):
    print("noise " * 20000)
    if text == "bad":
        raise ValueError("what is " + text)
    if text == "worse":
        return None
    if text == "slow":
        time.sleep(60)
    return float(text)
"""


def test_past_a_share_of_failures_the_run_stops_with_the_first_text(here: Path) -> None:
    (here / "sometimes.py").write_text(SOMETIMES)
    with Grader(settings("sometimes:some", time_limit=2.0), trial=GradingItem("1", "1")) as grader:
        good = [GradingItem("0.5", "")] * 18
        few = grader.grade([*good, GradingItem("bad", ""), GradingItem("slow", "")])
        assert [(one.reward, one.counter) for one in few[-3:]] == [
            (0.5, None),
            (0.0, "grader_error"),
            (0.0, "grader_timeout"),
        ]
        told = "reward.kind=sometimes:some failed on an answer for the first time: "
        told += "raised ValueError: what is bad (sometimes.py, line 7)"
        assert (grader.take_first_failure(), grader.take_first_failure()) == (told, None)
        with pytest.raises(ScoringStopped) as caught:
            grader.grade([GradingItem("worse", "")] * 200)
        message = (
            "reward.kind=sometimes:some failed on 41 of 200 answers, more than reward.max_failed_share=0.2 allows "
        )
        message += "(first seen: raised ValueError: what is bad (sometimes.py, line 7)). Fix: correct it, then resume "
        assert str(caught.value) == message + "the run."
        assert grader.grade(good)[0].reward == 0.5


def failures(allowed: float) -> Failures:
    return Failures("It failed on", "share", allowed, {"a": "mend a", "b": "mend b"})


def test_the_share_is_taken_of_the_last_hundred_answers() -> None:
    counted = failures(0.2)
    for number in range(200):  # 7 of 40 fail, at times 2 of 8
        counted.begin(8)
        for _ in range(2 if number % 5 in (2, 4) else 1):
            counted.note("a", "x")
        counted.end()
    counted.begin(8)
    with pytest.raises(
        ScoringStopped, match=r"^It failed on 2\d of 10\d answers, more than share=0.2 allows"
    ) as caught:
        for number in range(8):
            counted.note("b", str(number))
    assert "(first seen: x). Fix: mend b, then" in str(caught.value)


@pytest.mark.parametrize(("allowed", "calls", "size", "fails"), [(0.2, 2, 2, 2), (0.0, 1, 500, 1), (1.0, 100, 5, None)])
def test_a_handful_is_no_share(allowed: float, calls: int, size: int, fails: int | None) -> None:
    """Of two answers one or two may fail; where none may, the first one ends the run; where all may, none does."""
    counted, seen = failures(allowed), 0
    try:
        for _ in range(calls):
            counted.begin(size)
            for _ in range(size):
                seen += 1
                counted.note("a", "x")
            counted.end()
    except ScoringStopped:
        assert seen == (fails if allowed == 0 else 3)
    else:
        assert allowed == 1


def test_a_call_that_was_cut_short_is_forgotten() -> None:
    counted = failures(0.2)
    counted.begin(20)
    for _ in range(4):
        counted.note("a", "x")
    counted.begin(20)
    for _ in range(4):
        counted.note("a", "x")


# --- where it is found ----------------------------------------------------------------------------------------------


def test_modules_beside_the_run_hide_none_of_the_libraries(here: Path) -> None:
    """Neither Python's own nor installed ones, for the rules that are built in and for the user's own function."""
    for name in ("random", "decimal", "sympy", "math_verify", "inspect", "megarl"):
        (here / f"{name}.py").write_text("raise RuntimeError('taken from the working folder')\n")
    with Grader(settings("math")) as grader:
        assert grader.grade([GradingItem(r"\boxed{\frac{2}{4}}", "0.5")]) == [GradedAnswer(1.0)]
    (here / "helper.py").write_text("SCORE = 0.5\n")
    (here / "mine.py").write_text(
        "import random, decimal, sympy\ndef f(text, answer, source):\n    import helper\n    return helper.SCORE\n"
    )
    with Grader(settings("mine:f"), trial=ROW) as grader:
        assert grader.grade([ROW]) == [GradedAnswer(0.5)]


def test_the_path_of_a_file(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("else where")
    code = "import random, dataclasses, beside\n@dataclasses.dataclass\nclass Score:\n    value: float = beside.VALUE\n"
    code += "def f(text, answer, source):\n    assert random.random() < 1\n    return Score().value\n"
    for number, folder in enumerate((here / "rewards", elsewhere)):
        folder.mkdir(exist_ok=True)
        (folder / "random.py").write_text(code)
        (folder / "beside.py").write_text(f"VALUE = 0.{number + 1}\n")
    for kind, reward in (("rewards/random.py:f", 0.1), (f"{elsewhere}/random.py:f", 0.2)):
        with Grader(settings(kind), trial=ROW) as grader:
            assert grader.grade([ROW]) == [GradedAnswer(reward)]
    with pytest.raises(Refusal, match=r"^reward\.kind=rewards/none\.py:f: .*no such file rewards/none\.py"):
        Grader(settings("rewards/none.py:f"), trial=ROW)


# --- columns --------------------------------------------------------------------------------------------------------

COLUMNS = """
def named(text, answer, source, difficulty, *, tags):
    return float((difficulty, tags) == (3, ["a"]))
def some(text, answer, source, tags=()):
    return float(tags == ["a"])
def every(text, answer, source, **columns):
    return float(columns == {"difficulty": 3, "tags": ["a"], "day": None})
def plain(text, answer, source):
    return 1.0
def more(text, answer, source, level):
    return 1.0
def day(text, answer, source, day):
    return float(day == "2024-02-29 00:00:00")
"""


@pytest.mark.parametrize("name", ["named", "some", "every", "plain"])
def test_a_function_gets_the_columns_it_names(here: Path, name: str) -> None:
    (here / "columns.py").write_text(COLUMNS)
    with Grader(settings(f"columns:{name}"), trial=ROW) as grader:
        assert grader.grade([ROW]) == [GradedAnswer(1.0)]


def test_a_column_that_the_data_does_not_give_is_named(here: Path) -> None:
    (here / "columns.py").write_text(COLUMNS)
    said = r"missing 1 required positional argument: 'level'. Fix: .*data\.extra_columns"
    with pytest.raises(Refusal, match=said):
        Grader(settings("columns:more"), trial=ROW)


def test_what_json_has_no_form_for_arrives_as_text(here: Path) -> None:
    (here / "columns.py").write_text(COLUMNS)
    item = GradingItem("", "", extra={"day": datetime.datetime(2024, 2, 29)})
    with Grader(settings("columns:day"), trial=item) as grader:
        assert grader.grade([item]) == [GradedAnswer(1.0)]
