"""The grader's processes: order, time limits, deaths, ranges."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megarl.config.rewards import RewardSettings
from megarl.errors import MegarlError, Refusal
from megarl.records import Prompt
from megarl.rewards.answers import GradedAnswer, GradingItem
from megarl.rewards.grader import Grader

#: A user's reward functions, as a module outside the package.
USER_MODULE = r"""
import os, sys, time

def length(text, answer, source):
    print("noise on standard output")
    return len(text) / 100

def obey(text, answer, source):
    if text == "hang":
        while True:
            pass
    if text == "sleep":
        time.sleep(60)
    if text == "exit":
        os._exit(3)
    if text == "raise":
        raise KeyError("no such thing")
    if text == "none":
        return None
    return float(text)

def work(text, answer, source):
    start, wall = time.process_time(), time.monotonic()
    while time.process_time() - start < float(text):
        pass
    return round(time.monotonic() - wall, 1)

def modules(text, answer, source):
    return 1.0 if {"torch", "vllm", "transformers"} & set(sys.modules) else 0.5

def sources(text, answer, source):
    return 1.0 if (text, answer, source) == ("t", "a", "s") else 0.0
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "user_rewards.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "user_rewards"


def settings(kind: str, **changes: object) -> RewardSettings:
    return RewardSettings.model_validate({"kind": kind, "workers": 2, "time_limit": 5.0} | changes)


def test_equivalent_answers_score_high_and_the_order_is_kept() -> None:
    texts = [r"\boxed{0.5}", r"\boxed{2}", r"\boxed{\frac{1}{2}}", "nothing", r"\boxed{\frac12}", "", "it is 1/2"]
    with Grader(settings("math", low=-1.0, high=1.0)) as grader:
        rewards = [graded.reward for graded in grader.grade([GradingItem(text, "1/2") for text in texts])]
    assert rewards == [1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0]


def test_an_alternative_reference_counts_as_right() -> None:
    prompt = Prompt(0, (1,), "q", "0.01", alternatives=("0.02",))
    with Grader(settings("math")) as grader:
        graded = grader.grade([GradingItem.of(prompt, rf"\boxed{{{value}}}") for value in ("0.010", "2/100", "0.03")])
    assert [one.reward for one in graded] == [1.0, 1.0, 0.0]


def test_the_strict_rule_scores_in_one_process() -> None:
    with Grader(settings("boxed", low=-1.0, high=2.0)) as grader:
        assert len(grader._workers) == 1
        graded = grader.grade([GradingItem(text, "42") for text in (r"\boxed{42}", r"\boxed{42.0}", "42")])
    assert graded == [GradedAnswer(2.0), GradedAnswer(-1.0), GradedAnswer(-1.0)]


@pytest.mark.parametrize("kind", ["math", "boxed"])
def test_nothing_of_an_answer_is_parsed_in_this_process(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(*_: object) -> None:
        raise AssertionError("parsed outside a worker")

    for module in list(sys.modules.values()):
        name = getattr(module, "__name__", "")
        if name.startswith("megarl.rewards."):
            for rule in (
                "boxed",
                "boxes",
                "taken",
                "decide",
                "after_thinking",
                "boxed_equals",
                "math_equals",
                "answers_equal",
            ):
                if hasattr(module, rule):
                    monkeypatch.setattr(module, rule, parsed)
    texts = [r"\boxed{42}", "\\boxed{" * 20_000, "nothing", ""]
    with Grader(settings(kind)) as grader:
        graded = grader.grade([GradingItem(text, "42") for text in texts])
    assert [(one.reward, one.counter) for one in graded] == [(1.0, None), (0.0, None), (0.0, None), (0.0, None)]


def test_shared_words_need_no_process_and_the_best_reference_counts() -> None:
    items = [
        GradingItem("The cat sat.", "a cat sat down"),  # 2 shared of 2 and 3: 4 / 5
        GradingItem("The cat sat.", "dogs", alternatives=("a cat sat down", "cat")),  # 4 / 5 and 2 / 3
        GradingItem("dogs", "a cat"),
        GradingItem("A CAT!", "the cat"),
    ]
    with Grader(settings("f1", low=-1.0, high=1.0)) as grader:
        assert grader._workers == []
        rewards = [one.reward for one in grader.grade(items)]
    assert rewards == pytest.approx([0.6, 0.6, -1.0, 1.0], abs=1e-12)


def test_failures_cost_one_answer_each(user_module: str) -> None:
    texts = ["0.25", "hang", "0.5", "exit", "raise", "sleep", "7", "nan", "-0.5", "none", "1", "inf", "0.75"]
    start = time.monotonic()
    with Grader(settings(f"{user_module}:obey", time_limit=1.0, max_failed_share=1.0)) as grader:
        graded = grader.grade([GradingItem(text, "") for text in texts])
        assert [(one.reward, one.counter) for one in graded] == [
            (0.25, None),
            (0.0, "grader_timeout"),
            (0.5, None),
            (0.0, "grader_died"),
            (0.0, "grader_error"),
            (0.0, "grader_timeout"),
            (0.0, "reward_out_of_range"),
            (0.0, "reward_out_of_range"),
            (0.0, "reward_out_of_range"),
            (0.0, "grader_error"),
            (1.0, None),
            (0.0, "reward_out_of_range"),
            (0.75, None),
        ]
        # The replaced processes work.
        assert [one.reward for one in grader.grade([GradingItem("0.5", "")] * 5)] == [0.5] * 5
    assert time.monotonic() - start < 20


def test_waiting_for_a_processor_does_not_count(user_module: str) -> None:
    """Work for less than its limit, among three processes that want the same processor, takes longer and is in time."""
    processor = min(os.sched_getaffinity(0))
    with Grader(settings(f"{user_module}:work", workers=1, time_limit=1.0, high=100.0)) as grader:
        assert grader.grade([GradingItem("0", "")]) == [GradedAnswer(0.0)]
        hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
        try:
            for process in (*hogs, grader._workers[0].process):
                os.sched_setaffinity(process.pid, {processor})
            (graded,) = grader.grade([GradingItem("0.4", "")])
        finally:
            for hog in hogs:
                hog.kill()
                hog.wait()
    assert graded.counter is None
    assert graded.reward is not None and graded.reward > 1.0  # seconds it took


def test_an_answer_whose_worker_somebody_else_killed_is_graded_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system does where memory runs out: the first process that grades it is gone in the midst."""
    mark = tmp_path / "killed"
    code = f"import os, signal\ndef once(text, answer, source):\n    if not os.path.exists({str(mark)!r}):\n"
    code += f"        open({str(mark)!r}, 'w').close()\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    code += "    return float(text)\n"
    (tmp_path / "killed_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with Grader(settings("killed_rewards:once", workers=1)) as grader:
        graded = grader.grade([GradingItem(text, "") for text in ("0.25", "0.5")])
    assert [(one.reward, one.counter) for one in graded] == [(0.25, None), (0.5, None)]


def test_every_answer_may_kill_its_worker(user_module: str) -> None:
    with Grader(settings(f"{user_module}:obey", max_failed_share=1.0)) as grader:
        assert {one.counter for one in grader.grade([GradingItem("exit", "")] * 6)} == {"grader_died"}


def test_a_worker_that_dies_while_idle_costs_nothing(user_module: str) -> None:
    with Grader(settings(f"{user_module}:obey", workers=1)) as grader:
        assert grader.grade([GradingItem("0.5", "")])[0].reward == 0.5
        grader._workers[0].process.kill()
        grader._workers[0].process.wait()
        assert grader.grade([GradingItem("0.5", "")]) == [GradedAnswer(0.5)]


def test_printing_does_not_disturb_and_long_texts_pass(user_module: str) -> None:
    with Grader(settings(f"{user_module}:length", high=1e9)) as grader:
        graded = grader.grade([GradingItem("x" * length, "") for length in (10, 300_000, 0)])
    assert [one.reward for one in graded] == [0.1, 3000.0, 0.0]


def test_the_function_gets_text_answer_and_source(user_module: str) -> None:
    with Grader(settings(f"{user_module}:sources")) as grader:
        assert grader.grade([GradingItem("t", "a", "s"), GradingItem("t", "s", "a")]) == [
            GradedAnswer(1.0),
            GradedAnswer(0.0),
        ]


def test_workers_import_neither_torch_nor_vllm_nor_transformers(user_module: str) -> None:
    with Grader(settings(f"{user_module}:modules")) as grader:
        assert grader.grade([GradingItem("", "")]) == [GradedAnswer(0.5)]


@pytest.mark.parametrize("path", ["no_such_module:f", "math:no_such_function", "string:digits", "exact"])
def test_a_wrong_import_path_is_refused_at_construction(path: str) -> None:
    with pytest.raises(Refusal, match=r"reward\.kind"):
        Grader(settings(path))


def test_a_module_that_ends_the_process_is_an_error_not_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadly_rewards.py").write_text("import os\nos._exit(5)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MegarlError, match="exit status 5"):
        Grader(settings("deadly_rewards:f", workers=1))


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(Refusal, match=r"reward.low=1.0: must be below reward.high=0.0"):
        Grader(settings("math", low=1.0, high=0.0))


def test_a_closed_grader_says_so() -> None:
    grader = Grader(settings("boxed"))
    grader.close()
    grader.close()
    with pytest.raises(MegarlError, match="closed"):
        grader.grade([])


def test_workers_end_with_the_process_that_started_them(user_module: str, tmp_path: Path) -> None:
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from megarl.config.rewards import RewardSettings\n"
        "from megarl.rewards.grader import Grader\n"
        f"grader = Grader(RewardSettings(kind='{user_module}:obey', workers=1))\n"
        "print(grader._workers[0].process.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    pid = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout)
    deadline = time.monotonic() + 10
    while _runs(pid):
        assert time.monotonic() < deadline, "the orphaned worker still runs"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
