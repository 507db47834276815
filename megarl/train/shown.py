"""The samples of a step that are kept for people: who wrote which piece of them, and what an algorithm makes of it.

The rank that holds a sample writes its row, and rank 0 alone is told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from megarl.algorithms.base import Group, Span
from megarl.data.tokenizer import Tokenizer
from megarl.parallel.exchange import gather_to_first
from megarl.records import Body, Head, Key, Prompt, Stretch
from megarl.train.groups import Rollouts
from megarl.train.session import Session
from megarl.train.sources import level_of

#: What stands for bytes that are no whole character, and tokens that one character has at most.
_BROKEN, _PARTS = "\ufffd", 4


def rows_of(
    session: Session, step: int, rollouts: Rollouts, spans: Mapping[Key, tuple[Span, ...]]
) -> list[dict[str, Any]]:
    """Rows of the step's first `logging.samples` answers, each before what goes on from it; on rank 0. Collective.

    `spans` are those that are trained of each trajectory. Under `rollout.ahead` the answers are those that the step
    learns from, and not those that it makes.
    """
    kept = rollouts.kept.groups
    groups = kept if session.config.rollout.ahead else rollouts.made.groups
    bodies = {**rollouts.made.bodies, **rollouts.bodies}
    rank = session.world.rank
    mine = []
    for place, (prompt, head) in enumerate(_chosen(session.config.logging.samples, groups, kept)):
        if head.holder == rank or (head.holder is None and rank == 0):
            trained = spans.get(head.key, ())
            mine.append((place, row_of(session.tokenizer, step, prompt, head, bodies[head.key], trained)))
    found = sorted((one for part in gather_to_first(mine) for one in part), key=lambda one: one[0])
    return [row for _, row in found]


def _chosen(most: int, groups: Sequence[Group], kept: Sequence[Group]) -> list[tuple[Prompt, Head]]:
    """The first `most` answers of `groups`; behind each what the `kept` groups have that goes on from it."""
    roots = [(group.prompt, head) for group in groups for head in group.answers if head.parent is None][:most]
    trees: dict[Key, list[Head]] = {}
    for head in (head for group in kept for head in group.answers if head.parent is not None):
        trees.setdefault(head.key._replace(branch=()), []).append(head)
    return [
        (prompt, one)
        for prompt, root in roots
        for one in (root, *sorted(trees.get(root.key, ()), key=lambda head: head.key))
    ]


def row_of(
    tokenizer: Tokenizer, step: int, prompt: Prompt, head: Head, body: Body, spans: Sequence[Span]
) -> dict[str, Any]:
    """A line of samples.jsonl.

    `pieces` are the response, cut where who wrote it or its advantage changes and where its thinking ends: `text`, `by`
    whom, how many `tokens`, and of what is trained `advantage`, None where the algorithm gives none. `sizes` are the
    characters that each token adds to the text, where that can be told. `advantage` of the row is the mean over its
    trained tokens; `branch` and `fork` say of what it goes on from, and after how many tokens.
    """
    key = head.key
    level = level_of(prompt)
    told = {
        "draw": key.draw,
        "branch": list(key.branch),
        "fork": head.fork,
        "source": prompt.source,
        "reward_terms": dict(head.reward_terms),
        "turns": turn_rows(head.stretches, body.texts) if body.texts else [],
    }
    return {
        "step": step,
        "prompt_index": key.prompt,
        "sample_index": key.number,
        "prompt": prompt.text,
        "answer": prompt.answer,
        "response": body.text or tokenizer.decode(body.token_ids),
        "reward": head.reward,
        "finish_reason": head.finish_reason,
        "length": head.length,
        **{name: value for name, value in told.items() if value},
        **({} if level is None else {"level": level}),
        "advantage": _mean(spans),
        "pieces": pieces_of(tokenizer, head, body.token_ids, spans),
    }


def turn_rows(stretches: Sequence[Stretch], texts: Sequence[str]) -> list[dict[str, str]]:
    """Who said what in a response, for a line of a file."""
    return [{"by": stretch.source, "text": text} for stretch, text in zip(stretches, texts, strict=True)]


def pieces_of(tokenizer: Tokenizer, head: Head, ids: Sequence[int], spans: Sequence[Span]) -> list[dict[str, Any]]:
    """The `pieces` of a response of the token `ids`; see `row_of`."""
    edges = {0, head.length, head.marks.get("thinking", 0), head.fork}
    edges |= {stretch.end for stretch in head.stretches} | {place for span in spans for place in span[:2]}
    whole = tokenizer.decode(ids)
    sizes = token_sizes(tokenizer, ids, whole)
    places = None if sizes is None else list(accumulate(sizes, initial=0))
    pieces = []
    for start, end in pairwise(sorted(edges)):
        # Of its own tokens alone a piece may lack the blank that it begins with.
        text = tokenizer.decode(ids[start:end]) if places is None else whole[places[start] : places[end]]
        by = next(stretch.source for stretch in head.stretches if stretch.start <= start < stretch.end)
        piece: dict[str, Any] = {"text": text, "by": by, "tokens": end - start}
        trained = [span.advantage for span in spans if span.start <= start < span.end]
        if trained:
            piece["advantage"] = _short(trained[0])
        if sizes is not None:
            piece["sizes"] = sizes[start:end]
        pieces.append(piece)
    return pieces


def token_sizes(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int] | None:
    """How many characters of `text`, theirs together, each of the `ids` adds; a character of several tokens is the
    last one's. None where the text is not made of the tokens' own."""
    own = {token_id: tokenizer.decode([token_id]) for token_id in set(ids)}
    broken = [_BROKEN in own[token_id] for token_id in ids]
    sizes: list[int] = []
    place, part = 0, list[int]()
    for token_id, goes_on in zip(ids, [*broken[1:], False], strict=True):
        part.append(token_id)
        if goes_on and len(part) > _PARTS:
            # Bytes that are no text: they end where text begins.
            continue
        said = own[token_id] if len(part) == 1 else tokenizer.decode(part)
        if _BROKEN in said and goes_on:
            continue
        # A tokenizer that marks where words begin says nothing of it for one alone.
        begins = next((blank for blank in ("", " ") if text.startswith(blank + said, place)), None)
        if begins is None:
            return None
        each = [1] * len(part) if len(said) == len(part) else [0] * (len(part) - 1) + [len(said)]
        sizes += [len(begins) + each[0], *each[1:]]
        place, part = place + len(begins + said), []
    return sizes if place == len(text) else None


def _mean(spans: Sequence[Span]) -> float | None:
    tokens = sum(span.end - span.start for span in spans)
    if not tokens:
        return None
    return _short(sum(span.advantage * (span.end - span.start) for span in spans) / tokens)


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
