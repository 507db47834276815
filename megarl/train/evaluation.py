"""Evaluation: greedy accuracy, or avg@k, on the held-out file, through the same engine and grader."""

from __future__ import annotations

from typing import Any

from megarl.parallel.exchange import gather_all
from megarl.rollout.engine import Request, Sampling
from megarl.rollout.seeds import hash_seed
from megarl.train.rollouts import generate, grade
from megarl.train.session import Session


def evaluate(session: Session) -> dict[str, Any]:
    """Answer every held-out prompt `evaluation.samples` times; the numbers are the same on every rank.

    Returns `accuracy` (share of answers with a reward above the middle of the reward's range) and, with the
    prefix `evaluation_`, `reward_mean`, `truncated_share`, `length_mean`, `problems` and `samples`.
    Collective; the engine must be awake with the current weights.
    """
    settings, rollout = session.config.evaluation, session.config.rollout
    assert session.engine is not None and session.evaluation_data is not None
    prompts, k = session.evaluation_data.prompts, settings.samples
    requests = [
        Request(p.token_ids, i * k + j, hash_seed("evaluation", session.config.seed, p.index, j))
        for i, p in enumerate(prompts)
        for j in range(k)
    ]
    sampling = Sampling(
        max_tokens=settings.max_tokens or rollout.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        stop_token_ids=rollout.stop_token_ids,
        seed=hash_seed("evaluation", session.config.seed),
    )
    completions = generate(session.engine, requests, sampling, session.config)
    mine: list[tuple[int, float, int, bool]] = []
    if session.grader is not None:
        graded = grade(session, session.grader, [prompts[c.index // k] for c in completions], completions)
        mine = [
            (c.index, g.reward, len(c.token_ids), c.finish_reason == "length")
            for c, g in zip(completions, graded, strict=True)
        ]
    answers = sorted(answer for part in gather_all(mine) for answer in part)
    middle = (session.config.reward.low + session.config.reward.high) / 2
    count = len(answers)
    return {
        "accuracy": sum(reward > middle for _, reward, _, _ in answers) / count,
        "evaluation_reward_mean": sum(reward for _, reward, _, _ in answers) / count,
        "evaluation_truncated_share": sum(cut for *_, cut in answers) / count,
        "evaluation_length_mean": sum(length for _, _, length, _ in answers) / count,
        "evaluation_problems": len(prompts),
        "evaluation_samples": k,
    }
