"""What the rewards see of an output, what it gets for them, and what is counted on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tokenizer_case import load_all

from megarl.config.rewards import RewardSettings
from megarl.data.thinking import ThinkingEnd
from megarl.data.tokenizer import Tokenizer
from megarl.environments.base import Verdict
from megarl.errors import ScoringStopped
from megarl.records import FinishReason, Prompt, Stretch
from megarl.rewards.answers import GradedAnswer, GradingItem
from megarl.rewards.scorer import Part, Scorer, Scoring, build_scorer, build_scoring
from megarl.rollout.engine import Completion
from megarl.rollout.play import Played
from megarl.train.outputs import Output
from megarl.train.scoring import Graded, Grading, term_means

LOW, HIGH = -1.0, 2.0
#: One in which the marker is a token, one that spells it with several.
KINDS = ["sentencepiece", "byte_level"]
THINKING = "so \\boxed{7}</think>"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return load_all(tmp_path_factory.mktemp("tokenizers"))


class Opinions:
    """A scorer that remembers what it saw: no reward for texts with a question mark, else a tenth of their digit."""

    def __init__(self) -> None:
        self.seen: list[GradingItem] = []

    def grade(self, items: Sequence[GradingItem]) -> list[GradedAnswer]:
        self.seen += items
        return [self._opinion(item.text) for item in items]

    def _opinion(self, text: str) -> GradedAnswer:
        if "?" in text:
            return GradedAnswer(None, "judge_unreadable")
        return GradedAnswer(int(text[-1]) / 10, "grader_error" if text[-1] == "0" else None)

    def begin_step(self) -> None:
        """Nothing is bounded."""

    def take_counters(self) -> dict[str, int]:
        return {}

    def take_first_failure(self) -> str | None:
        return None

    def close(self) -> None:
        """Nothing to end."""


class Away(Opinions):
    """A scorer that cannot be asked any more."""

    def grade(self, items: Sequence[GradingItem]) -> list[GradedAnswer]:
        raise ScoringStopped("The judge is away.")


def grading_of(scoring: Scoring, tokenizer: Tokenizer, splits: bool) -> Grading:
    return Grading(scoring, tokenizer, ThinkingEnd(tokenizer), splits_thinking=splits)


def settings_of(**changes: Any) -> RewardSettings:
    return RewardSettings.model_validate({"kind": "boxed", "low": LOW, "high": HIGH} | changes)


def completion(tokenizer: Tokenizer, *texts: str, reason: FinishReason = "stop", index: int = 0) -> Completion:
    """Of the texts one behind the other, no token being of two of them; with the end token where it was not cut."""
    ids = [token_id for text in texts for token_id in tokenizer.encode(text)]
    ids += [tokenizer.eos_token_id] * (reason == "stop")
    return Completion(index, tuple(ids), (-0.5,) * len(ids), reason)


def in_two_parts(tokenizer: Tokenizer, thinking: str, responses: Sequence[Completion]) -> Output:
    """`responses` to one `thinking`; the first stands behind it in the whole."""
    before = tuple(tokenizer.encode(thinking))
    first = responses[0]
    whole = Completion(0, before + first.token_ids, (-0.5,) * len(before) + first.log_probs, first.finish_reason)
    return Output(whole, tuple(responses))


def alone(scorer: Scorer, settings: RewardSettings) -> Scoring:
    return Scoring([Part(settings, scorer)], settings.bounds)


def graded_by(
    scorer: Scorer, tokenizer: Tokenizer, output: Output, answer: str, settings: RewardSettings, splits: bool
) -> Graded:
    prompt = Prompt(0, (1,), "question", answer)
    return grading_of(alone(scorer, settings), tokenizer, splits).grade([prompt], [output])[0]


def graded_as_boxed(
    tokenizer: Tokenizer, output: Output, answer: str, settings: RewardSettings, splits: bool = False
) -> Graded:
    scorer = build_scorer(settings)
    found = graded_by(scorer, tokenizer, output, answer, settings, splits)
    scorer.close()
    return found


# Outputs that are not one thinking and a response

MALFORMED = [
    (("it is \\boxed{4}",), "thinking_missing"),
    (("so", "</think>", "\\boxed{4}", "</think>", "\\boxed{4}"), "thinking_repeated"),
    (("</think>", "\\boxed{4}"), "thinking_empty"),
    (("<think>", " \n", "</think>", "\\boxed{4}"), "thinking_empty"),
    (("so \\boxed{4}", "</think>"), "thinking_unanswered"),
    (("so \\boxed{4}", "</think>", " \n"), "thinking_unanswered"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("texts", "counter"), MALFORMED)
@pytest.mark.parametrize(
    ("graded", "thinking"), [("response", False), ("whole", True), ("response", True)], ids=["seen", "needed", "both"]
)
def test_the_malformed_get_the_floor_and_are_counted(
    tokenizers: dict[str, Tokenizer], kind: str, texts: tuple[str, ...], counter: str, graded: str, thinking: bool
) -> None:
    tokenizer, settings = tokenizers[kind], settings_of(graded=graded)
    output = Output(completion(tokenizer, *texts))
    found = graded_as_boxed(tokenizer, output, "4", settings, thinking)
    assert found == Graded(tokenizer.decode(output.completion.token_ids), LOW, None, {counter: 1})
    # The answer is right, and nobody is asked about it.
    scorer = Opinions()
    graded_by(scorer, tokenizer, output, "4", settings, thinking)
    assert scorer.seen == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("texts", "counter"), MALFORMED)
def test_where_nobody_asks_for_thinking_all_is_graded(
    tokenizers: dict[str, Tokenizer], kind: str, texts: tuple[str, ...], counter: str
) -> None:
    tokenizer = tokenizers[kind]
    found = graded_as_boxed(tokenizer, Output(completion(tokenizer, *texts)), "4", settings_of())
    assert (found.reward, found.thinking_length, found.counters) == (HIGH, None, {})


# What the reward sees


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("graded", "response", "answer", "reward"),
    [
        ("response", "\\boxed{4}", "4", HIGH),
        ("response", "\\boxed{4}", "7", LOW),
        # An answer that stands in the thinking alone.
        ("response", "as above", "7", LOW),
        ("whole", "as above", "7", HIGH),
        ("whole", "\\boxed{4}", "4", HIGH),
        ("whole", "\\boxed{4}", "7", LOW),
    ],
)
@pytest.mark.parametrize("thinking", [False, True], ids=["unneeded", "needed"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_response_alone_or_all(
    tokenizers: dict[str, Tokenizer],
    kind: str,
    graded: str,
    response: str,
    answer: str,
    reward: float,
    thinking: bool,
    parts: int,
) -> None:
    """Of an output in two parts the reward is always the response's."""
    tokenizer, settings, splits = tokenizers[kind], settings_of(graded=graded), thinking

    def output(text: str) -> Output:
        if parts == 1:
            return Output(completion(tokenizer, THINKING, text))
        return in_two_parts(tokenizer, THINKING, [completion(tokenizer, text)])

    sees_all = graded == "whole" and parts == 1
    if response == "as above" and not sees_all:
        reward = LOW
    found = graded_as_boxed(tokenizer, output(response), answer, settings, splits)
    assert (found.text, found.reward, found.counters) == (THINKING + response, reward, {})
    separated = thinking or graded == "response"
    assert found.thinking_length == (len(tokenizer.encode(THINKING)) if separated else None)
    scorer = Opinions()
    graded_by(scorer, tokenizer, output("3"), answer, settings, splits)
    assert scorer.seen == [GradingItem(f"{THINKING}3" if sees_all else "3", answer, question="question")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("truncated", "reason", "reward"),
    [("zero", "length", LOW), ("zero", "stop", HIGH), ("score", "length", HIGH), ("score", "stop", HIGH)],
)
@pytest.mark.parametrize("graded", ["whole", "response"])
def test_truncated_zero(
    tokenizers: dict[str, Tokenizer], kind: str, truncated: str, reason: FinishReason, reward: float, graded: str
) -> None:
    tokenizer, settings = tokenizers[kind], settings_of(truncated=truncated, graded=graded)
    output = Output(completion(tokenizer, THINKING, "\\boxed{4}", reason=reason))
    found = graded_as_boxed(tokenizer, output, "4", settings)
    assert (found.reward, found.counters) == (reward, {})
    # It is one thinking and a response all the same.
    assert (found.thinking_length is None) == (graded == "whole")


def test_of_several_responses_each_is_cut_for_itself(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, settings = tokenizers["sentencepiece"], settings_of(truncated="zero")
    whole, cut = (completion(tokenizer, "\\boxed{4}", reason=reason) for reason in ("stop", "length"))
    for responses in ([whole, cut], [cut, whole]):
        output = in_two_parts(tokenizer, THINKING, responses)
        assert graded_as_boxed(tokenizer, output, "4", settings).reward == (LOW + HIGH) / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("last", "behind", "reward"),
    [(None, 100, HIGH), (100, 91, HIGH), (100, 92, LOW), (100, 0, HIGH), (9, 0, HIGH), (8, 0, LOW)],
)
def test_last_characters(
    tokenizers: dict[str, Tokenizer], kind: str, last: int | None, behind: int, reward: float
) -> None:
    r"""\boxed{4} is nine characters: of more than 91 others behind it, the last hundred do not hold it."""
    tokenizer, settings = tokenizers[kind], settings_of(last_characters=last)
    output = Output(completion(tokenizer, "so \\boxed{4}" + "x" * behind))
    found = graded_as_boxed(tokenizer, output, "4", settings)
    assert (found.reward, found.text) == (reward, "so \\boxed{4}" + "x" * behind)


# Several responses to a thinking

RIGHT, WRONG = "\\boxed{4}", "\\boxed{5}"
TWO_PARTS = True


@pytest.mark.parametrize("kind", ["sentencepiece", "hugging_face"])
@pytest.mark.parametrize(
    ("responses", "share"),
    [
        ((RIGHT, RIGHT), 1.0),
        ((WRONG, WRONG), 0.0),
        ((RIGHT, WRONG), 0.5),
        ((WRONG, RIGHT), 0.5),
        ((WRONG, RIGHT, RIGHT, RIGHT), 0.75),
    ],
)
@pytest.mark.parametrize("graded", ["whole", "response"])
def test_the_reward_is_the_mean_over_the_responses(
    tokenizers: dict[str, Tokenizer], kind: str, responses: tuple[str, ...], share: float, graded: str
) -> None:
    tokenizer = tokenizers[kind]
    output = in_two_parts(tokenizer, THINKING, [completion(tokenizer, response) for response in responses])
    found = graded_as_boxed(tokenizer, output, "4", settings_of(graded=graded), TWO_PARTS)
    expected = Graded(THINKING + responses[0], LOW + share * (HIGH - LOW), len(tokenizer.encode(THINKING)))
    assert found == expected


@pytest.mark.parametrize(
    ("responses", "share", "counters"),
    [
        ((RIGHT, " \n"), 0.5, {"thinking_unanswered": 1}),
        (("", RIGHT), 0.5, {"thinking_unanswered": 1}),
        (("4</think>" + RIGHT, RIGHT), 0.5, {"thinking_repeated": 1}),
        ((RIGHT, RIGHT + "</think>"), 0.5, {"thinking_repeated": 1}),
        ((WRONG, ""), 0.0, {"thinking_unanswered": 1}),
        (("", "4</think>" + RIGHT), 0.0, {"thinking_unanswered": 1, "thinking_repeated": 1}),
        (("", ""), 0.0, {"thinking_unanswered": 2}),
    ],
)
def test_a_malformed_response_costs_its_own_reward_and_not_the_thinking(
    tokenizers: dict[str, Tokenizer], responses: tuple[str, ...], share: float, counters: dict[str, int]
) -> None:
    tokenizer = tokenizers["sentencepiece"]
    output = in_two_parts(tokenizer, THINKING, [completion(tokenizer, response) for response in responses])
    found = graded_as_boxed(tokenizer, output, "4", settings_of(graded="response"), TWO_PARTS)
    assert (found.reward, found.counters) == (LOW + share * (HIGH - LOW), counters)
    assert found.thinking_length == len(tokenizer.encode(THINKING))


def test_a_malformed_thinking_is_not_to_be_trained_on(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, settings = tokenizers["sentencepiece"], settings_of(graded="response")
    empty = in_two_parts(tokenizer, "<think></think>", [completion(tokenizer, RIGHT)] * 2)
    found = graded_as_boxed(tokenizer, empty, "4", settings, TWO_PARTS)
    assert (found.reward, found.thinking_length, found.counters) == (LOW, None, {"thinking_empty": 2})
    # One that did not end has no responses.
    endless = Output(completion(tokenizer, RIGHT, reason="length"))
    found = graded_as_boxed(tokenizer, endless, "4", settings, TWO_PARTS)
    assert (found.reward, found.thinking_length, found.counters) == (LOW, None, {"thinking_missing": 1})


# Rewards that nobody could find


@pytest.mark.parametrize(
    ("responses", "reward", "counters"),
    [
        (("4", "8"), 0.6, {}),
        (("4?", "8"), None, {"judge_unreadable": 1}),
        (("8", "4?"), None, {"judge_unreadable": 1}),
        (("4?", "8?"), None, {"judge_unreadable": 2}),
        (("4?", ""), None, {"judge_unreadable": 1, "thinking_unanswered": 1}),
        (("0", "8"), 0.4, {"grader_error": 1}),
    ],
)
def test_one_unknown_reward_leaves_the_mean_unknown(
    tokenizers: dict[str, Tokenizer], responses: tuple[str, ...], reward: float | None, counters: dict[str, int]
) -> None:
    tokenizer = tokenizers["sentencepiece"]
    output = in_two_parts(tokenizer, THINKING, [completion(tokenizer, response) for response in responses])
    found = graded_by(Opinions(), tokenizer, output, "4", settings_of(graded="response"), TWO_PARTS)
    assert found.reward == pytest.approx(reward)
    assert found.counters == counters


def test_every_output_gets_its_own_reward_and_prompt(tokenizers: dict[str, Tokenizer]) -> None:
    """Also where some of them are not asked about."""
    tokenizer, scorer = tokenizers["sentencepiece"], Opinions()
    texts = [("so</think>1",), ("2",), ("so</think>3?",), ("so</think>4</think>4",), ("so</think>5",)]
    outputs = [Output(completion(tokenizer, *one, index=10 - number)) for number, one in enumerate(texts)]
    prompts = [Prompt(number, (1,), f"question {number}", str(number)) for number in range(5)]
    found = grading_of(alone(scorer, settings_of(graded="response")), tokenizer, False).grade(prompts, outputs)
    assert [one.reward for one in found] == [0.1, LOW, None, LOW, 0.5]
    assert [one.counters for one in found] == [
        {},
        {"thinking_missing": 1},
        {"judge_unreadable": 1},
        {"thinking_repeated": 1},
        {},
    ]
    assert [(item.text, item.answer, item.question) for item in scorer.seen] == [
        ("1", "0", "question 0"),
        ("3?", "2", "question 2"),
        ("5", "4", "question 4"),
    ]


def test_a_scorer_that_is_away_stops_the_grading(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["sentencepiece"]
    with pytest.raises(ScoringStopped, match="away"):
        graded_by(Away(), tokenizer, Output(completion(tokenizer, "4")), "4", settings_of(), False)


# Several rewards that add up


def test_a_sum_finds_each_term_by_its_own_settings(tokenizers: dict[str, Tokenizer]) -> None:
    """Totals by hand: 1 for the box in the response, half for the last character, a penalty for any box."""
    tokenizer = tokenizers["sentencepiece"]
    terms = [
        {"name": "right", "kind": "boxed", "graded": "response"},
        {"name": "words", "kind": "f1", "weight": 0.5, "low": -1.0, "graded": "response", "last_characters": 1},
        {"name": "leak", "kind": "boxed", "weight": -0.1, "high": 2.0},
    ]
    settings = RewardSettings.model_validate({"kind": "sum", "terms": terms})
    assert settings.bounds == pytest.approx((-0.5 - 0.2, 1.0 + 0.5))
    scoring = build_scoring(settings)
    texts = [("so \\boxed{4}", "</think>", "4"), ("so", "</think>", "\\boxed{4}"), ("\\boxed{4}",)]
    outputs = [Output(completion(tokenizer, *one, index=number)) for number, one in enumerate(texts)]
    prompts = [Prompt(number, (1,), "question", "4") for number in range(3)]
    found = grading_of(scoring, tokenizer, False).grade(prompts, outputs)
    assert [one.terms for one in found] == [
        {"right": 0.0, "words": 1.0, "leak": 0.0},
        {"right": 1.0, "words": -1.0, "leak": 2.0},
        {"right": 0.0, "words": -1.0, "leak": 2.0},
    ]
    assert [one.reward for one in found] == pytest.approx([0.5, 0.3, -0.7])
    # One output that two terms find malformed is one.
    assert [one.counters for one in found] == [{}, {}, {"thinking_missing": 1}]
    assert [one.thinking_length is None for one in found] == [False, False, True]
    assert term_means(one.terms for one in found) == pytest.approx({"right": 1 / 3, "words": -1 / 3, "leak": 4 / 3})


def test_a_sum_is_not_known_where_a_term_is_not(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, settings = tokenizers["sentencepiece"], settings_of()
    scoring = Scoring([Part(settings, Opinions(), "a", 2.0), Part(settings, Opinions(), "b")], (-10.0, 10.0))
    outputs = [Output(completion(tokenizer, text, index=number)) for number, text in enumerate(("4", "4?"))]
    prompts = [Prompt(number, (1,), "question", "4") for number in range(2)]
    found = grading_of(scoring, tokenizer, False).grade(prompts, outputs)
    assert [one.reward for one in found] == [pytest.approx(1.2), None]
    assert found[1].counters == {"judge_unreadable": 1}
    assert term_means(one.terms for one in found) == {"a": 0.4, "b": 0.4}


# Samples of several turns


def played(tokenizer: Tokenizer, *turns: str, reason: FinishReason = "stop", **changes: Any) -> Output:
    """The policy's turns and the environment's observations, by turns; the last turn has the end token."""
    tokens: list[int] = []
    stretches: list[Stretch] = []
    for number, text in enumerate(turns):
        ids = tokenizer.encode(text) + [tokenizer.eos_token_id] * (number == len(turns) - 1 and reason == "stop")
        start = len(tokens)
        tokens += ids
        stretches.append(Stretch(start, len(tokens), "environment" if number % 2 else "policy", 0))
    values: dict[str, Any] = {"reward": None, "verdict": None, "failure": None, "counters": {"calls": 1}} | changes
    one = Played(0, (1,), tuple(tokens), (-0.5,) * len(tokens), tuple(stretches), reason, **values)
    whole = Completion(0, one.token_ids, one.log_probs, reason)
    return Output(whole, stretches=one.stretches, turns=one.turns, played=one)


RESULT = "<result>\\boxed{4}</result>"
TURNS = [
    # What the environment says is no answer of the policy's.
    ({}, ("so <tool>2+2</tool>", RESULT, "I cannot say"), LOW, {"calls": 1}),
    ({}, ("so <tool>2+2</tool>", RESULT, "it is \\boxed{4}"), HIGH, {"calls": 1}),
    ({}, ("it is \\boxed{4}", "sure?", "no"), LOW, {"calls": 1}),
    # The thinking goes over several turns, or ended in an earlier one, or every turn has its own.
    ({"graded": "response"}, ("so <tool>2+2</tool>", RESULT, "</think>\\boxed{4}"), HIGH, {"calls": 1}),
    ({"graded": "response"}, ("so</think><tool>2+2</tool>", RESULT, "\\boxed{4}"), HIGH, {"calls": 1}),
    ({"graded": "response"}, ("a</think>\\boxed{5}", "no", "b</think>\\boxed{4}"), HIGH, {"calls": 1}),
    ({"graded": "response"}, ("a \\boxed{4}", "no", "b \\boxed{4}"), LOW, {"calls": 1, "thinking_missing": 1}),
    (
        {"graded": "response"},
        ("a</think>\\boxed{4}", "no", "</think>\\boxed{4}"),
        LOW,
        {"calls": 1, "thinking_empty": 1},
    ),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("changes", "turns", "reward", "counters"), TURNS)
def test_of_several_turns_the_policys_last_is_graded(
    tokenizers: dict[str, Tokenizer],
    kind: str,
    changes: dict[str, Any],
    turns: tuple[str, ...],
    reward: float,
    counters: dict[str, int],
) -> None:
    tokenizer = tokenizers[kind]
    graded = graded_as_boxed(tokenizer, played(tokenizer, *turns), "4", settings_of(**changes))
    assert (graded.reward, graded.counters) == (reward, counters)


def test_an_environments_reward_is_not_graded_again_and_keeps_the_bounds(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, settings, scorer = tokenizers[KINDS[0]], settings_of(), Away()
    middle, bounded = (LOW + HIGH) / 2, {"calls": 1, "environment_reward_bounded": 1}
    for given, reward, counters in (
        (middle, middle, {"calls": 1}),
        (LOW - 0.5, LOW, bounded),
        (HIGH + 0.5, HIGH, bounded),
    ):
        graded = graded_by(scorer, tokenizer, played(tokenizer, "a \\boxed{4}", reward=given), "4", settings, False)
        assert (graded.reward, graded.counters) == (reward, counters)


def test_a_verdict_that_was_told_is_not_found_again(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, prompt = tokenizers[KINDS[0]], Prompt(0, (1,), "question", "4")
    scoring = Scoring([Part(settings_of(), Away(), "a"), Part(settings_of(), Away(), "b", 2.0)], (3 * LOW, 3 * HIGH))
    found = Verdict(0.5, {"grader_timeout": 1}, {"a": 0.1, "b": 0.2})
    for verdict in (found, Verdict(None, {}, {"a": 0.1, "b": None})):
        output = played(tokenizer, "a", "no", "b \\boxed{4}", verdict=verdict)
        (graded,) = grading_of(scoring, tokenizer, False).grade([prompt], [output])
        assert (graded.reward, graded.terms, graded.counters) == (verdict.reward, verdict.terms, {"calls": 1})


#: By the settings `truncated` of two terms: an environment's reward of a sample that was cut.
CUT = [
    (("zero", "zero"), 3 * LOW),
    (("score", "zero"), HIGH),
    (("score", "score"), HIGH),
]


@pytest.mark.parametrize(("truncated", "reward"), CUT)
def test_truncated_zero_holds_whoever_gave_the_reward(
    tokenizers: dict[str, Tokenizer], truncated: tuple[str, str], reward: float
) -> None:
    tokenizer, prompt = tokenizers[KINDS[0]], Prompt(0, (1,), "question", "4")
    parts = [
        Part(settings_of(truncated=one), Away(), name, weight)
        for one, name, weight in zip(truncated, "ab", (1.0, 2.0), strict=True)
    ]
    scoring = Scoring(parts, (3 * LOW, 3 * HIGH))
    ends: tuple[tuple[FinishReason, float], ...] = (("length", reward), ("stop", HIGH))
    for reason, expected in ends:
        output = played(tokenizer, "a \\boxed{4}", reason=reason, reward=HIGH)
        (graded,) = grading_of(scoring, tokenizer, False).grade([prompt], [output])
        assert (graded.reward, graded.counters) == (pytest.approx(expected), {"calls": 1})


def test_a_verdict_of_a_turn_that_a_bound_cut_the_sample_behind(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[KINDS[0]]
    output = played(tokenizer, "a \\boxed{4}", reason="length", verdict=Verdict(HIGH))
    for truncated, reward in (("score", HIGH), ("zero", LOW)):
        scorer = Opinions()
        graded = graded_by(scorer, tokenizer, output, "4", settings_of(truncated=truncated), False)
        assert graded.reward == reward and not scorer.seen
    # Of a sum the terms that look at what was cut keep what they gave, and nobody is asked again.
    parts = [Part(settings_of(truncated="zero"), Away(), "a"), Part(settings_of(), Away(), "b", 2.0)]
    scoring, prompt = Scoring(parts, (3 * LOW, 3 * HIGH)), Prompt(0, (1,), "question", "4")
    counters = {"thinking_missing": 1}
    verdict = Verdict(HIGH, counters, {"a": HIGH, "b": HIGH / 4})
    cut = played(tokenizer, "a \\boxed{4}", reason="length", verdict=verdict, counters=counters)
    (graded,) = grading_of(scoring, tokenizer, False).grade([prompt], [cut])
    assert graded.reward == pytest.approx(LOW + HIGH / 2) and graded.terms == {"a": LOW, "b": HIGH / 4}
    assert graded.counters == counters


def test_a_sample_whose_environment_failed_gets_the_floor_though_it_has_no_token(
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer, counters = tokenizers[KINDS[0]], {"environment_raised": 1}
    nothing = played(tokenizer, failure="environment_raised", counters=counters)
    something = played(tokenizer, "a \\boxed{4}", failure="environment_raised", counters=counters)
    for output in (nothing, something):
        graded = graded_by(Away(), tokenizer, output, "4", settings_of(), False)
        assert (graded.reward, graded.counters) == (LOW, counters)
    assert (nothing.tokens_made, something.tokens_made) == (0, len(something.completion.token_ids))


def test_tokens_of_the_environment_were_not_made_by_the_engine(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[KINDS[0]]
    output = played(tokenizer, "so", RESULT, "yes")
    assert output.tokens_made == len(tokenizer.encode("so")) + len(tokenizer.encode("yes")) + 1
