"""AttnRL (arXiv 2509.26628): trees of responses that branch before steps which later steps look at.

A prompt's first samples are gone on with from their branch points, and every segment of a tree gets an advantage by the
leaves below it. Under `rollout.ahead` both kinds of generation share one call of the engine. TreeRL, GRPO in the same
pipeline, and where paper and released code differ: settings (docs/algorithms.md).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from megarl import records
from megarl.algorithms.base import AlgorithmContext, Credit, Group, Span, Trained
from megarl.algorithms.clipped import ClippedRatio
from megarl.algorithms.plan import Fork, Generation, Growth, Influence, Plan, Probe
from megarl.algorithms.steps import branch_points, highest, scored, step_starts
from megarl.algorithms.trees import ROOT, expanded, next_prompts, trees_wanted, valued
from megarl.config.algorithms import AttnrlSettings
from megarl.data.tokenizer import Tokenizer
from megarl.records import Head

#: Probes: of the influence of steps, and of the entropy of tokens.
_INFLUENCE, _ENTROPY = "influence", "entropy"


class _Segment(NamedTuple):
    """A stretch of a response, from `start` to `end`, with its number among the problem's segments."""

    number: int
    start: int
    end: int


class Attnrl(ClippedRatio):
    """First samples, their continuations, and segments trained by their leaves."""

    Settings = AttnrlSettings

    def __init__(self, settings: AttnrlSettings, context: AlgorithmContext) -> None:
        super().__init__(settings, context)
        self.settings: AttnrlSettings = settings
        # Prompts of the next step, and of those whose groups had no credit yet, by step.
        self._prompts = context.prompts
        self._asked: dict[int, int] = {}
        # Of problems that were all right: how many, and the mean of their mean influences.
        self._easy, self._easy_mean = 0, 0.0
        self._logged: dict[str, float] = {}
        # Of tokens.
        self._texts: dict[int, str] = {}

    def plan(self, step: int) -> Plan:
        """First samples, which grow."""
        return Plan((Generation(self.context.group_size),), prompts=self._bounded(self._prompts), grows=True)

    def _bounded(self, prompts: int) -> int:
        """Within bounds, which a run that goes on may have changed."""
        least, most = self.settings.prompt_bounds(self.context.prompts)
        return min(max(prompts, least), most)

    def probes(self, step: int) -> tuple[Probe, ...]:
        """The influence of steps, or the entropy of tokens, as places of branch points."""
        settings, most = self.settings, 2 + self.settings.points
        found: list[Probe] = []
        if settings.influence is not None:
            influence = Influence(self._starts, settings.influence)
            found.append(Probe(_INFLUENCE, self._by_influence, measures=influence, most=most))
        if settings.branching == "entropy":
            found.append(Probe(_ENTROPY, self._by_entropy, measures="entropy", most=most))
        return tuple(found)

    def _starts(self, sequence: records.Sequence) -> Sequence[int]:
        ids = sequence.tokens[sequence.positions]
        return [int(sequence.positions[start]) for start in step_starts(self._pieces(ids.tolist()))]

    def _pieces(self, ids: Sequence[int]) -> list[str]:
        unknown = sorted(set(ids) - self._texts.keys())
        self._texts |= zip(unknown, pieces_of(self._tokenizer, unknown), strict=True)
        return [self._texts[one] for one in ids]

    def _by_influence(self, influences: np.ndarray, sequence: records.Sequence) -> list[float]:
        """The mean score of a response's steps, how many branch points were chosen by score, and their places."""
        ids = sequence.tokens[sequence.positions].tolist()
        before = int(sequence.positions[0])
        starts = [start - before for start in self._starts(sequence)]
        assert self.context.thinking_end is not None
        scores = scored(influences, starts, len(ids), self.context.thinking_end.last(ids))
        places, by_score = (), 0
        if self.settings.branching == "attention":
            settings = self.settings
            places, by_score = branch_points(
                scores, starts, count=settings.points, quantile=settings.quantile, gap=settings.gap, before=before
            )
        return [float(scores.mean()), by_score, *places]

    def _by_entropy(self, entropies: np.ndarray, sequence: records.Sequence) -> list[float]:
        """The places of the tokens of the highest entropy, but for the last."""
        return [*highest(entropies[:-1].tolist(), self.settings.points)]

    def growth(self, step: int, groups: Sequence[Group]) -> list[Growth]:
        """By difficulty, which first samples of each group become trees; easy ones are left out."""
        self._asked[step] = self._logged["batch_prompts"] = self._bounded(self._prompts)
        rights = [[reward >= self.context.reward_high for reward in group.rewards] for group in groups]
        means = [fmean(_first(head, _INFLUENCE) for head in group.answers) for group in groups]
        for right, mean in zip(rights, means, strict=True):
            if all(right):
                self._easy += 1
                self._easy_mean += (mean - self._easy_mean) / self._easy
        found: list[Growth] = []
        for group, right, mean in zip(groups, rights, means, strict=True):
            if self.settings.drop_easy and all(right) and not mean > self._easy_mean:
                found.append(Growth(left_out="problems_dropped_easy"))
            else:
                found.append(self._grown(step, group, right))
        return found

    def _grown(self, step: int, group: Group, right: Sequence[bool]) -> Growth:
        settings = self.settings
        if settings.branching == "none":
            return Growth()
        wanted = trees_wanted(right) if settings.expansion == "difficulty" else len(right)
        draw = random.Random(f"attnrl {self.context.seed} {step} {group.prompt.index} {group.draw}")
        forks: list[Fork] = []
        counters: Counter[str] = Counter()
        for number in expanded(right, wanted, draw):
            head = group.answers[number]
            places, by_score = _places(head)
            counters["trees"] += bool(places)
            counters["trees_without_branch"] += not places
            if settings.branching == "attention":
                counters["branch_points_by_score"] += by_score
                counters["branch_points_by_filling"] += len(places) - by_score
            times = Counter(places)
            forks += [Fork(head.key, place, settings.continuations * times[place]) for place in sorted(times)]
        return Growth(tuple(forks), counters=+counters)

    def credit(self, step: int, groups: Sequence[Group]) -> list[Credit]:
        """One sequence for every path to a leaf of a tree, each segment with its advantage."""
        found = [self._of_group(group) for group in groups]
        # The first step of a run that is ahead has nothing to learn from.
        asked = self._asked.pop(step - self.context.ahead, None)
        if asked is not None:
            self._adapt(asked, sum(len(one.trained) for one in found))
        return found

    def _adapt(self, asked: int, with_signal: int) -> None:
        settings, prompts = self.settings, self.context.prompts
        wanted = prompts * self.context.group_size * settings.leaves_per_sample
        now, bounds = self._bounded(self._prompts), settings.prompt_bounds(prompts)
        self._prompts = next_prompts(now, asked, wanted, with_signal, *bounds, settings.adapt)

    def _of_group(self, group: Group) -> Credit:
        unscored = sum(head.reward is None for head in group.answers)
        counters = {"leaves_unscored": unscored} if unscored else {}
        paths, parents, rewards = _segments([head for head in group.answers if head.reward is not None])
        if len(set(rewards.values())) == 1:
            return Credit((), "groups_without_variance", counters)
        values, _ = valued(parents, rewards)
        alone = self.settings.branching == "none"
        grown = {head.parent for head, _ in paths if head.parent is not None}
        trained = tuple(
            Trained(head, tuple(Span(one.start, one.end, values[one.number].advantage) for one in path))
            for head, path in paths
            if alone or head.parent is not None or head.key in grown
        )
        if not trained:
            return Credit((), "groups_without_trees", counters)
        return Credit(trained, counters=counters | {"leaves": len(trained)})

    def numbers(self, losses: Mapping[str, float]) -> dict[str, float]:
        """`batch_prompts` that the step asked, where it asked any."""
        logged, self._logged = self._logged, {}
        return logged

    @property
    def _tokenizer(self) -> Tokenizer:
        assert self.context.tokenizer is not None
        return self.context.tokenizer

    def state(self) -> dict[str, Any]:
        """Prompts of the next step and of those before that still grow, and the running mean of easy problems."""
        asked = {str(step): prompts for step, prompts in self._asked.items()}
        return {"prompts": self._prompts, "asked": asked, "easy": self._easy, "easy_mean": self._easy_mean}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` had returned."""
        self._prompts, self._easy, self._easy_mean = state["prompts"], state["easy"], state["easy_mean"]
        self._asked = {int(step): prompts for step, prompts in state["asked"].items()}


def _segments(heads: Sequence[Head]) -> tuple[list[tuple[Head, list[_Segment]]], list[int], dict[int, float]]:
    """The path of segments to each leaf, the parents of all segments, and the rewards of the leaves, by segment.

    A first sample is cut where continuations leave it; one that was cut off from its first sample, since that has no
    reward, is left out.
    """
    paths: list[tuple[Head, list[_Segment]]] = []
    parents: list[int] = []
    rewards: dict[int, float] = {}
    places: dict[records.Key, set[int]] = {}
    for head in heads:
        if head.parent is not None:
            places.setdefault(head.parent, set()).add(head.fork)
    by_key: dict[records.Key, list[_Segment]] = {}

    def add(head: Head, path: list[_Segment], bounds: Sequence[int]) -> None:
        for start, end in pairwise(bounds):
            parents.append(path[-1].number if path else ROOT)
            path.append(_Segment(len(parents) - 1, start, end))
        assert head.reward is not None
        rewards[path[-1].number] = head.reward
        by_key[head.key] = path
        paths.append((head, path))

    for head in sorted(heads, key=lambda one: len(one.key.branch)):
        if head.parent is None:
            add(head, [], [0, *sorted(places.get(head.key, ())), head.length])
        elif head.parent in by_key:
            shared = [one for one in by_key[head.parent] if one.end <= head.fork]
            add(head, list(shared), [head.fork, head.length])
    return paths, parents, rewards


def _places(head: Head) -> tuple[tuple[int, ...], int]:
    """The branch points that a probe has found, and how many of them by score."""
    if _ENTROPY in head.measured:
        return tuple(int(place) for place in head.measured[_ENTROPY]), 0
    _, by_score, *places = head.measured.get(_INFLUENCE) or (0.0, 0)
    return tuple(int(place) for place in places), int(by_score)


def _first(head: Head, probe: str) -> float:
    """The first number that a probe has found; 0 where it has none, as of a response without a token."""
    return next(iter(head.measured.get(probe, ())), 0.0)


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The texts of tokens, each by itself, blanks included."""
    # Behind another token, as what begins a text may lose its blank.
    before = tokenizer.encode("a")[-1:]
    start = len(tokenizer.decode(before))
    return [tokenizer.decode([*before, one])[start:] for one in ids]
