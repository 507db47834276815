"""ExPO's rules: every refused configuration with its exact message, and those beside them that must pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megarl.config.load import load_config
from megarl.config.rules import broken_rules, check
from megarl.errors import Refusal

JUDGE = {"kind": "judge", "judge": {"url": "http://localhost:8000/v1", "model": "m"}}
#: Two prompts per update, of 8 answers each.
FOUR_RANKS = {
    "batch": {"prompts": 12, "updates": 6, "tokens_per_microbatch": 512},
    "parallel": {"processes": 4},
    "rollout": {"group_size": 8, "max_tokens": 64},
}

#: (algorithm, further settings of the run, message)
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"name": "exp_grpo", "explanation": {"template": "{prompt} Why?"}},
        {},
        "algorithm.explanation.template='{prompt} Why?': must contain {answer}. Fix: put {answer} where it belongs.",
    ),
    (
        {"name": "exp_dpo", "explanation": {"template": "Why {answer}?"}},
        {},
        "algorithm.explanation.template='Why {answer}?': must contain {prompt}. Fix: put {prompt} where it belongs.",
    ),
    (
        {"name": "exp_grpo", "explanation": {"answer_text": "\\boxed{}"}},
        {},
        "algorithm.explanation.answer_text='\\\\boxed{}': must contain {answer}. Fix: put {answer} where it belongs.",
    ),
    (
        {"name": "exp_grpo", "explanation": {"answer_text": "#### {answer}"}},
        {},
        "algorithm.explanation.answer_text='#### {answer}': must contain algorithm.explanation.answer_opening="
        "'\\\\boxed{', so that chains end alike in explanations and in sampled answers. "
        "Fix: write both for the same form of final answer.",
    ),
    (
        {"name": "exp_grpo", "explanation": {"max_tokens": 65}},
        {},
        "algorithm.explanation.max_tokens=65: must not exceed rollout.max_tokens=64, beyond which no response is "
        "trained. Fix: lower it, or raise rollout.max_tokens.",
    ),
    (
        {"name": "exp_grpo", "dynamic_sampling": True},
        {},
        "algorithm.dynamic_sampling=true: would drop the prompts that nobody solves, for which the explanations are "
        "made. Fix: turn it off, or set algorithm.explanation_weight=0.",
    ),
    (
        {"name": "exp_dpo", "explanation": {"per_prompt": 2}},
        {},
        "algorithm.explanation.per_prompt=2: must be 1: a pair has one chosen answer. Fix: remove it.",
    ),
    (
        {"name": "exp_grpo", "explanation": {"must_match": True}},
        {"reward": JUDGE},
        "algorithm.explanation.must_match=true: needs a reward that knows the right answer, and reward.kind=judge "
        "gives an opinion. Fix: set it to false, or choose another reward.kind.",
    ),
    (
        {"name": "exp_grpo", "explanation": {"max_prompt_tokens": 193}},
        {},
        "the algorithm's longest prompt=193 + rollout.max_tokens=64: must fit the model's 256 positions. "
        "Fix: make them 1 tokens shorter.",
    ),
    (
        {"name": "exp_dpo", "mode": "offline"},
        {"rollout": {"max_tokens": 64, "seeded": False}},
        "rollout.seeded=false: contradicts algorithm.mode=offline, in which a prompt always gets the same answers. "
        "Fix: remove it.",
    ),
    (
        {"name": "exp_dpo"},
        {"batch": {"prompts": 12, "tokens_per_microbatch": 255}},
        "batch.tokens_per_microbatch=255: must hold 2 sequences, "
        "2 x (data.max_prompt_tokens + rollout.max_tokens) = 256. Fix: use 256 or more.",
    ),
    # A pair stays on one rank, however many answers there are to choose from.
    (
        {"name": "exp_dpo"},
        FOUR_RANKS,
        "batch.prompts=12: gives an update 2 sequence(s), fewer than the 4 data-parallel ranks. "
        "Fix: use more prompts, fewer updates or fewer processes.",
    ),
]

#: A hinted question's default bound, 256 tokens beyond a plain one's, is more than the test's model has.
SHORT = {"max_prompt_tokens": 192}


def write(run: Path, algorithm: dict[str, Any], changes: dict[str, Any]) -> Path:
    settings = algorithm | {"explanation": SHORT | algorithm.get("explanation", {})}
    run.write_text(yaml.safe_dump(yaml.safe_load(run.read_text()) | {"algorithm": settings} | changes))
    return run


@pytest.mark.parametrize(("algorithm", "changes", "message"), REFUSED, ids=[message[:50] for _, _, message in REFUSED])
def test_refused(run_file: Path, algorithm: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    config = load_config(write(run_file, algorithm, changes))
    with pytest.raises(Refusal) as caught:
        check(config)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ({"name": "exp_grpo"}, {}),
        ({"name": "exp_dpo", "mode": "offline", "rejected": "wrong"}, {}),
        ({"name": "exp_dpo"}, {"rollout": {"max_tokens": 64, "seeded": False}}),
        ({"name": "exp_dpo"}, {"batch": {"prompts": 12, "tokens_per_microbatch": 256}}),
        ({"name": "exp_dpo"}, FOUR_RANKS | {"parallel": {"processes": 2}}),
        ({"name": "exp_grpo"}, FOUR_RANKS),
        ({"name": "exp_dpo"}, {"rollout": {"group_size": 1, "max_tokens": 64}}),
        ({"name": "exp_grpo", "explanation_weight": 0.0, "dynamic_sampling": True}, {}),
        # Without explanations their prompts need no room.
        ({"name": "exp_grpo", "explanation_weight": 0.0, "explanation": {"max_prompt_tokens": 4000}}, {}),
        ({"name": "exp_grpo", "explanation": {"per_prompt": 2, "max_tokens": 64, "must_match": True}}, {}),
        (
            {"name": "exp_grpo", "explanation": {"answer_opening": "####", "answer_text": "#### {answer}"}},
            {"reward": JUDGE},
        ),
    ],
)
def test_allowed(run_file: Path, algorithm: dict[str, Any], changes: dict[str, Any]) -> None:
    assert list(broken_rules(load_config(write(run_file, algorithm, changes)))) == []
