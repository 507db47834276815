"""Explanations: the question that shows its answer, the chain cut out of what comes back, and no hint in training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from group_case import group_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizer_case import KINDS, Characters, byte_ids, choose, load_all

from megarl.algorithms.base import AlgorithmContext
from megarl.algorithms.explanations import Explanations, cut_chain, hinted_prompt_ids, training_tokens
from megarl.config.algorithms import ExplanationSettings
from megarl.config.data import DataSettings
from megarl.data.dataset import question_ids
from megarl.data.tokenizer import Tokenizer, response_ids
from megarl.records import Body, Prompt, Trajectory

BOXED = "\\boxed{"
HINT = "The correct final answer is"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return load_all(tmp_path_factory.mktemp("tokenizers"))


def ends_of(tokenizer: Tokenizer) -> set[int]:
    """The ids that end a response where nothing but the tokenizer says so."""
    return {tokenizer.eos_token_id}


def answer_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of an answer behind a chain that ends in a line end, and the end token."""
    before = tokenizer.encode("so\n")
    ids = tokenizer.encode("so\n" + text)
    assert ids[: len(before)] == before
    return [*ids[len(before) :], tokenizer.eos_token_id]


def prompt_of(data: DataSettings, tokenizer: Tokenizer, question: str, answer: str) -> Prompt:
    """The prompt that a row with this question and answer becomes."""
    return Prompt(0, tuple(question_ids(data, tokenizer, [{"role": "user", "content": question}])), question, answer)


# The hinted question


HINTED = f"1+1?\n\n{HINT} 2. Reason step by step towards it, and end with \\boxed{{2}}."


@pytest.mark.parametrize(
    ("settings_of_data", "expected", "start"),
    [
        ({}, f"[user]{HINTED}[assistant]", []),
        ({"system": "Be brief."}, f"[system]Be brief.[user]{HINTED}[assistant]", []),
        ({"template": "Q: {prompt}\nA:"}, f"Q: {HINTED}\nA:", [1]),
        ({"template": "Q: {prompt}\nA:", "system": "not with a template"}, f"Q: {HINTED}\nA:", [1]),
    ],
)
def test_the_hinted_text_takes_the_place_of_the_question(
    settings_of_data: dict[str, str], expected: str, start: list[int]
) -> None:
    data, tokenizer = DataSettings.model_validate({"path": "rows.jsonl"} | settings_of_data), Characters()
    prompt = prompt_of(data, tokenizer, "1+1?", "2")
    ids = hinted_prompt_ids(data, ExplanationSettings(), tokenizer, prompt)
    assert ids == [*start, *tokenizer.encode(expected)]
    # The plain prompt is the same without the hint.
    plain = expected.replace(HINTED, "1+1?")
    assert list(prompt.token_ids) == [*start, *tokenizer.encode(plain)]


def test_braces_in_questions_and_answers_stay_as_they_are() -> None:
    data, tokenizer = DataSettings(path="rows.jsonl", template="{prompt}!"), Characters()
    prompt = prompt_of(data, tokenizer, "Is {answer} or \\frac{1}{2} in {prompt}?", "{prompt}")
    own = ExplanationSettings(template="{answer}, {answer}: {prompt}")
    ids = hinted_prompt_ids(data, own, tokenizer, prompt)
    assert tokenizer.decode(ids) == "{prompt}, {prompt}: Is {answer} or \\frac{1}{2} in {prompt}?!"


# What is measured


def test_a_chain_is_measured_after_the_question_it_answers() -> None:
    """A sample that followed a prompt of its environment's says nothing of the data's question."""
    data, tokenizer = DataSettings(path="rows.jsonl"), Characters()
    context = AlgorithmContext(64, 2, tokenizer=tokenizer, data=data)  # type: ignore[arg-type]
    explanations = Explanations(ExplanationSettings(), context)
    body = Body((*tokenizer.encode("so 1+1=2, \\boxed{2}"), tokenizer.eos_token_id))
    group = group_of((1.0, 0.0), (len(body.token_ids),) * 2, prompt=prompt_of(data, tokenizer, "1+1?", "2"))
    head = group.answers[0]
    for own, parts in ((head, {"own_chain_nll", "own_answer_log_prob"}), (replace(head, prompt_length=3), set())):
        found = explanations.gauges(group, [Trajectory(own, body)])
        assert {name for gauge in found for name in gauge.parts} == parts


# The chain


CUTS = [
    ("so 1 + 2 = 3, \\boxed{3}", "so 1 + 2 = 3, "),
    ("\\boxed{4}? No: \\boxed{3} is the answer.", "\\boxed{4}? No: "),
    ("\\boxed{3}", ""),
    ("it ends \\boxed{", "it ends "),
    ("é日本😀 \\boxed{3} 日本", "é日本😀 "),
    ("no answer, \\boxed3", "no answer, \\boxed3"),
    ("", ""),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("raw", [False, True], ids=["words", "bytes"])
@pytest.mark.parametrize(("text", "chain"), CUTS)
@pytest.mark.parametrize("ended", [False, True])
def test_the_chain_ends_before_the_last_opening(
    tokenizers: dict[str, Tokenizer], kind: str, raw: bool, text: str, chain: str, ended: bool
) -> None:
    tokenizer = choose(tokenizers, kind)
    token_ids = byte_ids(tokenizer, kind, text) if raw else tokenizer.encode(text)
    length = cut_chain(tokenizer, token_ids + [tokenizer.eos_token_id] * ended, BOXED, ends_of(tokenizer))
    if text == chain:
        assert length == len(token_ids)
        return
    kept = tokenizer.decode(token_ids[:length])
    # A token may reach into the opening with characters before it, which go with it.
    assert chain.startswith(kept) and not chain.startswith(tokenizer.decode(token_ids[: length + 1]))
    assert raw or len(kept) >= len(chain) - 2
    if raw or kind in ("sentencepiece", "hugging_face"):
        assert kept == chain


def test_a_token_that_reaches_into_the_opening_goes_with_it(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = choose(tokenizers, "llama")
    token_ids = tokenizer.encode("We get $\\boxed{42}$.")
    dollar = next(place for place, token_id in enumerate(token_ids) if "$\\" in tokenizer.decode([token_id]))
    assert cut_chain(tokenizer, token_ids, BOXED, ends_of(tokenizer)) == dollar
    assert tokenizer.decode(token_ids[:dollar]) == "We get"


@pytest.mark.parametrize("kind", KINDS)
def test_no_byte_of_the_openings_first_character_is_left(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = choose(tokenizers, kind)
    chain, rest = byte_ids(tokenizer, kind, "é 日"), byte_ids(tokenizer, kind, "答案 is 7")
    assert tokenizer.decode(chain + rest) == "é 日答案 is 7"
    assert cut_chain(tokenizer, chain + rest, "答案", ends_of(tokenizer)) == len(chain)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_tokens_are_cut_where_a_search_through_all_prefixes_cuts(
    tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    tokenizer = choose(tokenizers, kind)
    token_ids: list[int] = []
    some = st.lists(st.sampled_from(["é日本😀", "$", BOXED, "\\", "boxed", "{4}", " so"]), max_size=4)
    for piece in [*data.draw(some), BOXED, *data.draw(some)]:
        token_ids += byte_ids(tokenizer, kind, piece) if data.draw(st.booleans()) else tokenizer.encode(piece)
        token_ids += data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=1))
    text = tokenizer.decode(token_ids)
    place = text.rfind(BOXED)
    assume(place >= 0)
    seen = [tokenizer.decode(token_ids[:count]) for count in range(len(token_ids) + 1)]
    begins = next(count for count, prefix in enumerate(seen) if prefix.startswith(text[: place + 1])) - 1
    expected = max(count for count in range(begins + 1) if text[:place].startswith(seen[count]))
    assert cut_chain(tokenizer, token_ids, BOXED, ends_of(tokenizer)) == expected


# What is learned


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("raw", [False, True], ids=["words", "bytes"])
def test_the_sampled_chain_then_the_reference_answer(tokenizers: dict[str, Tokenizer], kind: str, raw: bool) -> None:
    """Chain tokens stay those that were sampled, which here are not those that their text would be given."""
    tokenizer, text = choose(tokenizers, kind), "so 1 + 2 = 3\n"
    chain = byte_ids(tokenizer, kind, text) if raw else tokenizer.encode(text)
    assert raw == (tokenizer.encode(text) != chain)
    sampled = [*chain, *tokenizer.encode("\\boxed{5}, as said."), tokenizer.eos_token_id]
    found = training_tokens(tokenizer, ExplanationSettings(), sampled, "3", ends_of(tokenizer))
    assert not isinstance(found, str)
    tokens, length = found
    assert list(tokens[:length]) == sampled[:length] and length <= len(chain)
    assert tokenizer.decode(chain).startswith(tokenizer.decode(tokens[:length]))
    assert list(tokens[length:]) == answer_ids(tokenizer, "\\boxed{3}")
    assert tokens[-1] == tokenizer.eos_token_id
    # Without a final answer all of it is chain, the end token apart.
    found = training_tokens(tokenizer, ExplanationSettings(), [*chain, tokenizer.eos_token_id], "3", ends_of(tokenizer))
    assert found == ((*chain, *answer_ids(tokenizer, "\\boxed{3}")), len(chain))


@pytest.mark.parametrize("kind", KINDS)
def test_every_id_that_ends_a_response_is_left_out(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    """Engines also stop on other ids than the tokenizer's own, and these may have a text."""
    tokenizer, settings = choose(tokenizers, kind), ExplanationSettings()
    chain, stop = tokenizer.encode("so 1 + 2 = 3"), tokenizer.encode("x!")[-1]
    ends = {tokenizer.eos_token_id, stop}
    for last in ends:
        found = training_tokens(tokenizer, settings, [*chain, last], "3", ends)
        assert found == training_tokens(tokenizer, settings, chain, "3", ends)
        assert not isinstance(found, str)
        assert list(found[0][: found[1]]) == chain and found[0][-1] == tokenizer.eos_token_id
        assert training_tokens(tokenizer, settings, [last], "3", ends) == "explanations_empty"
    # Only where it ended the response.
    assert cut_chain(tokenizer, [stop, *chain], BOXED, ends) == len(chain) + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chain", ["so 1 + 2 = 3", "so 3.", "so 3. ", "it is\n\n", "3", "é", "$", " so"])
@pytest.mark.parametrize(
    ("opening", "answer_text"),
    [
        (BOXED, "\\boxed{{answer}}"),
        (BOXED, " \\boxed{{answer}}."),
        (BOXED, "\n\nSo \\boxed{{answer}}"),
        ("####", "#### {answer}"),
        ("####", "\n#### {answer}"),
        ("答案", "答案 {answer}"),
        ("ü", "ü{answer}"),
    ],
)
@pytest.mark.parametrize("answer", ["3", "é 日", "-\\frac{1}{2}"])
def test_the_answer_goes_on_where_the_chain_ends(
    tokenizers: dict[str, Tokenizer], kind: str, chain: str, opening: str, answer_text: str, answer: str
) -> None:
    """Nothing between the two, in tokenizers too that put a blank before every text."""
    tokenizer = choose(tokenizers, kind)
    own = ExplanationSettings(answer_opening=opening, answer_text=answer_text)
    sampled = [*tokenizer.encode(chain), tokenizer.eos_token_id]
    found = training_tokens(tokenizer, own, sampled, answer, ends_of(tokenizer))
    assert not isinstance(found, str)
    tokens, length = found
    assert list(tokens[:length]) == tokenizer.encode(chain) and tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens) == tokenizer.decode(tokens[:length]) + answer_text.replace("{answer}", answer)


def test_the_answers_tokens_are_those_of_running_text(tokenizers: dict[str, Tokenizer]) -> None:
    """By hand, of a tokenizer that puts a blank before every text: \\ is 29905, with the blank 320."""
    tokenizer = choose(tokenizers, "llama")
    assert tokenizer.encode("\\boxed{3}")[0] == 320
    found = training_tokens(tokenizer, ExplanationSettings(), tokenizer.encode("so"), "3", ends_of(tokenizer))
    assert found == ((577, 29905, 1884, 287, 29912, 29941, 29913, 2), 1)


class Dropping(Characters):
    """Keeps no line ends, and puts a blank before every text of which something is left."""

    def encode(self, text: str) -> list[int]:
        kept = text.replace("\n", "")
        return super().encode(f" {kept}") if kept else []

    def decode(self, ids: Any) -> str:
        return super().decode(ids).removeprefix(" ")


class Joining(Characters):
    """One id for a whole text, which no anchor stays apart from."""

    def encode(self, text: str) -> list[int]:
        return [10 + sum(ord(char) << 8 * place for place, char in enumerate(text))]

    def decode(self, ids: Any) -> str:
        texts = [(token_id - 10).to_bytes(99, "little").decode("latin-1") for token_id in ids if token_id >= 10]
        return "".join(text.rstrip("\0") for text in texts)


def test_an_anchor_that_is_lost_or_joined_is_not_used() -> None:
    own, dropping, joining = ExplanationSettings(), Dropping(), Joining()
    found = training_tokens(dropping, own, dropping.encode("so"), "3", {2})
    assert not isinstance(found, str) and dropping.decode(found[0]) == "so\\boxed{3}"
    # The last resort: the ids of the text alone.
    found = training_tokens(joining, own, joining.encode("so"), "3", {2})
    assert found == ((*joining.encode("so"), *joining.encode("\\boxed{3}"), 2), 1)


def test_the_answers_form_is_a_setting() -> None:
    tokenizer = Characters()
    own = ExplanationSettings(answer_opening="####", answer_text="#### {answer}.")
    found = training_tokens(
        tokenizer, own, response_ids(tokenizer, "\\boxed{1} so\n#### 5"), "{answer}", ends_of(tokenizer)
    )
    assert found == (tuple(response_ids(tokenizer, "\\boxed{1} so\n#### {answer}.")), 13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["", " \n", "\\boxed{3}", "\n\n\\boxed{3} is right because 1 + 2 = 3"])
@pytest.mark.parametrize("ended", [False, True])
def test_without_a_chain_there_is_nothing_to_learn(
    tokenizers: dict[str, Tokenizer], kind: str, text: str, ended: bool
) -> None:
    tokenizer = choose(tokenizers, kind)
    sampled = tokenizer.encode(text) + [tokenizer.eos_token_id] * ended
    assert training_tokens(tokenizer, ExplanationSettings(), sampled, "3", ends_of(tokenizer)) == "explanations_empty"


WORDS = st.text(alphabet="ab 12+=?é日{}\\\n", min_size=1, max_size=12)


@pytest.mark.parametrize("kind", [*KINDS, "characters"])
@settings(max_examples=150, deadline=None)
@given(
    question=WORDS,
    answer=st.text(alphabet="0123456789-/", min_size=1, max_size=3),
    chain=WORDS,
    data=st.sampled_from([{}, {"system": "Be brief."}, {"template": "{prompt}\nA:"}, {"template": "{prompt}"}]),
)
def test_e3_no_token_of_the_hint_is_in_a_training_sequence(
    tokenizers: dict[str, Tokenizer], kind: str, question: str, answer: str, chain: str, data: dict[str, str]
) -> None:
    """The training sequence is the plain prompt, the sampled chain, and the answer; nothing of the hinted prompt."""
    tokenizer = Characters() if kind == "characters" else choose(tokenizers, kind)
    assume(question.strip())
    settings_of_data, own = DataSettings.model_validate({"path": "rows.jsonl"} | data), ExplanationSettings()
    prompt = prompt_of(settings_of_data, tokenizer, question, answer)
    hinted = hinted_prompt_ids(settings_of_data, own, tokenizer, prompt)
    sampled = response_ids(tokenizer, chain)
    found = training_tokens(tokenizer, own, sampled, answer, ends_of(tokenizer))
    assume(not isinstance(found, str))
    assert not isinstance(found, str)
    tokens, length = found
    sequence = [*prompt.token_ids, *tokens]
    assert HINT in tokenizer.decode(hinted)
    assert HINT not in tokenizer.decode(sequence)
    places = range(len(sequence) - len(hinted) + 1)
    assert all(sequence[place : place + len(hinted)] != hinted for place in places)
    # Token by token: each is the plain prompt's, was sampled, or is the answer's.
    assert sequence[: len(prompt.token_ids)] == question_ids(
        settings_of_data, tokenizer, [{"role": "user", "content": question}]
    )
    assert list(tokens[:length]) == sampled[:length]
    assert list(tokens[length:]) == answer_ids(tokenizer, f"\\boxed{{{answer}}}")
