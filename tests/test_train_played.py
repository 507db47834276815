"""Samples of several turns from credit to training sequences, and on disk; and samples without a single token."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from group_case import group_of
from test_train_scoring import Opinions
from tokenizer_case import Characters

from megarl.algorithms import build
from megarl.algorithms.base import Algorithm, AlgorithmContext, Group
from megarl.algorithms.plan import Generation, Plan
from megarl.config.algorithms import ALGORITHM_SETTINGS
from megarl.config.schema import RunConfig
from megarl.environments.verdicts import Said
from megarl.parallel.bootstrap import World
from megarl.records import Body, Head, Key, Prompt, Sequence, Stretch, Trajectory
from megarl.rewards.scorer import Part, Scoring
from megarl.rollout.engine import Completion
from megarl.rollout.play import Task
from megarl.train import evaluation, played
from megarl.train.generation import jobs, tasks_of
from megarl.train.groups import Made, draw
from megarl.train.outputs import Output
from megarl.train.replay import read_samples, save_samples
from megarl.train.route import assign, deliver
from megarl.train.scoring import Grading
from megarl.train.selection import credited_groups

NAN = float("nan")
#: The policy writes 3 tokens, reads 2, writes 1, reads 1 and writes 2.
TURNS = (
    Stretch(0, 3, "policy", 4),
    Stretch(3, 5, "environment", 4),
    Stretch(5, 6, "policy", 4),
    Stretch(6, 7, "environment", 4),
    Stretch(7, 9, "policy", 4),
)
MINE, THEIRS = [0, 1, 2, 5, 7, 8], [3, 4, 6]
#: Rewards of a group's answers: of one turn, of several after a prompt of the environment's, of one that failed before
#: its first turn.
REWARDS = (0.0, 1.0, 0.0)
SMALL = {"name": "case", "steps": 1, "model": {"path": "m"}, "algorithm": {"name": "grpo"}, "data": {"path": "d"}}
NAMES = ["grpo", "nft", "exp_grpo", "exp_dpo"]


def algorithm_of(name: str, **settings: Any) -> Algorithm:
    return build(ALGORITHM_SETTINGS[name].model_validate({"name": name} | settings), AlgorithmContext(64, 3))


def made_by_turns(rewards: tuple[float, float, float] = REWARDS) -> Made:
    """Two groups of prompts of one and two tokens; the second answer of each was asked [90, 91, 92] by its environment,
    and what it reads is 60 and what follows."""
    groups: list[Group] = []
    bodies: dict[Key, Body] = {}
    for number in range(2):
        prompt = Prompt(number, tuple(range(1, number + 2)), "", "")
        group = group_of(rewards, (4, 9, 0), explanations=[3], number=number, prompt=prompt)
        heads = list(group.heads)
        heads[1] = replace(heads[1], stretches=TURNS, prompt_length=3)
        groups.append(replace(group, heads=tuple(heads)))
        for head in heads:
            ids = [100 * number + 10 * head.key.number + place for place in range(head.length)]
            log_probs = [] if head.key.kind == "explanation" else [-1.0 - place for place in range(head.length)]
            if head is heads[1]:
                for place in THEIRS:
                    ids[place], log_probs[place] = 60 + place, NAN
            own = (90, 91, 92) if head is heads[1] else None
            bodies[head.key] = Body(tuple(ids), tuple(log_probs), prompt_ids=own)
    return Made(tuple(groups), bodies=bodies)


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_takes_samples_of_several_turns_and_of_none(name: str) -> None:
    made = made_by_turns()
    credited, counters = credited_groups(made.groups, algorithm_of(name).credit(1, made.groups))
    answers = {
        one.head.key.number: one for group, trained in credited for one in trained if one.head.key.kind == "answer"
    }
    # The preferred is an explanation, and rejected is the first answer.
    assert set(answers) == ({0} if name == "exp_dpo" else {0, 1})
    assert counters["samples_not_trained"] == 2 * (3 - len(answers))
    if 1 in answers:
        assert [span[:2] for span in answers[1].spans] == [(0, 3), (5, 6), (7, 9)]
        assert answers[1].tokens == len(MINE)
        assert len({span.advantage for span in answers[1].spans}) == 1


def test_an_answer_without_a_token_is_not_rejected() -> None:
    group = made_by_turns().groups[0]
    failed, empty = group.answers[0], group.answers[2]
    answered = replace(group.heads[1], prompt_length=None)
    without = replace(group, heads=(replace(empty, key=failed.key), answered, *group.heads[3:]))
    (credit,) = algorithm_of("exp_dpo", rejected="wrong").credit(1, [without])
    assert credit.left_out == "groups_without_pair"
    (credit,) = algorithm_of("exp_dpo", rejected="any").credit(1, [without])
    assert [one.head.key.number for one in credit.trained if one.head.key.kind == "answer"] == [1]


@pytest.mark.parametrize("name", ["grpo", "nft"])
def test_groups_of_failures_alone_have_nothing_to_train(name: str) -> None:
    heads = tuple(Head(Key(0, 0, k), 0, (), reward=0.0) for k in range(3))
    groups = (Group(0, Prompt(0, (1,), "", ""), 0, heads),)
    algorithm = algorithm_of(name)
    credited, counters = credited_groups(groups, algorithm.credit(1, groups))
    assert credited[0].trained == () and counters == {"samples_not_trained": 3}


@pytest.mark.parametrize("seeded", [False, True])
def test_environments_draw_apart_and_again_alike_whether_or_not_the_engine_does(seeded: bool) -> None:
    config = RunConfig.model_validate(SMALL | {"rollout": {"seeded": seeded}})
    plan = Plan((Generation(4),))
    prompts = [Prompt(number, (1, 2), "", "") for number in (5, 6, 5)]  # the first comes twice

    def tasks(step: int) -> list[Task]:
        asked, _ = jobs(config, plan, step, draw(prompts), lambda generation, group: False)
        return tasks_of(config, step, asked)

    first, again, later = tasks(3), tasks(3), tasks(4)
    assert first == again
    assert [one.seed is not None for one in first] == [seeded] * 12
    assert len({one.environment_seed for one in first + later}) == 24


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[World]:
    """A world of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield World(0, 1, 0, 1, (0,), torch.device("cpu"))
    dist.destroy_process_group()


class Notes(Opinions):
    """A scorer that notes what is asked of it."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self._notes = notes

    def begin_step(self) -> None:
        self._notes.append("begin")

    def grade(self, items: Any) -> Any:
        self._notes.append("grade")
        return super().grade(items)


def test_an_evaluations_turns_are_graded_within_its_bounds(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What grading may cost in an evaluation begins anew before its first turn is graded, and not again after."""
    tokenizer, notes = Characters(), []
    config = RunConfig.model_validate(SMALL | {"evaluation": {"save": False}})
    scoring = Scoring([Part(config.reward, Notes(notes))], config.reward.bounds)

    def play(session: Any, tasks: list[Task], sampling: Any, own: Grading, *rest: Any) -> list[Output]:
        verdicts = played._verdicts(own, [Said(one.prompt, ((15, 62),), "stop") for one in tasks])
        assert [one.reward for one in verdicts] == [0.4] * 2
        return [Output(Completion(one.index, (15, 63), (), "stop")) for one in tasks]

    monkeypatch.setattr(evaluation, "play_outputs", play)
    nothing: Any = SimpleNamespace(name="", split=lambda *_: None)
    held_out = SimpleNamespace(prompts=[Prompt(n, (1,), "", "") for n in range(2)], source_names=())
    session: Any = SimpleNamespace(
        config=config,
        tokenizer=tokenizer,
        inference=SimpleNamespace(running_engine=SimpleNamespace(interrupted=False), work=lambda total: None),
        host=nothing,
        data=SimpleNamespace(held_out=held_out, held_out_in_training=0),
        evaluation_grading=Grading(scoring, tokenizer, nothing, splits_thinking=False),
        stops=SimpleNamespace(give_up_if=lambda asked: None),
        recorder=SimpleNamespace(failure=lambda failure: None),
    )
    assert evaluation.evaluate(session, "case")["evaluation_reward_mean"] == pytest.approx(0.5)
    assert notes == ["begin", "grade", "grade"]


def delivered(made: Made, world: World, routing: tuple[int, int] | None = None) -> list[Sequence]:
    config = RunConfig.model_validate(SMALL)
    credited, _ = credited_groups(made.groups, algorithm_of("grpo").credit(1, made.groups))
    batches, _ = assign(credited, 1, 1, together=False)
    lengths = [item.length for item in batches[0].items[0]]
    (sequences,) = deliver(made.bodies, [batch.items for batch in batches], config, world, routing)
    assert lengths == [sequence.length for sequence in sequences]
    return sequences


def test_routing_of_a_prompt_of_its_own(alone: World) -> None:
    made = made_by_turns()
    # Of three prompt tokens and eight of the response: layer l's expert for token t is 10 t + l.
    routed = (10 * np.arange(11)[:, None] + np.arange(2)).astype(np.int16)[:, :, None]
    bodies = {k: replace(b, routed_experts=routed if b.prompt_ids else None) for k, b in made.bodies.items()}
    for sequence in delivered(replace(made, bodies=bodies), alone, (2, 1)):
        assert sequence.routed_experts is not None
        known = routed if sequence.length == 12 else np.full((sequence.length - 1, 2, 1), -1)
        np.testing.assert_array_equal(sequence.routed_experts, known)


def test_saved_samples_of_several_turns_come_back(tmp_path: Path) -> None:
    key, other = Key(5, 0, 1), Key(5, 0, 2)
    head = Head(key, 3, TURNS, reward=0.5, prompt_length=3)
    texts = ("a", "b", "c", "d", "e")
    log_probs = tuple(NAN if place in THEIRS else -0.25 * place for place in range(9))
    body = Body(tuple(range(9)), log_probs, "abcde", 7, {"calculator_calls": 2}, (90, 91, 92), texts)
    plain = Trajectory(Head(other, 3, (Stretch(0, 1, "policy", 4),)), Body((9,), (-1.0,), "x", 8))
    file = save_samples(tmp_path, 1, 0, [Trajectory(head, body), plain])
    lines = [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]
    assert "prompt_ids" in lines[0] and not {"prompt_ids", "prompt_length", "texts"} & set(lines[1])
    found = read_samples(str(tmp_path), 1, [key, other], rank=0, size=1)
    # Whose weights of another run wrote them says nothing of this one's.
    unknown = tuple(one._replace(version=None) for one in head.stretches)
    assert found[0].head == replace(head, holder=0, stretches=unknown)
    assert [math.isnan(one) for one in found[0].body.log_probs] == [place in THEIRS for place in range(9)]
    mine = [found[0].body.log_probs[place] for place in MINE]
    assert mine == [log_probs[place] for place in MINE]
    assert replace(found[0].body, log_probs=()) == replace(body, log_probs=())
    assert found[1] == plain._replace(head=replace(plain.head, holder=0, stretches=(Stretch(0, 1, "policy"),)))
