r"""Where in a response its answer stands: what follows the thinking, its last box, or its last statement.

All searches take time linear in the text's length, whatever the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

#: What ends the thinking in the responses of today's reasoning models.
_END_OF_THINKING = re.compile(r"</think(?:ing)?>|\[/THINK\]")
#: A box that opens, an escaped character, a brace. One backslash before a box (`\\boxed`) does not escape it.
_TOKEN = re.compile(r"(?P<box>\\(?:boxed|fbox|framebox)\s{0,8}\{)|\\(?!\\(?:boxed|fbox|framebox))[\s\S]|[{}]")
#: What may stand between boxes that give one answer together: `\boxed{1} or \boxed{2}`.
_JOINT = re.compile(r"[\s$]*(?:\\\)|\\text\s*\{)?[\s$]*(?:,|;|,?\s*(?:and|or))[\s$]*\}?(?:\\\()?[\s$]*")
#: Characters at the end of a response without a box that are searched for an answer. Our choice.
REACH = 2000

_OPEN = "is negated, left open, or states nothing"

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
#: `The answer is`, `Answer:`, `#### `, up to what follows.
_ANCHOR = re.compile(
    r"(?:\b(?:answer|result|option|choice)\b[^.:=\n$\\\d]{0,60}?(?:\s(?:is|are|be|equals|as)\b|[:=])|####)\s{0,3}:?[\s*]{0,6}",
    re.IGNORECASE,
)
#: What comes after an answer and is no part of it.
_AFTERWORDS = re.compile(
    r",?\s+(?:because|since|as|so|which|where|when|if|for|rather\s+than|instead\s+of|but|given)\b|[,(]?\s*\bnot\b",
    re.IGNORECASE,
)
_NEGATION = re.compile(
    r"\b(?:not|never|neither|nor|cannot|no\s+longer|isn't|aren't|can't|wasn't|won't|doesn't|wrong|incorrect|"
    r"false|except|unknown|might|may|maybe|could|perhaps|possibly|unlikely|impossible\s+to|other\s+than|"
    r"either|between|unsure)\b|n't\b|n’t\b|\?",
    re.IGNORECASE,
)
_MATHS = re.compile(r"\$\$([^$]+)\$\$|(?<!\\)\$([^$\n]+)(?<!\\)\$|\\\((.+?)\\\)|\\\[([\s\S]+?)\\\]")
#: A word; a sentence without one is a formula.
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_NUMBER = r"[-−+]?[$€£¥]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?(?:\s?/\s?\d+|\s?%)?"
_NUMBERS = re.compile(rf"(?<![\w.,]){_NUMBER}(?:\s*(?:,\s*(?:and|or)|,|and|or)\s+(?:maybe\s+)?{_NUMBER})*")


class Box(NamedTuple):
    """A complete box: where its command starts, what it holds, where its closing brace ends."""

    start: int
    content: str
    end: int


def boxes(text: str) -> list[Box]:
    r"""All complete `\boxed{...}` (also `\fbox`, `\framebox`) of `text`, in the order in which they open."""
    if "box" not in text:
        return []
    found, depth = [], []
    for token in _TOKEN.finditer(text):
        if token["box"]:
            depth.append((token.start(), token.end()))
        elif token.group() == "{":
            depth.append(None)
        elif token.group() == "}" and depth and (opened := depth.pop()) is not None:
            found.append((*opened, token.end()))
    found.sort()
    # Contents of nested boxes together would be quadratic; nobody needs more than the last few.
    return [Box(start, text[content : end - 1], end) for start, content, end in found[-KEPT:]]


#: Boxes whose contents are taken out: as many as an answer may have parts.
KEPT = 32


def boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}` or `\fbox{...}` in `text`, or None where there is none.

    A box that is opened and never closed (a truncated response) does not count; an earlier complete one does.
    Escaped braces (`\{`) do not count as braces.

    >>> boxed(r"so \boxed{\frac{1}{2}} it is")
    '\\frac{1}{2}'
    """
    found = boxes(text)
    return found[-1].content if found else None


def after_thinking(text: str) -> str:
    """What follows the last end of the thinking; all of `text` where no thinking ends."""
    ends = [match.end() for match in _END_OF_THINKING.finditer(text)]
    return text[ends[-1] :] if ends else text


def answering(text: str) -> str:
    """The part of `text` that gives the answer: what follows the thinking, or all where that says nothing."""
    response = after_thinking(text)
    end = response[-REACH:]
    says = any(pattern.search(end) for pattern in (_ANCHOR, _MATHS, _NUMBERS, _NEGATION))
    return response if says or boxes(response) else text


class Taken(NamedTuple):
    """What a response gives as its answer, None where it gives none, and in words where that was found, or why not."""

    answer: str | None
    where: str


def taken(text: str) -> Taken:
    r"""The answer that a response gives, as it is written there.

    What follows the thinking counts; where it says nothing, a box in the thinking does. The last box is the answer,
    together with those before it that `and`, `or` or a comma joins to it. Without a box it is what is stated last
    (`The answer is 42`, `#### 42`), else the mathematics or the number in the last sentence with one. A statement that
    is negated or left open is no answer.

    >>> taken("<think>so \\boxed{42}</think>The answer is 41.").answer
    '41.'
    """
    part = answering(text)
    found = boxes(part)
    if found:
        joined = _joined(part, found)
        where = "the last box" if len(joined) == 1 else f"the last {len(joined)} boxes, which are joined"
        if part is text and after_thinking(text) != text:
            where += ", in the thinking, since nothing is said after it"
        return Taken(", ".join(joined), where)
    return _stated(after_thinking(text)[-REACH:])


def _joined(text: str, found: list[Box]) -> list[str]:
    """Contents of the last box and of those that are joined to it."""
    parts = [found[-1]]
    for box in reversed(found[:-1]):
        if box.end > parts[0].start or not _JOINT.fullmatch(text[box.end : parts[0].start][:40]):
            break
        parts.insert(0, box)
    return [part.content for part in parts]


def _stated(text: str) -> Taken:
    """The answer that a text without boxes states."""
    sentences = [sentence for sentence in _sentences(text) if sentence.strip()]
    for place, sentence in reversed(list(enumerate(sentences))):
        anchors = list(_ANCHOR.finditer(sentence))
        if anchors:
            before, statement = sentence[: anchors[-1].end()], sentence[anchors[-1].end() :]
            if not statement.strip(" *:"):
                statement = "".join(sentences[place + 1 : place + 2])
            said = anchors[-1].group().strip(" *:=\n")
            found = _from_statement(before, statement)
            return Taken(found, f"no box; what {said!r} states" if found else f"no box, and {said!r} {_OPEN}")
    for sentence in reversed(sentences):
        if _MATHS.search(sentence) or _NUMBERS.search(sentence):
            found = _from_sentence(sentence)
            where = "no box and no statement; the last sentence with mathematics or a number"
            return Taken(found, where if found else f"{where} {_OPEN}")
    return Taken(None, f"no box, no statement, no mathematics and no number in the last {REACH} characters")


def _sentences(text: str) -> Iterator[str]:
    """Sentences of `text`; what stands between dollars is not cut."""
    start = 0
    spans = [match.span() for match in _MATHS.finditer(text)]
    for end in _SENTENCE_END.finditer(text):
        while spans and spans[0][1] <= end.start():
            spans.pop(0)
        if spans and spans[0][0] < end.start():
            continue
        yield text[start : end.start()]
        start = end.end()
    yield text[start:]


def _from_statement(before: str, statement: str) -> str | None:
    """The answer in `statement`, which follows `before` (`The answer is`)."""
    if _NEGATION.search(before):
        return None
    after = _AFTERWORDS.search(statement)
    if after is not None and after.start() > 0:
        statement = statement[: after.start()]
    # What maths says is compared as it is; a single word (May, neither) is an answer.
    words = _MATHS.sub(" $ ", statement)
    if len(words.split()) > 1 and _NEGATION.search(words):
        return None
    maths = list(_MATHS.finditer(statement))
    if maths:
        return _run_of_maths(statement, maths, first=True)
    return statement.strip() or None


def _from_sentence(sentence: str) -> str | None:
    """The last mathematics or numbers in a sentence that does not say it is the answer."""
    if _NEGATION.search(sentence):
        return None
    maths = list(_MATHS.finditer(sentence))
    if maths:
        return _run_of_maths(sentence, maths, first=False)
    if not _WORD.search(sentence):
        return re.sub(r"^\s*(?:(?:so|is|it|as|we|to)\s+)+", "", sentence, flags=re.IGNORECASE)
    if "\\" in sentence:
        return re.split(r"[=:]|\bis\b", sentence)[-1]
    numbers = list(_NUMBERS.finditer(sentence))
    return numbers[-1].group() if numbers else None


def _run_of_maths(text: str, maths: list[re.Match[str]], first: bool) -> str:
    """The first or last mathematics of a text, with what `and`, `or` or a comma joins to it."""
    runs = [[maths[0]]]
    for match in maths[1:]:
        if _JOINT.fullmatch(text[runs[-1][-1].end() : match.start()][:40]):
            runs[-1].append(match)
        else:
            runs.append([match])
    run = runs[0] if first else runs[-1]
    return ", ".join(next(group for group in match.groups() if group) for match in run)
