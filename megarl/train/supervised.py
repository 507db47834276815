"""Mini-batches of worked solutions, for algorithms that need no rollouts."""

from __future__ import annotations

import numpy as np

from megarl.algorithms.objective import BatchTotals
from megarl.data.packing import balance
from megarl.data.tokenizer import response_ids
from megarl.errors import Refusal
from megarl.records import Prompt, Sequence
from megarl.train.session import Session


def batches(session: Session) -> tuple[list[list[Sequence]], list[BatchTotals]]:
    """The next step's mini-batches: this rank's sequences, and the counts of each whole mini-batch.

    A solution longer than `rollout.max_tokens` is cut there and counted as `solutions_cut`.
    """
    config = session.config
    with session.clock.phase("data"):
        prompts = [session.data.prompts[i] for i in session.stream.take(config.batch.prompts)]
        sequences = [_sequence(session, prompt, number) for number, prompt in enumerate(prompts)]
        made: list[list[Sequence]] = []
        totals: list[BatchTotals] = []
        for part in np.array_split(np.arange(len(sequences)), config.batch.updates):
            members = [sequences[i] for i in part]
            if len(members) < session.grid.data:
                raise Refusal(
                    f"batch.prompts={config.batch.prompts}",
                    f"must give each of {session.grid.data} data-parallel ranks a sequence per update",
                    "raise batch.prompts or lower batch.updates",
                )
            shares = balance([s.length for s in members], session.grid.data)
            made.append([members[i] for i in shares[session.grid.data_rank]])
            totals.append(BatchTotals(float(sum(s.response_length for s in members)), float(len(members))))
    return made, totals


def _sequence(session: Session, prompt: Prompt, number: int) -> Sequence:
    assert prompt.solution is not None
    response = response_ids(session.tokenizer, prompt.solution)
    limit = session.config.rollout.max_tokens
    if len(response) > limit:
        session.counters.count("solutions_cut")
        response = response[:limit]
    return Sequence(
        tokens=np.array([*prompt.token_ids, *response], np.int32),
        prompt_length=len(prompt.token_ids),
        advantages=np.ones(len(response), np.float32),
        group=number,
    )
