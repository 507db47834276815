"""What of a step's groups is trained, where, and what is counted on the way; on groups made by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megarl.algorithms import build
from megarl.algorithms.base import Algorithm, AlgorithmContext
from megarl.algorithms.objective import BatchTotals
from megarl.config.algorithms import ALGORITHM_SETTINGS
from megarl.config.schema import RunConfig
from megarl.parallel.bootstrap import World
from megarl.records import Prompt, Sample, Sequence
from megarl.train.groups import Rollouts, Score, Target
from megarl.train.rollouts import _drop_reason
from megarl.train.route import Item, MiniBatch, assign, deliver
from megarl.train.selection import items_of, step_items

#: Of an answer: reward, tokens, and those of its thinking.
Answer = tuple[float | None, int, int | None]


def algorithm_of(name: str, **settings: Any) -> Algorithm:
    made = build(ALGORITHM_SETTINGS[name].model_validate({"name": name} | settings), AlgorithmContext(64, 2))
    made.begin_step(1)
    return made


def step_of(*groups: list[Answer], targets: dict[int, int] | None = None) -> Rollouts:
    """Groups of equal size, all kept, held by this rank; `targets` are lengths of explanations by group.

    Group g's prompt has g + 1 tokens; answer k's are 100 g + 10 k and what follows, its log-probs -1, -2 and so on; an
    explanation's are 1000 (g + 1) and what follows.
    """
    rollouts = Rollouts(len(groups[0]))
    for group, answers in enumerate(groups):
        rollouts.prompts.append(Prompt(group, tuple(range(1, group + 2)), "", ""))
        for k, (reward, length, thinking) in enumerate(answers):
            number, first = group * len(answers) + k, 100 * group + 10 * k
            rollouts.scores[number] = Score(reward, length, True, 0, thinking)
            log_probs = tuple(float(-1 - place) for place in range(length))
            ids = tuple(range(first, first + length))
            rollouts.mine[number] = Sample(group, k, ids, log_probs, "stop", reward=reward)
        rollouts.kept.append(group)
    for group, length in (targets or {}).items():
        rollouts.targets[group] = [Target(0, 0, length, length - 1)]
        rollouts.my_targets[group, 0] = tuple(range(1000 * (group + 1), 1000 * (group + 1) + length))
    return rollouts


def batches_of(algorithm: Algorithm, rollouts: Rollouts, updates: int, data_parallel: int) -> list[MiniBatch]:
    items = step_items(algorithm, rollouts)
    return assign(rollouts, items, updates, data_parallel, together=algorithm.needs.pairs)


def spans_of(items: list[Item]) -> list[tuple[int, int, int, int]]:
    return [(item.group, item.number, item.start, item.end) for item in items]


# Items


def test_all_of_every_answer_is_trained_by_default() -> None:
    rollouts = step_of([(1.0, 5, None), (0.0, 3, None)])
    items = items_of(algorithm_of("grpo", std_epsilon=0.0), rollouts, 0)
    assert spans_of(items) == [(0, 0, 0, 5), (0, 1, 0, 3)]
    assert [item.advantage for item in items] == pytest.approx([1.0, -1.0])
    assert rollouts.counters == {}


def test_answers_without_a_trained_span_are_left_out_and_counted() -> None:
    """START's stage 1 trains the thinking; the second output has none. Its reward counts in the advantages."""
    rollouts = step_of([(1.0, 5, 2), (0.0, 6, None), (1.0, 7, 4)], [(0.0, 4, None), (1.0, 4, None), (1.0, 4, 1)])
    algorithm = algorithm_of("start", normalize_std=False)
    first = items_of(algorithm, rollouts, 0)
    assert spans_of(first) == [(0, 0, 0, 2), (0, 2, 0, 4)]
    assert [item.advantage for item in first] == pytest.approx([1 / 3, 1 / 3])
    assert rollouts.counters == {"samples_not_trained": 1}
    assert spans_of(items_of(algorithm, rollouts, 1)) == [(1, 2, 0, 1)]
    assert rollouts.counters == {"samples_not_trained": 3}


def test_the_second_stage_trains_the_response() -> None:
    rollouts = step_of([(1.0, 5, 2), (0.0, 6, None)])
    assert spans_of(items_of(algorithm_of("start", thinking_steps=0), rollouts, 0)) == [(0, 0, 2, 5)]
    assert rollouts.counters == {"samples_not_trained": 1}


def test_targets_come_after_the_answers() -> None:
    rollouts = step_of([(1.0, 5, None), (0.0, 3, None)], targets={0: 7})
    items = items_of(algorithm_of("exp_grpo"), rollouts, 0)
    assert spans_of(items) == [(0, 0, 0, 5), (0, 1, 0, 3), (0, 0, 0, 7)]
    assert [item.target for item in items] == [False, False, True]


def test_signals_go_with_their_answers() -> None:
    items = items_of(algorithm_of("nft"), step_of([(1.0, 5, None), (0.0, 3, None)]), 0)
    named = {name for item in items for name in item.signals}
    assert named
    algorithm, outcome = algorithm_of("nft"), step_of([(1.0, 5, None), (0.0, 3, None)]).outcome(0)
    for k, item in enumerate(items):
        assert item.signals == {name: values[k] for name, values in algorithm.signals(outcome).items()}


def test_groups_without_a_pair_are_left_out_and_counted() -> None:
    """exp_dpo with `rejected` wrong: group 1 has no wrong answer, group 2 no explanation."""
    right, wrong = (1.0, 4, None), (0.0, 3, None)
    rollouts = step_of([right, wrong], [right, right], [wrong, right], targets={0: 6, 1: 6})
    algorithm = algorithm_of("exp_dpo", rejected="wrong")
    assert spans_of(items_of(algorithm, rollouts, 0)) == [(0, 1, 0, 3), (0, 0, 0, 6)]
    assert rollouts.counters == {"samples_not_trained": 1}
    assert items_of(algorithm, rollouts, 1) == []
    assert rollouts.counters == {"samples_not_trained": 3, "groups_without_pair": 1}
    assert items_of(algorithm, rollouts, 2) == []
    assert rollouts.counters == {"samples_not_trained": 4, "groups_without_pair": 2}


def test_advantages_of_the_whole_step() -> None:
    """REINFORCE++ over the trained tokens of both groups: rewards 1, 0, 0, 0 of 5, 3, 1 and 1 tokens have the mean and
    the deviation 1/2. Targets have none, and groups that are not kept count nowhere."""
    rollouts = step_of(
        [(1.0, 5, None), (0.0, 3, None)], [(1.0, 90, None), (1.0, 90, None)], [(0.0, 1, None), (0.0, 1, None)]
    )
    rollouts.kept = [0, 2]
    items = step_items(algorithm_of("grpo", advantage="reinforce_pp", std_epsilon=0.0), rollouts)
    assert {group: [item.advantage for item in found] for group, found in items.items()} == {0: [1, -1], 2: [-1, -1]}

    # START's stage 1 trains 2 and 4 tokens; the second output of group 0, with reward 1, is not trained.
    rollouts = step_of([(1.0, 5, 2), (1.0, 6, None)], [(0.0, 7, 4), (0.0, 8, None)], targets={0: 7})
    items = step_items(algorithm_of("start", advantage="reinforce_pp", std_epsilon=0.0), rollouts)
    mean, std = 1 / 3, math.sqrt(2) / 3
    assert [item.advantage for item in items[0]] == pytest.approx([(1 - mean) / std, 0.0])
    assert items[0][1].target
    assert [item.advantage for item in items[1]] == pytest.approx([-mean / std])


# Mini-batches


def test_totals_are_those_of_the_whole_mini_batch() -> None:
    """Trained tokens and sequences of the answers, all tokens of their groups, and the targets apart."""
    rollouts = step_of(
        [(1.0, 5, 2), (0.0, 6, None)], [(1.0, 7, 3), (0.0, 8, 4)], [(1.0, 9, 5), (0.0, 2, 1)], [(1.0, 3, 1)] * 2
    )
    batches = batches_of(algorithm_of("start"), rollouts, 2, 1)
    assert [batch.totals for batch in batches] == [BatchTotals(9.0, 3.0, 26.0), BatchTotals(8.0, 4.0, 17.0)]
    rollouts = step_of([(1.0, 5, None), (0.0, 6, None)], [(1.0, 7, None), (0.0, 8, None)], targets={1: 10})
    batches = batches_of(algorithm_of("exp_grpo"), rollouts, 1, 2)
    assert [batch.totals for batch in batches] == [BatchTotals(26.0, 4.0, 26.0, 10.0, 1.0)]
    assert sorted(spans_of([item for share in batches[0].items for item in share])) == [
        (0, 0, 0, 5),
        (0, 1, 0, 6),
        (1, 0, 0, 7),
        (1, 0, 0, 10),
        (1, 1, 0, 8),
    ]


def test_only_kept_groups_are_trained() -> None:
    answers: list[Answer] = [(1.0, 4, None), (0.0, 4, None)]
    rollouts = step_of(answers, answers, answers)
    rollouts.kept.remove(1)
    (batch,) = batches_of(algorithm_of("grpo"), rollouts, 1, 1)
    assert [item.group for item in batch.items[0]] == [0, 0, 2, 2]
    assert batch.totals == BatchTotals(16.0, 4.0, 16.0)


def test_updates_with_fewer_sequences_than_ranks_are_left_out_and_counted() -> None:
    """The first update's two groups have one trained output, the second's four."""
    bad, good = (0.0, 4, None), (1.0, 4, 2)
    groups = [[bad, bad], [bad, good], [good, good], [good, good]]
    for ranks, left in ((1, [1, 4]), (2, [4]), (4, [4]), (5, [])):
        rollouts = step_of(*groups)
        batches = batches_of(algorithm_of("start"), rollouts, 2, ranks)
        assert [batch.totals.sequences for batch in batches] == left
        assert rollouts.counters.get("updates_without_data", 0) == 2 - len(left)


def test_pairs_are_counted_by_groups_and_stay_together() -> None:
    right, wrong = (1.0, 4, None), (0.0, 3, None)
    algorithm = algorithm_of("exp_dpo", rejected="wrong")
    for ranks, trained in ((1, True), (2, True), (3, False), (4, False)):
        # Two pairs of four sequences, and a group without an explanation.
        rollouts = step_of([wrong, right], [right, wrong], [wrong, wrong], targets={0: 9, 1: 2})
        batches = batches_of(algorithm, rollouts, 1, ranks)
        assert rollouts.counters.get("updates_without_data", 0) == (not trained)
        assert len(batches) == trained
        for share in batches[0].items if trained else ():
            groups = {item.group for item in share}
            assert sorted((item.group, item.target) for item in share) == [
                (group, target) for group in sorted(groups) for target in (False, True)
            ]


# Delivery


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[World]:
    """A world of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield World(0, 1, 0, 1, (0,), torch.device("cpu"))
    dist.destroy_process_group()


def delivered(algorithm: Algorithm, rollouts: Rollouts, world: World) -> list[Sequence]:
    config = RunConfig.model_validate(
        {"name": "case", "steps": 1, "model": {"path": "m"}, "algorithm": {"name": "grpo"}, "data": {"path": "d"}}
    )
    (sequences,) = deliver(rollouts, batches_of(algorithm, rollouts, 1, 1), config, world)
    return sequences


def test_tokens_before_the_span_are_context_and_those_after_it_are_cut(alone: World) -> None:
    answers: list[Answer] = [(1.0, 5, 2), (0.0, 4, 3)]
    rollouts = step_of(answers, answers)
    thinking = delivered(algorithm_of("start"), rollouts, alone)
    assert [list(s.tokens) for s in thinking] == [[1, 0, 1], [1, 10, 11, 12], [1, 2, 100, 101], [1, 2, 110, 111, 112]]
    assert [s.prompt_length for s in thinking] == [1, 1, 2, 2]
    assert [list(s.rollout_log_probs) for s in thinking if s.rollout_log_probs is not None] == [
        [-1.0, -2.0],
        [-1.0, -2.0, -3.0],
    ] * 2
    responses = delivered(algorithm_of("start", thinking_steps=0), rollouts, alone)
    assert [list(s.tokens[s.prompt_length :]) for s in responses] == [[2, 3, 4], [13], [102, 103, 104], [113]]
    assert [list(s.tokens[: s.prompt_length]) for s in responses] == [
        [1, 0, 1],
        [1, 10, 11, 12],
        [1, 2, 100, 101],
        [1, 2, 110, 111, 112],
    ]
    assert [list(s.rollout_log_probs) for s in responses if s.rollout_log_probs is not None] == [
        [-3.0, -4.0, -5.0],
        [-4.0],
    ] * 2
    for s in (*thinking, *responses):
        assert len(s.advantages) == s.response_length
        assert (s.advantages > 0).all() if s.sample == 0 else (s.advantages < 0).all()


def test_targets_have_no_values_of_sampled_answers(alone: World) -> None:
    rollouts = step_of([(1.0, 3, None), (0.0, 2, None)], targets={0: 4})
    *answers, target = delivered(algorithm_of("exp_grpo"), rollouts, alone)
    assert [answer.target for answer in answers] == [False, False] and target.target
    assert list(target.tokens) == [1, 1000, 1001, 1002, 1003] and target.prompt_length == 1
    assert target.rollout_log_probs is None and np.isnan(target.advantages).all() and len(target.advantages) == 4


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
    session: Any = SimpleNamespace(algorithm=algorithm_of(name))
    rollouts = step_of([(1.0, 4, None), (0.0, 4, None)], [(reward, 4, None) for reward in rewards])
    assert _drop_reason(session, rollouts, 1) == reason
    assert _drop_reason(session, rollouts, 0) is None
