"""AttnRL by hand: which samples grow and from where, what every segment is worth, and the state it carries."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from group_case import group_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_case import KINDS, Characters, byte_ids, choose, load_all

from megarl.algorithms.attnrl import Attnrl, pieces_of
from megarl.algorithms.base import AlgorithmContext, Group
from megarl.algorithms.plan import Influence
from megarl.algorithms.steps import step_starts
from megarl.config.algorithms import AttnrlSettings
from megarl.data.thinking import ThinkingEnd
from megarl.data.tokenizer import Tokenizer
from megarl.records import Head, Key, Sequence, Stretch, from_place

LENGTH = 100


def attnrl(ahead: int = 0, **settings: Any) -> Attnrl:
    context = AlgorithmContext(200, group_size=6, prompts=4, ahead=ahead, seed=1)
    return Attnrl(AttnrlSettings(**settings), context)


def begun(
    rewards: list[float], number: int = 0, mean: float = 1.0, places: tuple[int, ...] = (30, 60), by_score: int = 1
) -> Group:
    """A group whose first samples have these rewards, and these branch points and mean influence each."""
    group = group_of(rewards, [LENGTH] * len(rewards), number=number)
    heads = tuple(replace(head, measured={"influence": (mean, float(by_score), *places)}) for head in group.heads)
    return replace(group, heads=heads)


def grown(group: Group, forks: Any, reward: Any) -> Group:
    """The group with the continuations that `forks` ask for; `reward` of each by its key, and of how many tokens."""
    heads: list[Head] = []
    written: Counter[Key] = Counter()
    for fork in forks:
        for _ in range(fork.count):
            key = fork.parent._replace(branch=(written[fork.parent],))
            written[fork.parent] += 1
            stretches = (Stretch(0, fork.place, "policy", 0), Stretch(fork.place, LENGTH, "policy", 1))
            heads.append(Head(key, 0, stretches, reward=reward(key), fork=fork.place))
    return replace(group, heads=(*group.heads, *heads))


@pytest.mark.parametrize(("right", "trees"), [(0, 6), (1, 6), (2, 5), (3, 4), (4, 4), (5, 3)])
def test_leaves_of_a_problem_follow_its_difficulty(right: int, trees: int) -> None:
    algorithm, group = attnrl(), begun([1.0] * right + [0.0] * (6 - right))
    (growth,) = algorithm.growth(1, [group])
    assert growth.counters == {"trees": trees, "branch_points_by_score": trees, "branch_points_by_filling": trees}
    assert [(fork.place, fork.count) for fork in growth.forks] == [(30, 2), (60, 2)] * trees
    whole = grown(group, growth.forks, lambda key: float(key.branch[0] % 2))
    (credit,) = algorithm.credit(2, [whole])
    # Of a problem that is grown whole 30 leaves: 6 + 6 x 2 x 2.
    assert len(credit.trained) == credit.counters["leaves"] == 5 * trees and credit.left_out is None
    # Every token of a trained path has an advantage, each segment its own.
    for one in credit.trained:
        bounds = [(span.start, span.end) for span in one.spans]
        path = {
            0: [(0, 30), (30, 60), (60, LENGTH)],
            30: [(0, 30), (30, LENGTH)],
            60: [(0, 30), (30, 60), (60, LENGTH)],
        }
        assert bounds == path[one.head.fork]


def test_segments_are_worth_their_leaves() -> None:
    """Two first samples, one right; the wrong one goes on twice before each of two steps, the first time right."""
    algorithm, group = attnrl(expansion="all"), begun([0.0, 1.0])
    (growth,) = algorithm.growth(1, [group])
    forks = [fork for fork in growth.forks if fork.parent.number == 0]
    whole = grown(group, forks, lambda key: float(key.branch[0] in (0, 2)))
    (credit,) = algorithm.credit(2, [whole])
    by_key = {one.head.key: [span.advantage for span in one.spans] for one in credit.trained}
    # Right are 1 of 6 leaves' first samples, and two of four continuations: 3 of 6. Under the first segment 2 of 5 are
    # right, under the second 1 of 3.
    first, second, root = 2 / 5, 1 / 3, 3 / 6
    above = [2 * (first - root) / math.sqrt(5), ((second - root) + (second - first)) / math.sqrt(3)]
    stem = Key(0, 0, 0)
    assert by_key == {
        stem: pytest.approx([*above, (0 - root) + (0 - second)]),
        stem._replace(branch=(0,)): pytest.approx([above[0], (1 - root) + (1 - first)]),
        stem._replace(branch=(1,)): pytest.approx([above[0], (0 - root) + (0 - first)]),
        stem._replace(branch=(2,)): pytest.approx([*above, (1 - root) + (1 - second)]),
        stem._replace(branch=(3,)): pytest.approx([*above, (0 - root) + (0 - second)]),
    }


def test_first_samples_that_did_not_grow_count_and_are_not_trained() -> None:
    algorithm, group = attnrl(), begun([1.0] * 5 + [0.0])
    (growth,) = algorithm.growth(1, [group])
    grew = {fork.parent for fork in growth.forks}
    # The wrong one is among them.
    assert len(grew) == 3 and Key(0, 0, 5) in grew
    (credit,) = algorithm.credit(2, [grown(group, growth.forks, lambda key: 0.0)])
    assert {one.head.key._replace(branch=()) for one in credit.trained} == grew
    # Of 3 that did not grow, 3 that did and their 12 continuations 5 are right.
    (right,) = {one.spans[-1].advantage for one in credit.trained if one.head.reward == 1.0}
    assert right == pytest.approx((1 - 5 / 18) + (1 - 1 / 3))


def test_without_branches_it_is_twice_the_distance_from_the_mean() -> None:
    algorithm = attnrl(branching="none", drop_easy=False)
    assert algorithm.probes(1) == ()
    group = group_of([1.0, 0.0, 0.0, 1.0, 0.0, 0.0], [7] * 6)
    (growth,) = algorithm.growth(1, [group])
    assert growth.forks == ()
    (credit,) = algorithm.credit(1, [group])
    found = [one.spans[0].advantage for one in credit.trained]
    assert found == pytest.approx([2 * (reward - 1 / 3) for reward in group.rewards])


def test_easy_problems_are_left_out_below_the_mean_of_their_kind() -> None:
    algorithm = attnrl()
    groups = [begun([1.0] * 6, 0, mean=2.0), begun([1.0] * 6, 1, mean=4.0), begun([1.0] * 5 + [0.0], 2, mean=100.0)]
    easy, kept, other = algorithm.growth(1, groups)
    assert easy.left_out == "problems_dropped_easy" and easy.forks == ()
    assert len({fork.parent for fork in kept.forks}) == 3 and len({fork.parent for fork in other.forks}) == 3
    # The mean goes on over steps, and comes back from a checkpoint.
    again = attnrl()
    again.restore(json.loads(json.dumps(algorithm.state())))
    for one in (algorithm, again):
        assert one.growth(2, [begun([1.0] * 6, 3, mean=3.0)])[0].left_out == "problems_dropped_easy"
        assert one.growth(2, [begun([1.0] * 6, 3, mean=3.1)])[0].left_out is None
    assert attnrl(drop_easy=False).growth(1, groups)[0].left_out is None


def test_what_has_no_signal_is_left_out_and_moves_the_next_step() -> None:
    algorithm, right = attnrl(), begun([1.0] * 6)
    assert algorithm.plan(1).prompts == 4
    algorithm.growth(1, [right])
    (credit,) = algorithm.credit(1, [right])
    assert credit.left_out == "groups_without_variance" and not credit.trained
    # Where nothing carried a signal the most are asked: twice batch.prompts. So too where nothing was left to train.
    assert algorithm.plan(2).prompts == 8
    assert algorithm.numbers({}) == {"batch_prompts": 4} and algorithm.numbers({}) == {}
    easy = attnrl()
    assert [one.left_out for one in easy.growth(1, [right])] == ["problems_dropped_easy"]
    easy.credit(1, [])
    assert easy.plan(2).prompts == 8
    still = attnrl(adapt=0)
    still.growth(1, [right])
    still.credit(1, [right])
    assert still.plan(2).prompts == 4


def test_a_step_that_is_ahead_moves_by_the_step_that_asked_what_it_learns() -> None:
    algorithm = attnrl(ahead=1, adapt=0.5, prompts_most=100)
    group = begun([1.0] + [0.0] * 5)
    asked = []
    for step in range(1, 5):
        asked.append(algorithm.plan(step).prompts)
        (growth,) = algorithm.growth(step, [group])
        # In the first step there is nothing to learn from; later 20 sequences of a prompt's 30 where 4 x 30 are wanted.
        waited = grown(group, growth.forks[:8], lambda key: float(key.branch[0] % 2))
        assert all(one.counters["leaves"] == 20 for one in algorithm.credit(step, [waited] if step > 1 else []))
        # As it comes back from a checkpoint.
        again = attnrl(ahead=1, adapt=0.5, prompts_most=100)
        again.restore(json.loads(json.dumps(algorithm.state())))
        algorithm = again
    second = round(0.5 * 4 + 0.5 * 120 / 20 * 4)
    assert asked == [4, 4, second, round(0.5 * second + 0.5 * 120 / 20 * 4)]
    # A run that goes on with narrower bounds keeps them; so does one that ended, whose last step asked nothing.
    narrow = attnrl(ahead=1, prompts_most=6)
    narrow.restore(algorithm.state())
    assert narrow.plan(5).prompts == 6
    ended = algorithm.plan(5).prompts
    algorithm.credit(7, [])
    assert algorithm.plan(8).prompts == ended


def test_samples_without_a_place_to_branch_are_counted() -> None:
    algorithm, group = attnrl(), begun([1.0] + [0.0] * 5, places=(), by_score=0)
    (growth,) = algorithm.growth(1, [group])
    assert growth.forks == () and growth.counters["trees_without_branch"] == 6 and not growth.counters["trees"]
    (credit,) = algorithm.credit(2, [group])
    assert credit.left_out == "groups_without_trees"


def test_a_place_that_was_chosen_twice_is_gone_on_with_as_often() -> None:
    (growth,) = attnrl().growth(1, [begun([0.0] * 6, places=(30, 30), by_score=0)])
    assert [(fork.place, fork.count) for fork in growth.forks] == [(30, 4)] * 6


def test_continuations_without_a_reward_are_no_leaves() -> None:
    algorithm, group = attnrl(), begun([1.0] + [0.0] * 5)
    (growth,) = algorithm.growth(1, [group])
    (all_fail,) = algorithm.credit(2, [grown(group, growth.forks, lambda key: None)])
    assert all_fail.left_out == "groups_without_trees" and all_fail.counters == {"leaves_unscored": 24}
    (some,) = algorithm.credit(2, [grown(group, growth.forks, lambda key: None if key.branch[0] else 1.0)])
    assert some.counters == {"leaves_unscored": 18, "leaves": 12}


def sequence_of(text: str, before: int = 3) -> tuple[Any, Sequence]:
    tokenizer = Characters()
    ids = tokenizer.encode(text)
    tokens = np.array([0] * before + ids, np.int32)
    return tokenizer, Sequence(tokens, from_place(before, len(tokens)))


def test_branch_points_are_measured_in_the_response() -> None:
    text = "one.\n\ntwo.\n\nthree.\n\nfour.</think>\n\nfive.\n\nsix."
    tokenizer, sequence = sequence_of(text)
    settings = AttnrlSettings(gap=0, quantile=0.5)
    context = AlgorithmContext(200, group_size=6, tokenizer=tokenizer, thinking_end=ThinkingEnd(tokenizer))
    (probe,) = Attnrl(settings, context).probes(1)
    assert isinstance(probe.measures, Influence)
    starts = probe.measures.steps(sequence)
    own = [start - 3 for start in starts]
    assert [text[a:b].strip() for a, b in zip(own, [*own[1:], len(text)], strict=True)] == [
        "one.", "two.", "three.", "four.</think>", "five.", "six."
    ]  # fmt: skip
    mean, by_score, *places = probe.reduce(np.array([9.0, 1.0, 2.0, 9.0, 9.0, 9.0], np.float32), sequence)
    # The first step counts for nothing, nor what comes from the end of the thinking on.
    assert mean == pytest.approx(3 / 6) and by_score == 2 and places == own[1:3]
    (entropy,) = Attnrl(AttnrlSettings(branching="entropy", drop_easy=False), context).probes(1)
    values = np.zeros(len(text), np.float32)
    values[[4, 20, len(text) - 1]] = [1.0, 2.0, 3.0]
    # The last token is none.
    assert entropy.reduce(values, sequence) == [4, 20]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return load_all(tmp_path_factory.mktemp("tokenizers"))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_steps_are_those_of_the_text_whatever_the_tokenizer(
    tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    """Against a look at every prefix: in words and in single bytes, with separators within tokens and over several."""
    tokenizer = choose(tokenizers, kind)
    ids: list[int] = []
    for text in data.draw(st.lists(st.sampled_from(["x is 12,", "\n\n", "\n", "答案 ", "4</think>\n\n"]), min_size=1)):
        ids += byte_ids(tokenizer, kind, text) if data.draw(st.booleans()) else tokenizer.encode(text)
    starts = step_starts(pieces_of(tokenizer, ids))
    seen = [tokenizer.decode(ids[:count]) for count in range(len(ids) + 1)]
    for separator in ("\n\n", "\n"):
        counts = [text.count(separator) for text in seen]
        # Some decoders show nothing of bytes, line breaks too, before the character at their end is whole.
        ends = [place for place in range(1, len(ids)) if counts[place] > max(counts[:place])]
        if ends:
            break
    else:
        ends = list(range(1, len(ids)))
    assert starts == (0, *ends)
