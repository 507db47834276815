"""Log-probs from a real HTTP server that answers rightly, badly, late or not at all."""

from __future__ import annotations

import re
import time
from typing import Any

import numpy as np
import pytest
import tokenizer_case
from failing_judge import Act, Drop, Hang, JudgeServer, Status, serving
from ports import free_port

from megarl.config.parameter_sets import ServedSet
from megarl.config.servers import LogProbServerSettings
from megarl.data.tokenizer import Tokenizer, load_tokenizer
from megarl.errors import MegarlError, Refusal, ScoringStopped
from megarl.servers.asking import AskingGivenUp
from megarl.servers.log_probs import LogProbServer

LONGEST = 64


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tokenizer_case.train(tmp_path_factory.mktemp("tokenizer")))


def reply(values: list[Any], texts: list[str] | None = None) -> Status:
    logprobs = {"token_logprobs": values, "tokens": texts or ["x"] * len(values), "text_offset": [], "top_logprobs": []}
    choice = {"index": 0, "text": "", "logprobs": logprobs, "finish_reason": "length"}
    body = {"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}
    return Status(200, body)


def of_tokens(text: str) -> list[float | None]:
    """What the server makes of a prompt: of each token but the first a number that its id and place give."""
    tokens = [int(one) for one in text.split()]
    return [None, *(-token - place / 64 for place, token in enumerate(tokens) if place)]


def wanted(tokens: tuple[int, ...]) -> list[float | None]:
    return of_tokens(" ".join(map(str, tokens)))[1:]


def script(tokenizer: Tokenizer, act: Act | None = None, times: int = 10**6, lie: dict[int, str] | None = None) -> Any:
    """Knows the vocabulary, but for what `lie` says; does `act` about sequences, at first so many times."""

    def answer(text: str, before: int) -> Act:
        tokens = [int(one) for one in text.split()]
        if len(tokens) == LONGEST:
            return reply(of_tokens(text), [(lie or {}).get(one, tokenizer.decode([one])) for one in tokens])
        return reply(of_tokens(text)) if act is None or before >= times else act

    return answer


def served(url: str, **server: Any) -> ServedSet:
    defaults: dict[str, Any] = {"url": url, "model": "m", "time_limit": 10.0, "patience": 5.0, "retries": 1}
    settings = LogProbServerSettings.model_validate(defaults | server)
    return ServedSet("teacher", settings, "algorithm.teacher.server")


def ready(tokenizer: Tokenizer, server: JudgeServer, **settings: Any) -> LogProbServer:
    """A teacher that was introduced, with nothing counted yet."""
    teacher = LogProbServer(served(server.url, **settings), tokenizer, LONGEST)
    assert teacher.take_counters() == {"teacher_requests": 1}
    return teacher


def numbered(count: int) -> list[tuple[int, ...]]:
    return [tuple(range(3 + number, 9 + number % 5 + number)) for number in range(count)]


def test_log_probs_are_the_servers_in_order_and_asked_for_several_at_a_time(tokenizer: Tokenizer) -> None:
    def answer(text: str, before: int) -> Act:
        time.sleep(0.05)
        return script(tokenizer)(text, before)

    with serving(answer) as server:
        teacher = ready(tokenizer, server, concurrency=4)
        found = teacher.log_probs(numbered(20))
        assert [one.tolist() for one in found if one is not None] == [wanted(one) for one in numbered(20)]
        assert all(one is not None and one.dtype == np.float32 for one in found)
        assert teacher.take_counters() == {"teacher_requests": 20}
        assert 1 < server.most_in_flight <= 4
        asked = server.seen[-1].body
        assert (asked["echo"], asked["max_tokens"], asked["logprobs"], asked["model"]) == (True, 0, 0, "m")
        assert teacher.log_probs([]) == []


@pytest.mark.parametrize(
    ("act", "seen"),
    [
        (reply([None, -1.0, -2.0]), "3 log-probs of 6 tokens"),
        (reply([None, -1.0, -2.0, None, -1.0, -1.0]), "a log-prob that is no finite number: None"),
        (reply([None, -1.0, -2.0, float("-inf"), -1.0, -1.0]), "a log-prob that is no finite number: -inf"),
        (Status(200, {"choices": [{"text": "7", "logprobs": None}]}), "a reply without log-probs of the prompt"),
        (Status(200, "<html>"), "a reply without log-probs of the prompt: <html>"),
        (Status(400, {"error": {"message": "too long for me"}}), "HTTP 400: too long for me"),
        (Status(500, ""), "HTTP 500"),
    ],
)
def test_what_brings_no_log_probs_is_counted_and_said_once(tokenizer: Tokenizer, act: Act, seen: str) -> None:
    bad = " ".join(map(str, numbered(1)[0]))

    def answer(text: str, before: int) -> Act:
        return act if text == bad else script(tokenizer)(text, before)

    with serving(answer) as server:
        teacher = ready(tokenizer, server)
        found = teacher.log_probs(numbered(6))
        assert found[0] is None and all(one is not None for one in found[1:])
        counters = teacher.take_counters()
        retried = not (isinstance(act, Status) and act.status == 400)
        assert counters == {"teacher_requests": 6 + retried, "teacher_error": 1} | (
            {"teacher_retries": 1} if retried else {}
        )
        said = teacher.take_first_failure() or ""
        assert said.startswith(f"The teacher at {server.url} gave no log-probs of an answer for the first time: {seen}")
        assert teacher.take_first_failure() is None


@pytest.mark.parametrize("act", [Status(500, ""), Status(503, ""), Drop(), reply([None])])
def test_a_failure_that_passes_costs_nothing(tokenizer: Tokenizer, act: Act) -> None:
    with serving(script(tokenizer, act, times=1)) as server:
        teacher = ready(tokenizer, server)
        found = teacher.log_probs(numbered(3))
        assert [one.tolist() for one in found if one is not None] == [wanted(one) for one in numbered(3)]


def test_a_slow_server_is_counted_by_its_time_limit(tokenizer: Tokenizer) -> None:
    slow = " ".join(map(str, numbered(1)[0]))

    def answer(text: str, before: int) -> Act:
        return Hang() if text == slow else script(tokenizer)(text, before)

    with serving(answer) as server:
        teacher = ready(tokenizer, server, time_limit=0.3, retries=0)
        assert teacher.log_probs(numbered(4))[0] is None
        assert teacher.take_counters()["teacher_timeout"] == 1
        assert "no reply within 0.3 s" in (teacher.take_first_failure() or "")


def test_too_many_failures_end_the_run(tokenizer: Tokenizer) -> None:
    with serving(script(tokenizer, reply([None]))) as server:
        teacher = ready(tokenizer, server, retries=0, max_failed_share=0.1)
        with pytest.raises(ScoringStopped) as caught:
            teacher.log_probs([tuple(range(first, first + 6)) for first in range(3, 23)])
    assert str(caught.value) == (
        f"The teacher at {server.url} gave no log-probs of 3 of 20 answers, more than "
        "algorithm.teacher.server.max_failed_share=0.1 allows (first seen: 1 log-probs of 6 tokens). Fix: see the "
        "teacher's own log, and whether its context holds the run's longest sequence, then resume the run."
    )


def test_a_server_that_goes_away_and_stays_away_ends_the_run(tokenizer: Tokenizer) -> None:
    said: list[str] = []
    with serving(script(tokenizer)) as server:
        teacher = LogProbServer(served(server.url, patience=1.0), tokenizer, LONGEST, said.append)
        server.stop()
        with pytest.raises(ScoringStopped, match=r"The teacher at .* gave no answer for 1 s, past algorithm\.teacher"):
            teacher.log_probs(numbered(3))
    assert said and said[0].startswith(f"waiting for the teacher at {server.url}")


def test_a_run_that_has_to_stop_does_not_wait(tokenizer: Tokenizer) -> None:
    with serving(script(tokenizer, Hang())) as server:
        teacher = ready(tokenizer, server, time_limit=60.0)
        began = time.monotonic()
        with pytest.raises(AskingGivenUp):
            teacher.log_probs(numbered(3), lambda: time.monotonic() > began + 0.5)
        assert time.monotonic() - began < 10


REFUSED = "algorithm.teacher.server"


def test_a_server_that_is_not_there_is_refused(tokenizer: Tokenizer) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(Refusal, match=rf"{REFUSED}\.url={re.escape(url)}: no teacher answers there for 0 s"):
        LogProbServer(served(url, patience=0.0), tokenizer, LONGEST)


@pytest.mark.parametrize(
    ("act", "rule"),
    [
        (Status(200, {"choices": [{"text": "7"}]}), "answers the first request with a reply without log-probs"),
        (Status(404, {"error": {"message": "no such model"}}), r"HTTP 404: no such model. Fix: correct .*\.model=m"),
        (Status(400, {"error": {"message": "Token id 319 is out of vocabulary"}}), "Token id 319 is out of vocabulary"),
        (reply([None, -1.0]), "2 log-probs of 64 tokens"),
    ],
)
def test_a_server_of_no_use_is_refused(tokenizer: Tokenizer, act: Act, rule: str) -> None:
    with serving(lambda text, times: act) as server, pytest.raises(Refusal, match=rule):
        LogProbServer(served(server.url), tokenizer, LONGEST)


def test_a_model_of_another_vocabulary_is_refused(tokenizer: Tokenizer) -> None:
    token = tokenizer.vocab_size - 1
    lie = {token: "another"}
    with serving(script(tokenizer, lie=lie)) as server, pytest.raises(MegarlError) as caught:
        LogProbServer(served(server.url), tokenizer, LONGEST)
    own = tokenizer.decode([token]).strip()
    assert str(caught.value) == (
        f"algorithm.teacher.server.model=m: must have this run's tokenizer, but token {token} is 'another' there and "
        f"{own!r} here. Fix: serve a teacher of the same vocabulary."
    )


def test_a_key_that_is_not_set_is_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(Refusal, match="must name an environment variable that holds the teacher's key"):
        LogProbServer(served("http://127.0.0.1:1/v1", api_key_env="TEACHER_KEY"), tokenizer, LONGEST)
