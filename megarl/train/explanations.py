"""Explanations of the reference answers: asked for beside the answers, and made into targets that hide the hint."""

from __future__ import annotations

from collections import Counter

from megarl.config.algorithms import ExplanationSettings
from megarl.data.explanations import hinted_prompt_ids, training_tokens
from megarl.parallel.exchange import gather_all
from megarl.records import Prompt, Sample
from megarl.rollout.engine import Request
from megarl.train.generation import Job, explanation_seed
from megarl.train.groups import Rollouts, Target
from megarl.train.session import Session

#: What all ranks learn of a group's targets: group, target, and the tokens where they are kept for later steps.
_Told = tuple[int, Target, tuple[int, ...] | None]


def jobs(session: Session, rollouts: Rollouts, step: int, first: int, start: int) -> list[Job]:
    """The explanations to generate for the groups from `first` on; their requests are numbered from `start`.

    None for an algorithm that wants none, for prompts whose explanation still serves, and for hinted questions that
    are too long, which are counted.
    """
    settings = session.algorithm.needs.explanations
    if settings is None:
        return []
    limit = settings.prompt_limit(session.config)
    made: list[Job] = []
    for group in range(first, len(rollouts.prompts)):
        prompt = rollouts.prompts[group]
        if _kept(session, settings, step, prompt) is not None:
            continue
        tokens = hinted_prompt_ids(session.config.data, settings, session.tokenizer, prompt)
        if len(tokens) > limit:
            rollouts.count("explanations_prompt_too_long")
            continue
        for number in range(settings.per_prompt):
            index = rollouts.sample_index(group, number, settings.per_prompt)
            seed = explanation_seed(session, step, prompt.index, index)
            request = Request(tuple(tokens), start + len(made), seed, settings.max_tokens)
            made.append(Job(group, number, request, "explanation"))
    return made


def tell_everyone(
    session: Session, rollouts: Rollouts, step: int, first: int, all_jobs: list[Job], samples: dict[int, Sample]
) -> None:
    """Make targets of this rank's explanations, and tell all ranks of them. Collective where explanations are made."""
    settings = session.algorithm.needs.explanations
    if settings is None:
        return
    keeps = settings.refresh_every > 1
    told: list[_Told] = []
    counters: Counter[str] = Counter()
    for position, sample in samples.items():
        job = all_jobs[position]
        if job.kind != "explanation":
            continue
        found = _target_tokens(session, settings, rollouts.prompts[job.group], sample, counters)
        if found is None:
            continue
        tokens, chain_length = found
        rollouts.my_targets[job.group, job.number] = tokens
        target = Target(job.number, session.world.rank, len(tokens), chain_length)
        told.append((job.group, target, tokens if keeps else None))
    for other_told, other_counters in gather_all((told, counters)):
        for group, target, tokens in other_told:
            rollouts.targets.setdefault(group, []).append(target)
            if tokens is not None:
                _keep(session, step, rollouts.prompts[group], target, tokens)
        for name, amount in other_counters.items():
            rollouts.count(name, amount)
    for targets in rollouts.targets.values():
        targets.sort(key=lambda target: target.number)
    if keeps:
        _take_kept(session, settings, rollouts, step, first)


def graded(session: Session) -> bool:
    """Whether explanations are graded as answers are: for `must_match`, and for the log where a reward says right or
    wrong and costs nothing."""
    settings = session.algorithm.needs.explanations
    return settings is not None and (settings.must_match or session.config.reward.kind in ("math", "boxed"))


def _target_tokens(
    session: Session, settings: ExplanationSettings, prompt: Prompt, sample: Sample, counters: Counter[str]
) -> tuple[tuple[int, ...], int] | None:
    """The tokens to learn and the length of their chain, or None for an explanation that is left out, and counted."""
    low, high = session.config.reward.bounds
    # Without a reward where no explanation is graded, see `graded`.
    matches = sample.reward is not None and sample.reward > (low + high) / 2
    counters["explanations_matching"] += matches
    if sample.finish_reason == "length":
        counters["explanations_truncated"] += 1
        return None
    if settings.must_match and not matches:
        counters["explanations_not_matching"] += 1
        return None
    found = training_tokens(session.tokenizer, settings, sample.token_ids, prompt.answer, session.stop_ids)
    if isinstance(found, str):
        counters[found] += 1
        return None
    if len(found[0]) > session.config.rollout.max_tokens:
        counters["explanations_too_long"] += 1
        return None
    counters["explanations"] += 1
    return found


def _kept(session: Session, settings: ExplanationSettings, step: int, prompt: Prompt) -> list | None:
    """What an earlier step made of the prompt's explanations: [step, {number: [chain_length, tokens]}]."""
    entry = session.texts.get(str(prompt.index))
    return entry if entry is not None and entry[0] < step < entry[0] + settings.refresh_every else None


def _keep(session: Session, step: int, prompt: Prompt, target: Target, tokens: tuple[int, ...]) -> None:
    entry = session.texts.get(str(prompt.index))
    if entry is None or entry[0] != step:
        entry = session.texts[str(prompt.index)] = [step, {}]
    # Of a prompt that was drawn twice in the step, the first group's. Keys as JSON has them.
    entry[1].setdefault(str(target.number), [target.chain_length, list(tokens)])


def _take_kept(session: Session, settings: ExplanationSettings, rollouts: Rollouts, step: int, first: int) -> None:
    """Targets of the groups from `first` on whose explanations still serve; rank 0 holds them. Forget what is old."""
    for group in range(first, len(rollouts.prompts)):
        entry = _kept(session, settings, step, rollouts.prompts[group])
        for number, (chain_length, tokens) in entry[1].items() if entry is not None else ():
            rollouts.targets.setdefault(group, []).append(Target(int(number), 0, len(tokens), chain_length))
            rollouts.count("explanations_reused")
            if session.world.is_first:
                rollouts.my_targets[group, int(number)] = tuple(tokens)
    kept = session.texts
    for name in [name for name, entry in kept.items() if entry[0] + settings.refresh_every <= step + 1]:
        del kept[name]
