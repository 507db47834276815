"""Self-explanations, an algorithm's own texts: a question that shows its answer, and what is learned without the hint.

ExPO (arXiv 2507.02834) draws the explanation from the policy that sees question and reference answer, and trains the
policy that sees the question alone to write the explanation's chain and then the reference answer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from megarl.algorithms.base import AlgorithmContext, Group
from megarl.algorithms.plan import Gauge, Generation, Learned, Text
from megarl.config.algorithms import ExplanationSettings
from megarl.config.data import DataSettings
from megarl.config.parameter_sets import POLICY
from megarl.data.dataset import question_ids
from megarl.data.prefixes import tokens_until
from megarl.data.tokenizer import Tokenizer, response_ids
from megarl.records import NEVER_TRAINED, Prompt, Trajectory

#: What explanations are called among the kinds of a step's texts.
EXPLANATION = "explanation"

#: Texts behind which an answer is tokenised, the first that stays apart from it.
_ANCHORS = ("\n", ".", "a", "1")


class Explanations:
    """The generation of explanations that `settings` describe, and what is measured of them."""

    def __init__(self, settings: ExplanationSettings, context: AlgorithmContext) -> None:
        self._settings, self._context = settings, context

    def generation(self, weights: str = POLICY) -> Generation:
        """Graded where `must_match` asks for it, and for the log where a reward says right or wrong at no cost."""
        return Generation(
            count=self._settings.per_prompt,
            kind=EXPLANATION,
            weights=weights,
            prompt=self._hinted,
            max_tokens=self._settings.max_tokens,
            graded=self._settings.must_match or self._context.reward_judges,
            learn=self._learned,
            refresh_every=self._settings.refresh_every,
        )

    def _hinted(self, prompt: Prompt) -> list[int] | str:
        tokenizer, data = self._reading()
        tokens = hinted_prompt_ids(data, self._settings, tokenizer, prompt)
        limit = self._settings.longest_hint(data.max_prompt_tokens)
        return tokens if len(tokens) <= limit else "explanations_prompt_too_long"

    def _learned(self, prompt: Prompt, sample: Trajectory) -> Learned:
        head, context = sample.head, self._context
        # Without a reward where no explanation is graded.
        matches = head.reward is not None and head.reward > (context.reward_low + context.reward_high) / 2
        matching = {"explanations_matching": 1} if matches else {}
        if not head.finished:
            return Learned(None, matching | {"explanations_truncated": 1})
        if self._settings.must_match and not matches:
            return Learned(None, matching | {"explanations_not_matching": 1})
        found = self._training_tokens(sample.body.token_ids, prompt)
        if isinstance(found, str):
            return Learned(None, matching | {found: 1})
        if len(found[0]) > context.max_tokens:
            return Learned(None, matching | {"explanations_too_long": 1})
        return Learned(Text(found[0], {"chain": found[1]}), matching | {"explanations": 1})

    def gauged(self, step: int) -> int:
        """Of how many groups a step measures `gauges`."""
        settings = self._settings
        due = settings.measure_every and (step - 1) % settings.measure_every == 0
        return settings.measure_prompts if due else 0

    def gauges(self, group: Group, held: Sequence[Trajectory]) -> list[Gauge]:
        """The two properties of a good explanation.

        In distribution: the chain's negative log-likelihood given the question alone (`..._chain_nll`). Useful: the
        log-likelihood of the reference answer after the chain, log p(answer | question, chain), the chain's own final
        answer stripped (`..._answer_log_prob`). For the policy's own chains, its explanations, and the worked
        solutions of experts where the data set has them; one chain of each kind per group.
        """
        prompt = group.prompt
        found: list[Gauge] = []
        first = next(iter(group.of(EXPLANATION)), None)
        for head, body in held:
            # Measured after the data's prompt, which another prompt's answer does not follow.
            own = head.finished and head.prompt_length is None
            own = own and not any(one.source in NEVER_TRAINED for one in head.stretches)
            if own and head.key.kind == "answer" and head.key.number == 0:
                found += self._gauge("own", self._training_tokens(body.token_ids, prompt))
            elif first is not None and head.key == first.key:
                found += self._gauge("explanation", (body.token_ids, head.marks["chain"]))
        if prompt.solution is not None:
            tokens = response_ids(self._reading()[0], prompt.solution)
            found += self._gauge("expert", self._training_tokens(tokens, prompt), common=True)
        return found

    def _gauge(self, kind: str, found: tuple[tuple[int, ...], int] | str, *, common: bool = False) -> list[Gauge]:
        if isinstance(found, str):
            return []
        tokens, length = found
        # The end token after the answer is no part of it.
        parts = {f"{kind}_chain_nll": (0, length), f"{kind}_answer_log_prob": (length, len(tokens) - 1)}
        return [Gauge(tokens, parts, common)]

    def _training_tokens(self, token_ids: Sequence[int], prompt: Prompt) -> tuple[tuple[int, ...], int] | str:
        tokenizer, ends = self._reading()[0], self._context.stop_ids
        return training_tokens(tokenizer, self._settings, token_ids, prompt.answer, ends)

    def _reading(self) -> tuple[Tokenizer, DataSettings]:
        if self._context.tokenizer is None or self._context.data is None:
            raise ValueError("AlgorithmContext has no tokenizer and data settings, which explanations are made with")
        return self._context.tokenizer, self._context.data


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
