"""What of a step's groups is trained, where, and what is counted on the way; on groups made by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from group_case import group_of

from megarl.algorithms import build
from megarl.algorithms.base import Algorithm, AlgorithmContext, Credit, Group, Span, Trained
from megarl.algorithms.nft import Nft
from megarl.algorithms.objective import BatchTotals
from megarl.algorithms.plan import Generation, Plan
from megarl.config.algorithms import ALGORITHM_SETTINGS
from megarl.config.schema import RunConfig
from megarl.parallel.bootstrap import World
from megarl.records import Body, Key, Prompt, Sequence, Stretch
from megarl.train.groups import Kept, Made
from megarl.train.rollouts import keep
from megarl.train.route import CreditedGroup, MiniBatch, assign, deliver
from megarl.train.selection import credited_groups

#: Of an answer: reward, tokens, and those of its thinking.
Answer = tuple[float | None, int, int | None]


def algorithm_of(name: str, **settings: Any) -> Algorithm:
    return build(ALGORITHM_SETTINGS[name].model_validate({"name": name} | settings), AlgorithmContext(64, 2))


def step_of(*groups: list[Answer], explanations: dict[int, int] | None = None) -> Made:
    """Groups of equal size, held by this rank; `explanations` are lengths by group.

    Group g's prompt has g + 1 tokens; answer k's are 100 g + 10 k and what follows, its log-probs -1, -2 and so on; an
    explanation's are 1000 (g + 1) and what follows.
    """
    made: list[Group] = []
    bodies: dict[Key, Body] = {}
    for number, answers in enumerate(groups):
        rewards, lengths, thinking = zip(*answers, strict=True)
        explained = [] if number not in (explanations or {}) else [(explanations or {})[number]]
        prompt = Prompt(number, tuple(range(1, number + 2)), "", "")
        group = group_of(rewards, lengths, thinking, explanations=explained, number=number, prompt=prompt)
        for head in group.heads:
            first = 1000 * (number + 1) if head.key.kind == "explanation" else 100 * number + 10 * head.key.number
            ids = tuple(range(first, first + head.length))
            log_probs = () if head.key.kind == "explanation" else tuple(float(-1 - t) for t in range(head.length))
            bodies[head.key] = Body(ids, log_probs)
        made.append(group)
    return Made(tuple(made), bodies=bodies)


def credited(algorithm: Algorithm, groups: tuple[Group, ...]) -> tuple[list[CreditedGroup], dict[str, int]]:
    return credited_groups(groups, algorithm.credit(1, groups))


def batches_of(
    algorithm: Algorithm, groups: tuple[Group, ...], updates: int, data_parallel: int
) -> tuple[list[MiniBatch], dict[str, int]]:
    return assign(credited(algorithm, groups)[0], updates, data_parallel, together=algorithm.objectives[0].together)


def spans_of(items: Iterable[Trained]) -> list[tuple[str, int, int, int]]:
    """Kind and number, and start and end of what is trained, which must be in one piece."""
    return [(one.head.key.kind, one.head.key.number, *one.spans[0][:2]) for one in items if len(one.spans) == 1]


def advantages_of(items: Iterable[Trained]) -> list[float]:
    return [one.spans[0].advantage for one in items if one.head.key.kind == "answer"]


# What of a group is trained


def test_all_of_every_answer_is_trained_by_default() -> None:
    made = step_of([(1.0, 5, None), (0.0, 3, None)])
    ((_, items),), counters = credited(algorithm_of("grpo", std_epsilon=0.0), made.groups)
    assert spans_of(items) == [("answer", 0, 0, 5), ("answer", 1, 0, 3)]
    assert advantages_of(items) == pytest.approx([1.0, -1.0])
    assert counters == {}


def test_answers_without_a_trained_span_are_left_out_and_counted() -> None:
    """START's stage 1 trains the thinking; the second output has none. Its reward counts in the advantages."""
    made = step_of([(1.0, 5, 2), (0.0, 6, None), (1.0, 7, 4)], [(0.0, 4, None), (1.0, 4, None), (1.0, 4, 1)])
    ((_, first), (_, second)), counters = credited(algorithm_of("start", normalize_std=False), made.groups)
    assert spans_of(first) == [("answer", 0, 0, 2), ("answer", 2, 0, 4)]
    assert advantages_of(first) == pytest.approx([1 / 3, 1 / 3])
    assert spans_of(second) == [("answer", 2, 0, 1)]
    assert counters == {"samples_not_trained": 3}


def test_the_second_stage_trains_the_response() -> None:
    made = step_of([(1.0, 5, 2), (0.0, 6, None)])
    ((_, items),), counters = credited(algorithm_of("start", thinking_steps=0), made.groups)
    assert spans_of(items) == [("answer", 0, 2, 5)]
    assert counters == {"samples_not_trained": 1}


@pytest.mark.parametrize("name", ["grpo", "nft", "start", "exp_grpo", "exp_dpo"])
def test_what_another_has_put_there_is_never_trained(name: str) -> None:
    """Whatever an algorithm asks for: tokens of an environment or a hint are context."""
    group = group_of([1.0, 0.0], [10, 10], [9, 9], explanations=[5])
    mixed = (
        Stretch(0, 3, "policy", 0),
        Stretch(3, 5, "environment"),
        Stretch(5, 6, "policy", 0),
        Stretch(6, 7, "hint"),
        Stretch(7, 8, "environment"),
        Stretch(8, 10, "policy", 0),
    )
    heads = (replace(h, stretches=mixed) if h.key.kind == "answer" else h for h in group.heads)
    ((_, items),), _ = credited(algorithm_of(name), (replace(group, heads=tuple(heads)),))
    answers = [one for one in items if one.head.key.kind == "answer"]
    end = 9 if name == "start" else 10
    assert answers and all([span[:2] for span in one.spans] == [(0, 3), (5, 6), (8, end)] for one in answers)
    assert all(one.tokens == end - 4 for one in answers)
    assert all(len({str(span.advantage) for span in one.spans}) == 1 for one in answers)


def test_explanations_come_after_the_answers() -> None:
    made = step_of([(1.0, 5, None), (0.0, 3, None)], explanations={0: 7})
    ((_, items),), _ = credited(algorithm_of("exp_grpo"), made.groups)
    assert spans_of(items) == [("answer", 0, 0, 5), ("answer", 1, 0, 3), ("explanation", 0, 0, 7)]


def test_signals_go_with_their_answers() -> None:
    algorithm, made = algorithm_of("nft"), step_of([(1.0, 5, None), (0.0, 3, None)])
    assert isinstance(algorithm, Nft)
    signals = algorithm.signals(made.groups[0])
    ((_, items),), _ = credited(algorithm, made.groups)
    assert signals
    assert [one.signals for one in items] == [{name: values[k] for name, values in signals.items()} for k in range(2)]


def test_groups_without_a_pair_are_left_out_and_counted() -> None:
    """exp_dpo with `rejected` wrong: group 1 has no wrong answer, group 2 no explanation."""
    right, wrong = (1.0, 4, None), (0.0, 3, None)
    made = step_of([right, wrong], [right, right], [wrong, right], explanations={0: 6, 1: 6})
    ((_, first), (_, second), (_, third)), counters = credited(algorithm_of("exp_dpo", rejected="wrong"), made.groups)
    assert spans_of(first) == [("answer", 1, 0, 3), ("explanation", 0, 0, 6)]
    assert second == third == ()
    assert counters == {"samples_not_trained": 4, "groups_without_pair": 2}


def test_advantages_of_the_whole_step() -> None:
    """REINFORCE++ over the trained tokens of both groups: rewards 1, 0, 0, 0 of 5, 3, 1 and 1 tokens have the mean and
    the deviation 1/2. Groups that are not kept count nowhere."""
    made = step_of(
        [(1.0, 5, None), (0.0, 3, None)], [(1.0, 90, None), (1.0, 90, None)], [(0.0, 1, None), (0.0, 1, None)]
    )
    kept = (made.groups[0], made.groups[2])
    found, _ = credited(algorithm_of("grpo", advantage="reinforce_pp", std_epsilon=0.0), kept)
    assert [advantages_of(items) for _, items in found] == [[1, -1], [-1, -1]]

    # START's stage 1 trains 2 and 4 tokens; the second output of group 0, with reward 1, is not trained.
    made = step_of([(1.0, 5, 2), (1.0, 6, None)], [(0.0, 7, 4), (0.0, 8, None)])
    found, _ = credited(algorithm_of("start", advantage="reinforce_pp", std_epsilon=0.0), made.groups)
    mean, std = 1 / 3, math.sqrt(2) / 3
    assert [advantages_of(items) for _, items in found] == [
        pytest.approx([(1 - mean) / std]),
        pytest.approx([-mean / std]),
    ]


# Mini-batches


def totals(answers: tuple[float, float, float], explanations: tuple[float, float, float] | None = None) -> BatchTotals:
    counts = {"answer": BatchTotals(*answers)}
    return BatchTotals.of(counts if explanations is None else counts | {"explanation": BatchTotals(*explanations)})


def test_totals_are_those_of_the_whole_mini_batch() -> None:
    """Trained tokens and sequences of the answers, all tokens of their groups, and the explanations apart."""
    made = step_of(
        [(1.0, 5, 2), (0.0, 6, None)], [(1.0, 7, 3), (0.0, 8, 4)], [(1.0, 9, 5), (0.0, 2, 1)], [(1.0, 3, 1)] * 2
    )
    batches, _ = batches_of(algorithm_of("start"), made.groups, 2, 1)
    assert [batch.totals for batch in batches] == [totals((9.0, 3.0, 26.0)), totals((8.0, 4.0, 17.0))]
    made = step_of([(1.0, 5, None), (0.0, 6, None)], [(1.0, 7, None), (0.0, 8, None)], explanations={1: 10})
    batches, _ = batches_of(algorithm_of("exp_grpo"), made.groups, 1, 2)
    assert [batch.totals for batch in batches] == [totals((26.0, 4.0, 26.0), (10.0, 1.0, 10.0))]
    assert (batches[0].totals.tokens, batches[0].totals.sequences) == (36.0, 5.0)
    items = [item for share in batches[0].items for item in share]
    assert sorted((item.group.number, *spans_of([item.trained])[0]) for item in items) == [
        (0, "answer", 0, 0, 5),
        (0, "answer", 1, 0, 6),
        (1, "answer", 0, 0, 7),
        (1, "answer", 1, 0, 8),
        (1, "explanation", 0, 0, 10),
    ]


def test_updates_with_fewer_sequences_than_ranks_are_left_out_and_counted() -> None:
    """The first update's two groups have one trained output, the second's four."""
    bad, good = (0.0, 4, None), (1.0, 4, 2)
    made = step_of([bad, bad], [bad, good], [good, good], [good, good])
    for ranks, left in ((1, [1, 4]), (2, [4]), (4, [4]), (5, [])):
        batches, counters = batches_of(algorithm_of("start"), made.groups, 2, ranks)
        assert [batch.totals.sequences for batch in batches] == left
        assert counters.get("updates_without_data", 0) == 2 - len(left)


def test_pairs_are_counted_by_groups_and_stay_together() -> None:
    right, wrong = (1.0, 4, None), (0.0, 3, None)
    algorithm = algorithm_of("exp_dpo", rejected="wrong")
    for ranks, trained in ((1, True), (2, True), (3, False), (4, False)):
        # Two pairs of four sequences, and a group without an explanation.
        made = step_of([wrong, right], [right, wrong], [wrong, wrong], explanations={0: 9, 1: 2})
        batches, counters = batches_of(algorithm, made.groups, 1, ranks)
        assert counters.get("updates_without_data", 0) == (not trained)
        assert len(batches) == trained
        for share in batches[0].items if trained else ():
            groups = {item.group.number for item in share}
            assert sorted((item.group.number, item.trained.head.key.kind) for item in share) == [
                (group, kind) for group in sorted(groups) for kind in ("answer", "explanation")
            ]


# Delivery


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[World]:
    """A world of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield World(0, 1, 0, 1, (0,), torch.device("cpu"))
    dist.destroy_process_group()


def delivered(algorithm: Algorithm, made: Made, world: World) -> list[Sequence]:
    config = RunConfig.model_validate(
        {"name": "case", "steps": 1, "model": {"path": "m"}, "algorithm": {"name": "grpo"}, "data": {"path": "d"}}
    )
    batches, _ = batches_of(algorithm, made.groups, 1, 1)
    (sequences,) = deliver(made.bodies, [batch.items for batch in batches], config, world)
    return sequences


def test_tokens_before_the_span_are_context_and_those_after_it_are_cut(alone: World) -> None:
    answers: list[Answer] = [(1.0, 5, 2), (0.0, 4, 3)]
    made = step_of(answers, answers)
    thinking = delivered(algorithm_of("start"), made, alone)
    assert [list(s.tokens) for s in thinking] == [[1, 0, 1], [1, 10, 11, 12], [1, 2, 100, 101], [1, 2, 110, 111, 112]]
    assert [int(s.positions[0]) for s in thinking] == [1, 1, 2, 2]
    assert [list(s.rollout_log_probs) for s in thinking if s.rollout_log_probs is not None] == [
        [-1.0, -2.0],
        [-1.0, -2.0, -3.0],
    ] * 2
    responses = delivered(algorithm_of("start", thinking_steps=0), made, alone)
    assert [list(s.tokens[s.positions]) for s in responses] == [[2, 3, 4], [13], [102, 103, 104], [113]]
    assert [list(s.tokens[: s.positions[0]]) for s in responses] == [
        [1, 0, 1],
        [1, 10, 11, 12],
        [1, 2, 100, 101],
        [1, 2, 110, 111, 112],
    ]
    assert [list(s.rollout_log_probs) for s in responses if s.rollout_log_probs is not None] == [
        [-3.0, -4.0, -5.0],
        [-4.0],
    ] * 2
    for number, s in enumerate((*thinking, *responses)):
        assert s.advantages is not None and len(s.advantages) == s.trained and s.kind == "answer"
        assert (s.advantages > 0).all() if number % 2 == 0 else (s.advantages < 0).all()


@pytest.mark.parametrize("own_prompt", [(), (500, 501, 502)])
def test_what_an_environment_said_between_is_context(alone: World, own_prompt: tuple[int, ...]) -> None:
    """Also after a prompt of the environment's own, which travels with the answer."""
    made = step_of([(1.0, 7, None), (0.0, 3, None)])
    played, other = made.groups[0].heads
    stretches = (Stretch(0, 2, "policy", 0), Stretch(2, 5, "environment"), Stretch(5, 7, "policy", 0))
    played = replace(played, stretches=stretches, prompt_length=len(own_prompt) or None)
    group = replace(made.groups[0], heads=(played, other))
    bodies = dict(made.bodies) | {played.key: replace(made.bodies[played.key], prompt_ids=own_prompt or None)}
    first, second = delivered(algorithm_of("grpo"), replace(made, groups=(group,), bodies=bodies), alone)
    before = list(own_prompt or (1,))
    assert list(first.tokens) == [*before, 0, 1, 2, 3, 4, 5, 6]
    assert list(first.positions - len(before)) == [0, 1, 5, 6]
    assert first.rollout_log_probs is not None and list(first.rollout_log_probs) == [-1.0, -2.0, -6.0, -7.0]
    assert first.advantages is not None and len(first.advantages) == 4
    assert list(second.tokens) == [1, 10, 11, 12] and list(second.positions) == [1, 2, 3]


def test_targets_have_no_values_of_sampled_answers(alone: World) -> None:
    made = step_of([(1.0, 3, None), (0.0, 2, None)], explanations={0: 4})
    *answers, target = delivered(algorithm_of("exp_grpo"), made, alone)
    assert [answer.kind for answer in answers] == ["answer"] * 2 and target.kind == "explanation"
    assert list(target.tokens) == [1, 1000, 1001, 1002, 1003] and list(target.positions) == [1, 2, 3, 4]
    assert target.rollout_log_probs is None and target.advantages is None


# Groups that are dropped


@pytest.mark.parametrize(
    ("name", "rewards", "reason"),
    [
        ("grpo", (1.0, 0.0), None),
        ("grpo", (1.0, None), "groups_unscored"),
        ("grpo", (None, 0.0), "groups_unscored"),
        ("grpo", (None, None), "groups_unscored"),
        # Before the algorithm, which could say nothing of such a group.
        ("nft", (None, 1.0), "groups_unscored"),
        ("nft", (1.0, 1.0), "groups_all_right"),
        ("nft", (0.0, 1.0), None),
    ],
)
def test_a_group_with_an_unknown_reward_is_dropped(
    name: str, rewards: tuple[float | None, ...], reason: str | None
) -> None:
    made = step_of([(1.0, 4, None), (0.0, 4, None)], [(reward, 4, None) for reward in rewards])
    kept = keep(algorithm_of(name), Plan((Generation(2),)), Kept(), made.groups)
    assert [group.number for group in kept.groups] == ([0] if reason else [0, 1])
    assert kept.counters == ({"groups_dropped": 1, reason: 1} if reason else {})


def test_answers_that_nobody_was_to_grade_are_kept_without_a_reward() -> None:
    (group,) = step_of([(None, 4, None), (None, 4, None)]).groups
    assert len(keep(algorithm_of("grpo"), Plan((Generation(2, graded=False),)), Kept(), (group,)).groups) == 1


def test_what_cannot_be_trained_is_named() -> None:
    (group,) = step_of([(1.0, 5, None), (0.0, 3, None)]).groups
    head = group.answers[0]
    for spans in ([Span(2, 4), Span(0, 1)], [Span(0, 3), Span(2, 4)], [Span(0, 6)], [Span(3, 2)]):
        with pytest.raises(ValueError, match="must be in order, apart, and within them"):
            Trained(head, tuple(spans))
    with pytest.raises(ValueError, match="credited twice"):
        Credit((Trained(head, (Span(0, 1),)), Trained(head, (Span(2, 3),))))
    for kinds in (("answer", "answer"), ("answer", "solution")):
        with pytest.raises(ValueError, match=r"kinds .* must differ"):
            Plan(tuple(Generation(1, kind) for kind in kinds))
