"""What an environment hears and says, in tokens."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizer_case import byte_level

from megarl.config.environments import EnvironmentSettings
from megarl.data.chat_template import TemplateRefusal
from megarl.data.continuation import continuation_ids
from megarl.data.tokenizer import Tokenizer, load_tokenizer
from megarl.environments import host as hosts
from megarl.environments.base import Heard, Verdict
from megarl.errors import ScoringStopped
from megarl.records import Prompt

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VERDICTS = {"4": Verdict(1.0), "5": Verdict(0.0), "": Verdict(None, {"judge_unreadable": 1})}
TALK = [{"role": "user", "content": "try again"}]


@pytest.fixture(autouse=True)
def found_by_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def tokenizer(folder: Path, template: str | None = CHAT) -> Tokenizer:
    byte_level(folder, ("<|im_start|>", "<|im_end|>", "</tool>"))
    if template is not None:
        file = folder / "tokenizer_config.json"
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"chat_template": template, "eos_token": "<|im_end|>"})
        )
    return load_tokenizer(folder)


def test_messages_follow_what_was_written_as_in_one_conversation(tmp_path: Path):
    chat = tokenizer(tmp_path)
    question = [{"role": "user", "content": "1+1?"}]
    written = chat.encode("it is 3")
    ends = chat.eos_token_id
    whole = chat.apply_chat([*question, {"role": "assistant", "content": "it is 3"}, *TALK])
    # An answer that ended by itself, and one that was cut.
    assert [*chat.apply_chat(question), *written, ends, *continuation_ids(chat, TALK, ends)] == whole
    assert [*chat.apply_chat(question), *written, *continuation_ids(chat, TALK, written[-1])] == whole


def test_messages_without_a_template_stand_between_blank_lines(tmp_path: Path):
    plain = tokenizer(tmp_path, None)
    assert plain.decode(continuation_ids(plain, TALK, 5)) == "\n\ntry again\n\n"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (CHAT.replace("m.content", "m.content if m.role == 'user' else ''"), "leaves out what the assistant has said"),
        ("{{ raise_exception('roles must alternate') }}", "cannot render a prompt (roles must alternate)"),
    ],
)
def test_a_template_that_cannot_continue_is_named(tmp_path: Path, template: str, why: str):
    with pytest.raises(TemplateRefusal) as refused:
        continuation_ids(tokenizer(tmp_path, template), TALK, 5)
    assert why in str(refused.value)


def heard(host: hosts.Host) -> Heard:
    """The only thing that is heard next."""
    (found,) = all_heard(host, 1)
    return found


def all_heard(host: hosts.Host, number: int) -> list[Heard]:
    found: list[Heard] = []
    until = time.monotonic() + 30
    while len(found) < number and time.monotonic() < until:
        found += host.poll(0.1)
    return found


def test_calls_of_the_calculator_are_answered_in_tokens(tmp_path: Path):
    chat = tokenizer(tmp_path)
    host = hosts.build(EnvironmentSettings(kind="calculator"), chat)
    try:
        # Though decoding leaves this control token out.
        assert host.stop_token_ids == tuple(chat.encode("</tool>"))
        host.start(3, Prompt(0, (5,), "", ""), seed=1)
        assert heard(host) == Heard(3)
        host.turn(3, tuple(chat.encode("so <tool>12*34</tool>")), "stop")
        assert heard(host) == Heard(3, tuple(chat.encode("<result>408</result>")), None, {"calculator_calls": 1})
        host.turn(3, tuple(chat.encode("so <tool>12*34")), "length")
        error = "<result>error: the call is not closed with </tool></result>"
        assert heard(host) == Heard(3, tuple(chat.encode(error)), None, {"calculator_errors": 1})
        host.turn(3, tuple(chat.encode("408")), "stop")
        assert heard(host) == Heard(3)
    finally:
        host.close()


def test_an_environment_may_ask_something_of_its_own(tmp_path: Path):
    chat = tokenizer(tmp_path / "chat")
    settings = EnvironmentSettings(kind="environment_cases:Closes", arguments={"file": str(tmp_path / "closed")})
    host = hosts.build(settings, chat)
    try:
        host.start(0, Prompt(0, (5,), "2+2=", ""), seed=1)
        assert heard(host).token_ids == tuple(chat.apply_chat([{"role": "user", "content": "again: 2+2="}]))
        host.turn(0, (5, 6), "stop")
        again = tuple(continuation_ids(chat, [{"role": "user", "content": "and?"}], 6))
        assert heard(host) == Heard(0, again)
        host.end(0)
    finally:
        host.close()


def test_what_no_tokenizer_knows_is_a_bad_reply(tmp_path: Path):
    raising = tokenizer(tmp_path / "chat", "{{ raise_exception('no roles') }}")
    settings = EnvironmentSettings(kind="environment_cases:Closes", arguments={"file": str(tmp_path / "closed")})
    host = hosts.build(settings, raising)
    try:
        host.start(0, Prompt(0, (5,), "2+2=", ""), seed=1)
        assert heard(host) == Heard(0, failure="environment_bad_reply")
        said = host.take_first_failure()
        assert said is not None and "gave what cannot be put into tokens: " in said and "(no roles)" in said
    finally:
        host.close()


def test_verdicts_are_found_while_others_go_on(tmp_path: Path):
    graded: list[int] = []

    def grade(said: Any) -> list[Verdict]:
        time.sleep(0.3)
        graded.append(len(said))
        return [VERDICTS[one.prompt.answer] for one in said]

    host = hosts.build(EnvironmentSettings(kind="retry"), tokenizer(tmp_path), None, grade)
    try:
        for index, answer in enumerate(("4", "5", "")):
            host.start(index, Prompt(index, (5,), "", answer), seed=1)
            heard(host)
        began = time.monotonic()
        for index in range(3):
            host.turn(index, (5, 6), "stop")
        assert host.poll() == [] and time.monotonic() - began < 0.25
        found = {one.index: one for one in all_heard(host, 3)}
        assert found[0] == Heard(0, None, 1.0, {"retry_right": 1}, verdict=VERDICTS["4"])
        assert found[1].reward == 0.0 and found[1].token_ids
        counters = {"retry_without_verdict": 1, "judge_unreadable": 1}
        assert found[2] == Heard(2, None, None, counters, verdict=VERDICTS[""])
        assert sum(graded) == 3 and len(graded) <= 2  # those that had come by then together
    finally:
        host.close()


def test_waiting_for_verdicts_takes_no_processor_time(tmp_path: Path):
    def grade(said: Any) -> list[Verdict]:
        time.sleep(0.7)
        return [Verdict(1.0)] * len(said)

    host = hosts.build(EnvironmentSettings(kind="retry"), tokenizer(tmp_path), None, grade)
    try:
        for index in range(2):
            host.start(index, Prompt(index, (5,), "", "4"), seed=1)
        all_heard(host, 2)
        host.turn(0, (5, 6), "stop")
        began, used, found, polls = time.monotonic(), time.thread_time(), [], 0
        while not found and time.monotonic() < began + 30:
            found = host.poll(0.05)
            polls += 1
        assert found == [Heard(0, None, 1.0, {"retry_right": 1}, verdict=Verdict(1.0))]
        assert time.monotonic() - began > 0.6  # in which a loop that spins takes all the time there is
        assert time.thread_time() - used < 0.2 and polls <= 2 + (time.monotonic() - began) / 0.05
    finally:
        host.close()


def test_a_turn_is_graded_after_those_before_it_and_counts_though_its_sample_fails(tmp_path: Path):
    graded: list[Any] = []

    def grade(said: Any) -> list[Verdict]:
        graded.extend(said)
        return [Verdict(0.5, {"grader_timeout": 1}, {"a": 0.5})] * len(said)

    host = hosts.build(EnvironmentSettings(kind="environment_cases:Told"), tokenizer(tmp_path), None, grade)
    told = Verdict(0.5, {"grader_timeout": 1}, {"a": 0.5})
    try:
        for index, deed in enumerate(("nothing", "raises")):
            prompt = Prompt(index, (5,), "", deed)
            host.start(index, prompt, seed=1)
            heard(host)
            host.turn(index, (5, 6), "stop")
            first = heard(host)
            assert (first.reward, first.counters, first.verdict) == (0.25, {"told": 1, "grader_timeout": 1}, told)
            host.turn(index, (7,), "length")
            assert graded[-1] == (prompt, ((5, 6),), "stop")
            last = heard(host)
            assert graded[-1] == (prompt, ((5, 6), (7,)), "length")
            if deed == "raises":
                assert last == Heard(index, counters={"grader_timeout": 1}, failure="environment_raised")
            else:
                assert last == Heard(index, None, None, {"told": 1, "grader_timeout": 1}, verdict=told)
            host.end(index)
    finally:
        host.close()


def test_verdicts_that_cannot_be_found_stop_the_run(tmp_path: Path):
    def grade(said: Any) -> list[Verdict]:
        raise ScoringStopped("the judge is away")

    host = hosts.build(EnvironmentSettings(kind="retry"), tokenizer(tmp_path), None, grade)
    try:
        host.start(0, Prompt(0, (5,), "", "4"), seed=1)
        heard(host)
        host.turn(0, (5, 6), "stop")
        with pytest.raises(ScoringStopped, match="the judge is away"):
            heard(host)
    finally:
        host.close()
