"""The text side of explanations: a question that shows its answer, and what is learned when the hint is hidden.

ExPO (arXiv 2507.02834) draws the explanation from the policy that sees question and reference answer, and trains the
policy that sees the question alone to write the explanation's chain and then the reference answer. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from megarl.config.algorithms import ExplanationSettings
from megarl.config.data import DataSettings
from megarl.data.dataset import question_ids
from megarl.data.prefixes import tokens_until
from megarl.data.tokenizer import Tokenizer
from megarl.records import Prompt

#: Texts behind which an answer is tokenised, the first that stays apart from it.
_ANCHORS = ("\n", ".", "a", "1")


def hinted_prompt_ids(
    data: DataSettings, settings: ExplanationSettings, tokenizer: Tokenizer, prompt: Prompt
) -> list[int]:
    """Ids of the prompt that shows the reference answer and asks to explain it.

    `settings.template`, filled in, takes the place of the question in `data.template`, or else in the chat. A question
    that was a conversation becomes one message of the user.
    """
    texts = {"{prompt}": prompt.text, "{answer}": prompt.answer}
    # In one pass: a question may itself contain {answer}.
    hinted = re.sub(r"\{prompt\}|\{answer\}", lambda found: texts[found.group()], settings.template)
    return question_ids(data, tokenizer, [{"role": "user", "content": hinted}])


def cut_chain(tokenizer: Tokenizer, token_ids: Sequence[int], opening: str, ends: Collection[int]) -> int:
    r"""How many of a response's tokens, from the first on, are the chain that leads to its final answer.

    The chain ends before the token in which the last `opening` (such as \boxed{) of the decoded text begins, and so
    may lack characters that this token begins with. Without an opening all is chain but the last token,
    where it is one of `ends`, the ids that end a response.
    """
    text = tokenizer.decode(token_ids)
    place = text.rfind(opening)
    if place < 0:
        return len(token_ids) - any(token_id in ends for token_id in token_ids[-1:])
    chain, length = text[:place], tokens_until(tokenizer, token_ids, text[: place + 1])
    # One step back, or a few where the opening's first character is of several byte tokens: those before its last are
    # no text yet.
    while not chain.startswith(tokenizer.decode(token_ids[:length])):
        length -= 1
    return length


def training_tokens(
    tokenizer: Tokenizer, settings: ExplanationSettings, token_ids: Sequence[int], answer: str, ends: Collection[int]
) -> tuple[tuple[int, ...], int] | str:
    """What is learned after the question, made of an explanation's `token_ids` and the reference `answer`.

    The chain's tokens as they were sampled, those of `settings.answer_text`, as which they decode behind the chain, and
    the tokenizer's end token; with it the length of the chain in tokens. `ends` are all ids that end a response, none
    of which ends the chain. Instead of both the name of a counter where there is nothing to learn from:
    explanations_empty, no text in the chain.
    """
    length = cut_chain(tokenizer, token_ids, settings.answer_opening, ends)
    chain = tuple(token_ids[:length])
    if not tokenizer.decode(chain).strip():
        return "explanations_empty"
    ending = _continuation(tokenizer, settings.answer_text.replace("{answer}", answer))
    return (*chain, *ending, tokenizer.eos_token_id), length


def _continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text` where it goes on from another text.

    A tokenizer may put a blank before every text, which would stand between the two. So `text` is tokenised behind an
    anchor, whose ids are then taken away. Where no anchor stays apart from it, the ids are those of `text` alone.
    """
    for anchor in _ANCHORS:
        before, together = tokenizer.encode(anchor), tokenizer.encode(anchor + text)
        apart = together[: len(before)] == before
        if apart and (tokenizer.decode(before), tokenizer.decode(together)) == (anchor, anchor + text):
            return together[len(before) :]
    return tokenizer.encode(text)
