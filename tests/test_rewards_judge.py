"""The judge against a real HTTP server that answers rightly, badly, late or not at all."""

from __future__ import annotations

import random
import re
import time
from email.utils import formatdate
from typing import Any

import pytest
from failing_judge import Act, Drop, Hang, JudgeServer, Say, Script, Status, serving
from ports import free_port

from megarl.config.rewards import RewardSettings
from megarl.errors import MegarlError, Refusal, ScoringStopped
from megarl.rewards.answers import GradedAnswer, GradingItem
from megarl.rewards.judge import Judge
from megarl.rewards.scorer import Scorer, build_scorer
from megarl.rewards.verdict import REMINDER
from megarl.servers.client import retry_after

#: The message is the response alone, so that a script can tell answers apart; the first small question is "4".
HELLO = "4"


def settings(
    url: str, *, low: float = 0.0, high: float = 1.0, max_failed_share: float = 0.2, **judge: Any
) -> RewardSettings:
    defaults: dict[str, Any] = {"url": url, "model": "m", "template": "{response}", "time_limit": 10.0, "patience": 5.0}
    reward = {"kind": "judge", "low": low, "high": high, "max_failed_share": max_failed_share}
    return RewardSettings.model_validate(reward | {"judge": defaults | judge})


def items(*texts: str) -> list[GradingItem]:
    return [GradingItem(text, "reference") for text in texts]


def numbered(count: int) -> list[GradingItem]:
    return items(*(f"answer {index:04}" for index in range(count)))


def always(act: Act) -> Script:
    """Greets, and does the same about every answer."""
    return lambda text, times: Say("Score: 1") if text == HELLO else act


def first(act: Act, then: Act | None = None) -> Script:
    """Does `act` when an answer comes first, then scores it 10."""

    def script(text: str, times: int) -> Act:
        return act if text != HELLO and times == 0 else then or Say("Score: 10")

    return script


def ready(server: JudgeServer, **judge: Any) -> Scorer:
    """A judge that was introduced, with nothing counted yet."""
    scorer = build_scorer(settings(server.url, **judge))
    scorer.take_counters()
    server.seen.clear()
    return scorer


def says(text: str, times: int) -> Act:
    """Every answer is what the judge is to say of it."""
    return Say("Score: 1" if text == HELLO else text.removesuffix(REMINDER))


# --- verdicts -------------------------------------------------------------------------------------------------------


def test_scores_map_linearly_and_the_order_is_kept() -> None:
    said = ["Score: 1", "Score: 10", "Score: 5.5", "**Score: 4**", "7/10", "Score: 99", "Score: -2"]
    with serving(says) as server:
        scorer = build_scorer(settings(server.url, low=-1.0, high=2.0, concurrency=3))
        assert scorer.take_counters() == {
            "judge_requests": 1,
            "judge_input_tokens": 10,
            "judge_output_tokens": 5,
        }
        graded = scorer.grade(items(*said))
    assert [one.counter for one in graded] == [None] * 7
    assert [one.reward for one in graded] == pytest.approx([-1.0, 2.0, 0.5, 0.0, 1.0, 2.0, -1.0], abs=1e-12)
    assert scorer.take_counters() == {
        "judge_requests": 7,
        "judge_clipped": 2,
        "judge_input_tokens": 70,
        "judge_output_tokens": 35,
    }
    assert scorer.take_counters() == {}


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "meant-for-another-server")
    monkeypatch.setenv("JUDGE_KEY", "top-secret")
    item = GradingItem("the \ud800 response", "the reference", question="the question")
    with serving(lambda text, times: Say("Score: 7")) as server:
        build_scorer(settings(server.url, template=None)).grade([item])
        build_scorer(
            settings(
                server.url,
                api_key_env="JUDGE_KEY",
                system="Be strict.",
                temperature=None,
                max_tokens=33,
                max_tokens_name="max_completion_tokens",
                extra={"structured_outputs": {"regex": "x"}},
            )
        ).grade([item])
    plain, full = server.seen[1], server.seen[3]
    assert [message["role"] for message in plain.body["messages"]] == ["user"]
    for part in ("the question", "the reference", "the ? response", "Score: N"):
        assert part in plain.text
    del plain.body["messages"]
    assert plain.body == {"model": "m", "temperature": 0.0, "max_tokens": 256}
    assert "authorization" not in plain.headers
    assert "meant-for-another-server" not in str(server.seen)
    assert full.headers["authorization"] == "Bearer top-secret"
    assert full.body == {
        "model": "m",
        "max_completion_tokens": 33,
        "structured_outputs": {"regex": "x"},
        "messages": [{"role": "system", "content": "Be strict."}, {"role": "user", "content": "the ? response"}],
    }


def test_an_unreadable_verdict_is_asked_for_again_with_a_reminder() -> None:
    with serving(lambda text, times: Say("Score: 10" if text == HELLO or REMINDER in text else "good")) as server:
        scorer = ready(server)
        assert scorer.grade(items("a")) == [GradedAnswer(1.0)]
    assert server.texts() == ["a", "a" + REMINDER]
    assert scorer.take_counters() == {
        "judge_requests": 2,
        "judge_retries": 1,
        "judge_unreadable_replies": 1,
        "judge_input_tokens": 20,
        "judge_output_tokens": 10,
    }


@pytest.mark.parametrize(
    "act",
    [
        Say("Score: 7-8"),
        Say("seven"),
        Say(""),
        Say("Score: 1", finish_reason="length"),
        Status(200, {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}),
    ],
)
def test_no_verdict_is_no_reward(act: Act) -> None:
    script = lambda text, times: act if text.startswith("bad") else Say("Score: 10")  # noqa: E731
    with serving(script) as server:
        scorer = ready(server, retries=2, max_failed_share=0.5)
        assert scorer.grade(items("good", "bad")) == [GradedAnswer(1.0), GradedAnswer(None, "judge_unreadable")]
    assert len(server.seen) == 1 + 3
    counters = scorer.take_counters()
    assert (counters["judge_retries"], counters["judge_unreadable_replies"]) == (2, 3)


def test_replies_without_usage_are_estimated_and_said_to_be() -> None:
    with serving(lambda text, times: Say("Score: 10", usage=None)) as server:
        scorer = ready(server)
        scorer.grade(items("x" * 300))
    # 64 tokens for the server's template and 300 / 3 bytes; "Score: 10" has 9 bytes.
    assert scorer.take_counters() == {
        "judge_requests": 1,
        "judge_estimated_replies": 1,
        "judge_input_tokens": 164,
        "judge_output_tokens": 3,
    }


# --- failures of single requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "counter"),
    [
        (Status(500, "oops"), "judge_error"),
        (Status(429, {"error": {"message": "slow down"}}), "judge_error"),
        (Status(200, "<html>maintenance</html>"), "judge_error"),
        (Status(200, {"choices": []}), "judge_error"),
        (Status(200, [1]), "judge_error"),
        (Drop(), "judge_error"),
        (Status(503, "loading"), "judge_error"),
        (Hang(), "judge_timeout"),
    ],
)
def test_a_failed_request_is_tried_again_and_then_counted(act: Act, counter: str) -> None:
    def script(text: str, times: int) -> Act:
        if text == "once":
            return act if times == 0 else Say("Score: 10")
        return act if text == "never" else Say("Score: 10")

    with serving(script) as server:
        limit = 1.0 if isinstance(act, Hang) else 10.0
        scorer = ready(server, retries=1, time_limit=limit, max_failed_share=0.5)
        graded = scorer.grade(items("fine", "once", "never"))
    assert graded == [GradedAnswer(1.0), GradedAnswer(1.0), GradedAnswer(None, counter)]
    assert server.texts().count("never") == 2
    assert scorer.take_counters()["judge_retries"] == 2


def test_a_rejected_answer_is_not_asked_about_again() -> None:
    too_long = Status(400, {"error": {"message": "too many tokens"}})
    with serving(lambda text, times: too_long if text == "long" else Say("Score: 10")) as server:
        scorer = ready(server, max_failed_share=0.5)
        assert scorer.grade(items("short", "long")) == [GradedAnswer(1.0), GradedAnswer(None, "judge_error")]
    assert server.texts().count("long") == 1


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_holds_everybody_back(status: int) -> None:
    act = Status(status, "busy", {"Retry-After": "1"})
    with serving(lambda text, times: act if text == "answer 0000" and times == 0 else Say("Score: 10")) as server:
        scorer = ready(server, concurrency=1)
        graded = scorer.grade(numbered(3))
    assert [one.reward for one in graded] == [1.0] * 3
    assert server.texts()[0] == "answer 0000"
    assert server.seen[1].time - server.seen[0].time >= 1.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("2", 2.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),  # passed
        ("soon", None),
        ("nan", None),
        ("", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, seconds: float | None) -> None:
    assert retry_after({"retry-after": value}) == seconds


def test_retry_after_is_counted_from_now() -> None:
    soon = retry_after({"retry-after": formatdate(time.time() + 100, usegmt=True)})
    assert soon is not None and 90 < soon <= 100


def test_a_pause_longer_than_patience_stops_at_once() -> None:
    with serving(first(Status(429, "quota", {"Retry-After": "3600"}))) as server:
        scorer = ready(server)
        with pytest.raises(ScoringStopped, match=r"asks to wait 3600 s, longer than reward\.judge\.patience=5"):
            scorer.grade(items("a"))


def test_answers_are_asked_about_together_and_no_more_than_allowed() -> None:
    with serving(lambda text, times: Say("Score: 10", seconds=0.0 if text == HELLO else 0.5)) as server:
        scorer = ready(server, concurrency=8)
        start = time.monotonic()
        graded = scorer.grade(numbered(24))
        elapsed = time.monotonic() - start
    assert [one.reward for one in graded] == [1.0] * 24
    assert server.most_in_flight == 8
    assert 1.5 <= elapsed < 6.0  # one after another they take 12


def test_too_many_answers_without_a_verdict_stop_the_run() -> None:
    def script(text: str, times: int) -> Act:
        return Say("no idea") if text.startswith(("answer 0003", "answer 0005", "answer 0007")) else Say("Score: 10")

    with serving(script) as server:
        scorer = ready(server, retries=0, concurrency=1, max_failed_share=0.3)
        assert sum(one.reward is None for one in scorer.grade(numbered(10))) == 3
        scorer = ready(server, retries=0, concurrency=1, max_failed_share=0.29)
        with pytest.raises(ScoringStopped) as caught:
            scorer.grade(numbered(10))
        assert scorer.grade(items("later")) == [GradedAnswer(1.0)]
    message = str(caught.value)
    assert message.startswith(f"The judge at {server.url} gave no verdict on 3 of 10 answers, more than ")
    assert "reward.max_failed_share=0.29 allows (first seen: the unreadable verdict 'no idea'). Fix: " in message
    told = (
        f"The judge at {server.url} gave no verdict on an answer for the first time: the unreadable verdict 'no idea'"
    )
    assert (scorer.take_first_failure(), scorer.take_first_failure()) == (told, None)
    assert "answer 0008" not in server.texts()  # it stopped as soon as that was certain


# --- proxies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks9://nowhere", "not an address"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_judge_on_this_machine_is_asked_without_the_proxy(
    monkeypatch: pytest.MonkeyPatch, proxy: str, host: str
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    with serving(says) as server:
        scorer = build_scorer(settings(server.url.replace("127.0.0.1", host)))
        assert scorer.grade(items("Score: 10")) == [GradedAnswer(1.0)]


def test_a_refusal_names_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("http_proxy", f"http://me:secret@{address}")
    with pytest.raises(Refusal, match=rf"Connect call failed.*, through the proxy {address} of http_proxy; ") as caught:
        build_scorer(settings("http://judge.example:8000/v1", patience=0.0))
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("http_proxy", "socks9://nowhere:1")
    with pytest.raises(Refusal, match=r"is asked through the proxy socks9://nowhere:1 of http_proxy, which cannot be"):
        build_scorer(settings("http://judge.example:8000/v1"))
    monkeypatch.delenv("http_proxy")
    monkeypatch.setenv("Http_Proxy", f"http://{address}")
    with pytest.raises(Refusal, match=rf", through the proxy http://{address} of Http_Proxy; "):
        build_scorer(settings("http://judge.example:8000/v1", patience=0.0))
    monkeypatch.setenv("no_proxy", "judge.example")
    with pytest.raises(Refusal) as caught:
        build_scorer(settings("http://judge.example:8000/v1", patience=0.0))
    assert "proxy" not in str(caught.value)


# --- the judge as a whole -------------------------------------------------------------------------------------------


def test_the_run_waits_for_a_judge_that_comes_back() -> None:
    said: list[str] = []

    def on_wait(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            server.start()

    with serving(says) as server:
        scorer = build_scorer(settings(server.url, retries=0, patience=60.0), on_wait=on_wait)
        scorer.take_counters()
        server.stop()
        graded = scorer.grade(items(*["Score: 10"] * 20))
    assert [one.reward for one in graded] == [1.0] * 20
    counters = scorer.take_counters()
    assert counters["judge_outages"] == 1
    assert "judge_retries" not in counters
    assert re.fullmatch(rf"waiting for the judge at {server.url}, \d+ of 60 s \(\[Errno 111\] .*\)", said[0])
    assert said[-1] == "the judge answers again"


def test_a_judge_that_dies_with_requests_in_flight_costs_none_of_them() -> None:
    def script(text: str, times: int) -> Act:
        if server.texts().count(HELLO) == 3:
            return says(text, times)
        return Status(502, "bad gateway") if text == HELLO else Drop()

    with serving(says) as server:
        scorer = ready(server, retries=0, concurrency=4, patience=60.0)
        server.script = script
        graded = scorer.grade(items("Score: 1", "Score: 10", "Score: 10", "Score: 1"))
    assert [one.reward for one in graded] == [0.0, 1.0, 1.0, 0.0]
    assert scorer.take_counters()["judge_outages"] == 1


@pytest.mark.parametrize("how", ["closed", "hangs", "502"])
def test_the_run_stops_when_its_patience_ends(how: str) -> None:
    with serving(says) as server:
        scorer = ready(server, time_limit=1.0 if how == "hangs" else 10.0, patience=2.0)
        if how == "closed":
            server.stop()
        else:
            server.script = lambda text, times: Hang() if how == "hangs" else Status(502, "bad gateway")
        start = time.monotonic()
        with pytest.raises(ScoringStopped) as caught:
            scorer.grade(items(*["Score: 1"] * 40))
        assert 2.0 <= time.monotonic() - start < 30.0
    last = {"closed": "Errno 111", "hangs": "no reply within 1 s", "502": "HTTP 502: bad gateway"}[how]
    message = str(caught.value)
    assert message.startswith(f"The judge at {server.url} gave no answer for ")
    assert "past reward.judge.patience=2 " in message and last in message
    assert message.endswith("Fix: start it again or raise reward.judge.patience, then resume the run.")


def test_an_answer_that_always_ends_the_connection_does_not_stop_the_others() -> None:
    with serving(lambda text, times: Drop() if text == "poison" else Say("Score: 10")) as server:
        scorer = ready(server, retries=1, concurrency=1, max_failed_share=0.5)
        graded = scorer.grade(items("a", "poison", "b"))
    assert [one.reward for one in graded] == [1.0, None, 1.0]
    assert graded[1].counter == "judge_error"


@pytest.mark.parametrize(
    ("status", "body", "fix"),
    [
        (401, {"error": {"message": "wrong key sesame"}}, "put a valid key into the environment variable JUDGE_KEY"),
        (402, "", "add money to the judge's account"),
        (403, "no", "use a key that may use reward.judge.model=m"),
        (404, {"error": {"message": "no such model"}}, "correct reward.judge.model=m, or reward.judge.url"),
        (429, {"error": {"message": "x", "code": "insufficient_quota"}}, "add money to the judge's account"),
    ],
)
def test_a_judge_that_takes_no_request_stops_the_run_at_once(
    status: int, body: Any, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    with serving(always(Status(status, body))) as server:
        scorer = ready(server, patience=600.0, api_key_env="JUDGE_KEY")
        start = time.monotonic()
        with pytest.raises(ScoringStopped) as caught:
            scorer.grade(numbered(8))
        server.script = lambda text, times: Status(status, body)
        with pytest.raises(Refusal) as refused:
            build_scorer(settings(server.url, patience=600.0, api_key_env="JUDGE_KEY"))
        assert time.monotonic() - start < 60.0
    for message in (str(caught.value), str(refused.value)):
        assert server.url in message and f"HTTP {status}" in message and f"Fix: {fix}" in message
        assert "sesame" not in message


@pytest.mark.parametrize(
    ("act", "seen"),
    [
        (Status(400, {"error": {"message": "temperature is not supported"}}), "HTTP 400: temperature is not supported"),
        (Status(405, ""), "HTTP 405: Method Not Allowed"),
        (Status(200, "<html>welcome</html>"), "a reply that is no chat completion: <html>welcome</html>"),
    ],
)
def test_what_is_no_judge_is_refused_before_anything_is_generated(act: Act, seen: str) -> None:
    with serving(lambda text, times: act) as server, pytest.raises(Refusal) as caught:
        build_scorer(settings(server.url, patience=600.0))
    assert str(caught.value).startswith(
        f"reward.judge.url={server.url}: is of no use, since the judge answers the first request with {seen}. Fix: "
    )
    assert len(server.seen) == 1


def test_a_judge_that_starts_late_is_waited_for() -> None:
    said: list[str] = []

    def on_wait(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            server.start()

    server = JudgeServer(lambda text, times: Status(500, "warming up") if times == 0 else Say("Score: 10"))
    try:
        scorer = build_scorer(settings(server.url, patience=60.0), on_wait=on_wait)
        assert scorer.grade(items("a")) == [GradedAnswer(1.0)]
    finally:
        server.close()
    assert server.texts() == [HELLO, HELLO, "a", "a"]
    assert "Errno 111" in said[0] and "Errno 111" in said[1] and "HTTP 500: warming up" in said[2]


def test_a_judge_that_never_starts_is_refused_when_patience_ends() -> None:
    url, start = f"http://127.0.0.1:{free_port()}/v1", time.monotonic()
    with pytest.raises(Refusal, match=r"no judge answers there for .* s \(last seen: \[Errno 111\]"):
        build_scorer(settings(url, patience=1.0))
    assert 1.0 <= time.monotonic() - start < 30.0


def test_https_where_there_is_none_is_refused_at_once() -> None:
    with serving(says) as server, pytest.raises(Refusal, match=r"correct reward\.judge\.url, or make its certificate"):
        build_scorer(settings(server.url.replace("http:", "https:"), patience=600.0))


# --- money ----------------------------------------------------------------------------------------------------------


def priced(cap: float, **judge: Any) -> dict[str, Any]:
    """A token costs 1. An answer of 11 bytes may cost 64 + 11 + 10 = 85, and does cost 10 + 5 = 15."""
    return {"max_cost_per_step": cap, "input_price": 1e6, "output_price": 1e6, "max_tokens": 10} | judge


@pytest.mark.parametrize("concurrency", [1, 6])
def test_the_cap_is_never_passed_and_starts_anew_with_each_step(concurrency: int) -> None:
    # The n-th request goes out while 15 (n - 1) + 85 <= 200: eight do, and 120 is spent.
    with serving(lambda text, times: Say("Score: 10", seconds=0.05)) as server:
        scorer = build_scorer(settings(server.url, **priced(400, concurrency=concurrency)), replicas=2)
        for _ in range(2):
            server.seen.clear()
            scorer.begin_step()
            graded = scorer.grade(numbered(12))
            assert sorted((one.reward or 0.0, one.counter or "") for one in graded) == (
                [(0.0, "judge_cap")] * 4 + [(1.0, "")] * 8
            )
            assert len(server.seen) == 8
            # What a later call of the step asks for is turned away too, although a small request would still fit.
            assert scorer.grade(items("")) == [GradedAnswer(None, "judge_cap")]


def test_the_cap_counts_estimates_and_what_failed_requests_may_have_cost() -> None:
    # Without usage 64 + ceil(11 / 3) = 68 are sent and 3 received: 71. The second would need 71 + 85 <= 150.
    with serving(lambda text, times: Say("Score: 10", usage=None)) as server:
        scorer = build_scorer(settings(server.url, **priced(150, concurrency=1)))
        scorer.begin_step()
        assert [one.counter for one in scorer.grade(numbered(2))] == [None, "judge_cap"]
    # A dropped request may have cost 85, and the small question after it 15: nothing is left for the retry.
    with serving(lambda text, times: Drop() if text != HELLO else Say("Score: 10")) as server:
        scorer = build_scorer(settings(server.url, **priced(150, concurrency=1)))
        scorer.begin_step()
        assert [one.counter for one in scorer.grade(numbered(1))] == ["judge_cap"]
        assert server.texts().count("answer 0000") == 1


def test_refused_requests_cost_nothing() -> None:
    with serving(first(Status(429, "slow down"))) as server:
        scorer = build_scorer(settings(server.url, **priced(100, concurrency=1)))
        scorer.begin_step()
        assert scorer.grade(items("answer 0000")) == [GradedAnswer(1.0)]  # 0 + 15, and 85 had to fit twice


def test_a_cap_that_allows_no_verdict_is_said() -> None:
    with serving(says) as server:
        # The small question may cost 64 + 1 + 10.
        with pytest.raises(Refusal, match=r"max_cost_per_step=149: .* on each of 2 replica\(s\)"):
            build_scorer(settings(server.url, **priced(149)), replicas=2)
        scorer = build_scorer(settings(server.url, **priced(150)), replicas=2)
        scorer.begin_step()
        with pytest.raises(ScoringStopped, match=r"max_cost_per_step=150 pays for a verdict on none of 3 answer"):
            scorer.grade(numbered(3))
        # One answer that is too long by itself does not spend the others' money: 64 + 4 + 10 are enough for these.
        scorer = build_scorer(settings(server.url, **priced(100, concurrency=1)))
        scorer.begin_step()
        graded = scorer.grade(items("x" * 500, "7/10", "x" * 500, "4/10"))
        assert [one.counter for one in graded] == ["judge_cap", None, "judge_cap", None]


# --- the object -----------------------------------------------------------------------------------------------------


def test_settings_that_cannot_work_are_refused_before_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with serving(says) as server:
        for wrong, match in (
            (settings(server.url, api_key_env="JUDGE_KEY"), r"reward\.judge\.api_key_env=JUDGE_KEY"),
            (settings(server.url, low=1.0, high=1.0), r"reward\.low=1\.0"),
            (RewardSettings(kind="judge"), r"reward\.kind=judge: needs a judge"),
        ):
            with pytest.raises(Refusal, match=match):
                build_scorer(wrong)
        for key in ("schlüssel", "sesame\nsesame", "sesame\x01"):
            monkeypatch.setenv("JUDGE_KEY", key)
            rule = "must hold one line of printable ASCII, as every key is, and holds other characters"
            with pytest.raises(Refusal, match=rf"^reward\.judge\.api_key_env=JUDGE_KEY: {rule}\. Fix: ") as caught:
                build_scorer(settings(server.url, api_key_env="JUDGE_KEY"))
            assert key not in str(caught.value)
    assert server.seen == []


def test_a_judge_is_spoken_of_by_the_key_of_its_settings() -> None:
    """That of an evaluation's reward, or of a term of a sum, is not the judge of `reward`."""
    section = "evaluation.reward.terms.1"
    said: list[str] = []

    def refused(error: type[MegarlError], deed: Any) -> None:
        with pytest.raises(error) as caught:
            deed()
        said.append(str(caught.value))

    def build(url: str, **judge: Any) -> Scorer:
        return build_scorer(settings(url, **{"retries": 0, **judge}), section=section)

    with serving(says) as server:
        refused(Refusal, lambda: build(server.url, api_key_env="NO_SUCH_KEY"))
        refused(Refusal, lambda: build(server.url.replace("http:", "https:")))
        refused(Refusal, lambda: build(server.url, **priced(1e-9)))
        scorer = build(server.url)
        server.script = lambda text, times: Say("no idea")
        refused(ScoringStopped, lambda: scorer.grade(numbered(3)))
        for status in (401, 403, 404):
            server.script = lambda text, times, status=status: Status(status, "no")
            refused(ScoringStopped, lambda: scorer.grade(numbered(1)))
        server.script = says
        scorer = build(server.url, retries=1)
        server.script = lambda text, times: Status(429, "later", {"Retry-After": "60"})
        refused(ScoringStopped, lambda: scorer.grade(numbered(1)))
    refused(Refusal, lambda: build(f"http://127.0.0.1:{free_port()}/v1", patience=0.0))
    for sentence in said:
        assert f"{section}.judge." in sentence or f"{section}.max_failed_share" in sentence, sentence
        assert not re.search(r"(?<!evaluation\.)\breward\.(judge|max_failed_share)", sentence), sentence


def test_a_closed_judge_says_so() -> None:
    with serving(says) as server:
        scorer = ready(server)
        assert isinstance(scorer, Judge)
        assert scorer.grade([]) == []
        scorer.close()
        scorer.close()
        with pytest.raises(MegarlError, match="closed"):
            scorer.grade([])


def test_the_runs_random_numbers_are_left_alone() -> None:
    state = random.getstate()
    with serving(first(Status(500, "oops"))) as server:
        ready(server).grade(items("a"))
    assert random.getstate() == state


def test_other_kinds_are_graded_in_processes() -> None:
    scorer = build_scorer(RewardSettings(kind="f1"), replicas=3)
    scorer.begin_step()
    assert scorer.grade([GradingItem("a cat", "the cat")]) == [GradedAnswer(1.0)]
    assert scorer.take_counters() == {}
    scorer.close()
