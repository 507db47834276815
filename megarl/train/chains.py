"""The two properties of a good explanation (ExPO, arXiv 2507.02834), measured on the policy as it is.

In distribution: the chain's negative log-likelihood given the question alone, for the policy's own chains, its
explanations, and worked solutions where the data set has them. Useful: the log-likelihood of the reference answer
after the chain, log p(answer | question, chain), the chain's own final answer stripped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megarl.config.algorithms import ExplanationSettings
from megarl.data.explanations import training_tokens
from megarl.data.tokenizer import response_ids
from megarl.parallel.exchange import gather_all
from megarl.records import Prompt, Sequence
from megarl.train.groups import Rollouts
from megarl.train.session import Session

#: A chain with the reference answer after it: kind, group, tokens, and how many of them are the chain's.
_Chain = tuple[str, int, tuple[int, ...], int]


@dataclass(slots=True)
class _Sums:
    chain_nll: float = 0.0
    chain_tokens: int = 0
    answer_log_prob: float = 0.0
    chains: int = 0


def measure(session: Session, rollouts: Rollouts, step: int) -> dict[str, float]:
    """`{own,explanation,expert}_chain_nll` (nats per token) and `..._answer_log_prob` (nats per answer), where the
    algorithm asks for explanations and the step is one to measure in; empty otherwise.

    Over the first `measure_prompts` kept groups, one chain of each kind per group. Collective.
    """
    settings = session.algorithm.needs.explanations
    if settings is None or settings.measure_every == 0 or (step - 1) % settings.measure_every:
        return {}
    groups = rollouts.kept[: settings.measure_prompts]
    with session.clock.phase("measure"):
        # Every rank needs the few chains of its replica's share; which those are does not matter.
        parts = gather_all(_held(session, settings, rollouts, groups))
        chains = sorted(chain for part in parts for chain in part)
        chains += [c for g in groups for c in _expert(session, settings, g, rollouts.prompts[g])]
        mine = chains[session.grid.data_rank :: session.grid.data]
        sums = _sums(session, rollouts, mine)
        return _means(gather_all(sums if session.grid.reports else {}))


def _held(session: Session, settings: ExplanationSettings, rollouts: Rollouts, groups: list[int]) -> list[_Chain]:
    """Own chains and explanations of `groups` on this rank."""
    chains: list[_Chain] = []
    for group in groups:
        sample = rollouts.mine.get(group * rollouts.group_size)
        if sample is not None and sample.finish_reason == "stop":
            answer = rollouts.prompts[group].answer
            found = training_tokens(session.tokenizer, settings, sample.token_ids, answer, session.stop_ids)
            chains += [] if isinstance(found, str) else [("own", group, *found)]
        target = next(iter(rollouts.targets.get(group, ())), None)
        if target is not None and target.holder == session.world.rank:
            chains.append(("explanation", group, rollouts.my_targets[group, target.number], target.chain_length))
    return chains


def _expert(session: Session, settings: ExplanationSettings, group: int, prompt: Prompt) -> list[_Chain]:
    if prompt.solution is None:
        return []
    tokens = tuple(response_ids(session.tokenizer, prompt.solution))
    found = training_tokens(session.tokenizer, settings, tokens, prompt.answer, session.stop_ids)
    return [] if isinstance(found, str) else [("expert", group, *found)]


def _sums(session: Session, rollouts: Rollouts, chains: list[_Chain]) -> dict[str, _Sums]:
    limit = session.config.batch.tokens_per_microbatch
    sequences, kept = [], []
    for chain in chains:
        prompt = rollouts.prompts[chain[1]].token_ids
        if len(prompt) + len(chain[2]) <= limit:
            tokens = np.array([*prompt, *chain[2]], np.int32)
            sequences.append(Sequence(tokens, len(prompt), np.zeros(len(chain[2]), np.float32)))
            kept.append(chain)
    sums: dict[str, _Sums] = {}
    for (kind, _, _, length), values in zip(kept, session.policy.log_probs(sequences) or [], strict=False):
        entry = sums.setdefault(kind, _Sums())
        entry.chain_nll -= float(values[:length].sum())
        entry.chain_tokens += length
        # The end token after the answer is no part of it.
        entry.answer_log_prob += float(values[length:-1].sum())
        entry.chains += 1
    return sums


def _means(parts: list[dict[str, _Sums]]) -> dict[str, float]:
    values: dict[str, float] = {}
    for kind in ("own", "explanation", "expert"):
        found = [part[kind] for part in parts if kind in part]
        tokens, chains = sum(s.chain_tokens for s in found), sum(s.chains for s in found)
        if tokens:
            values[f"{kind}_chain_nll"] = sum(s.chain_nll for s in found) / tokens
            values[f"{kind}_answer_log_prob"] = sum(s.answer_log_prob for s in found) / chains
    return values
