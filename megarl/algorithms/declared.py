"""What an algorithm asks of a run, against what its settings declare: looked at before a run starts, and as plans come.

The settings are all that a start, a rehearsal and the rules know of an algorithm: which weights are kept or served, how
long a prompt may be, whether the data needs solutions. What is asked beyond that would fail later, and less clearly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from megarl.algorithms.base import Algorithm
from megarl.algorithms.plan import Generation, Plan, Probe
from megarl.config.implied import Implied
from megarl.config.parameter_sets import ADAPTER, POLICY
from megarl.config.schema import RunConfig
from megarl.errors import Refusal, TrainingStopped
from megarl.records import Prompt


def refusals(algorithm: Algorithm, config: RunConfig, first: Prompt | None = None) -> Iterator[Refusal]:
    """What is not there of what the algorithm asks for at its start, `first` being a prompt that it may see."""
    implied = Implied(config)
    beside = (ADAPTER,) if implied.adapter_optimizer is not None else ()
    trained = (POLICY, *beside, *implied.trained_sets)
    for objective in algorithm.objectives:
        for name in dict.fromkeys((objective.parameters, *objective.gradient_goes_to)):
            if name in trained:
                continue
            yield _refused(
                config,
                f"has an objective that trains the parameter set {name!r}, which its settings do not declare",
                f"return ParameterSet({name!r}, trains=True) from their parameter_sets",
            )
        first_of_pass = next(one for one in algorithm.objectives if one.in_pass == objective.in_pass)
        if (objective.parameters, objective.gradient_goes_to) != (
            first_of_pass.parameters,
            first_of_pass.gradient_goes_to,
        ):
            rule = f"has objectives in the pass {objective.in_pass!r} that differ in parameters or goes_to"
            yield _refused(config, rule, "give one of them another name with Objective.apart")
        for name in objective.under:
            yield from _unmeasured(config, name, "Objective.under")
        if objective.together and config.algorithm.sequences_together == 1:
            rule = "has an objective that sees groups together, for which its settings make no room in a micro-batch"
            yield _refused(config, rule, "set sequences_together in its settings to how many it sees")
    plan = algorithm.plan(1)
    yield from of_plan(plan, config)
    yield from of_probes(algorithm.probes(1), config)
    for generation in plan.generations:
        if first is not None and generation.prompt is not None:
            ids = generation.prompt(first)
            yield from () if isinstance(ids, str) else of_prompt(generation, ids, config)


def of_plan(plan: Plan, config: RunConfig) -> Iterator[Refusal]:
    """What of a step's plan goes beyond the settings."""
    settings, implied = config.algorithm, Implied(config)
    written = {one.name for one in implied.parameter_sets if one.generates} | {POLICY}
    if plan.solutions and not settings.learns_solutions:
        rule = "plans to learn solutions, for which its settings do not ask the data"
        yield _refused(config, rule, "let learns_solutions be true in its settings")
    if plan.generations and not settings.generates:
        rule = "plans generations, for which its settings ask no engine"
        yield _refused(config, rule, "set generates=True in its settings")
    if plan.grows and not settings.grows:
        rule = "plans to grow, for which its settings do not ask"
        yield _refused(config, rule, "set grows=True in its settings")
    several = {one.weights for one in plan.generations} != {POLICY}
    if plan.grows and (several or any(one.responder or one.learn for one in plan.generations)):
        rule = "plans to grow beside samples of other weights, of responders, or of which texts are made"
        yield _refused(config, rule, "let the policy write what grows, in one part, and learn it as it is")
    if (plan.prompts or 0) > settings.most_prompts(config):
        rule = f"plans {plan.prompts} prompts, and its settings' most_prompts are {settings.most_prompts(config)}"
        yield _refused(config, rule, "return the most that a step asks from most_prompts")
    if plan.demonstrations > implied.demonstrations:
        rule = f"plans {plan.demonstrations} demonstrations, and its settings and batch.demonstrations make "
        yield _refused(config, f"{rule}{implied.demonstrations}", "set learns_demonstrations=True in its settings")
    for one in plan.generations:
        responder = () if one.responder is None else (one.responder.weights,)
        for name in (one.weights, *responder):
            if name not in written:
                yield _refused(
                    config,
                    f"has {one.kind!r} written by the parameter set {name!r}, which its settings do not declare",
                    f"return ParameterSet({name!r}, generates=True) from their parameter_sets",
                )
        if one.responder is not None and not settings.answers_in_parts:
            rule = "plans a Responder, for whom its settings do not end the thinking apart"
            yield _refused(config, rule, "let answers_in_parts be true in its settings")
        if (one.max_tokens or 0) > config.rollout.max_tokens:
            yield Refusal(
                f"max_tokens={one.max_tokens} of the kind {one.kind!r} of algorithm.name={settings.name}",
                f"must not exceed rollout.max_tokens={config.rollout.max_tokens}",
                "lower it, or raise rollout.max_tokens",
            )


def of_probes(probes: Sequence[Probe], config: RunConfig) -> Iterator[Refusal]:
    """What of a step's probes goes beyond the settings."""
    for probe in probes:
        if probe.measures != "log_probs" and probe.parameters != POLICY:
            rule = f"wants more than log-probs under the parameter set {probe.parameters!r} (Probe {probe.name!r})"
            yield _refused(config, rule, "measure these under the policy's own weights")
        yield from _unmeasured(config, probe.parameters, f"Probe {probe.name!r}")


def of_prompt(generation: Generation, ids: Sequence[int], config: RunConfig) -> Iterator[Refusal]:
    """A refusal of a prompt of the algorithm's own that has more tokens than there is room for.

    What is trained itself, and not made a text first, follows that prompt in training too.
    """
    own, longest = config.data.max_prompt_tokens, Implied(config).longest_prompt
    most, setting = (own, "data.max_prompt_tokens") if generation.learn is None else (longest, "longest_prompt")
    if not 0 < len(ids) <= most:
        yield Refusal(
            f"a prompt of {len(ids)} tokens of the kind {generation.kind!r} of algorithm.name={config.algorithm.name}",
            f"must have 1 to {most} tokens, by {setting}",
            "give the name of a counter for such prompts, or make room for them",
        )


def of_text(kind: str, length: int, config: RunConfig) -> Iterator[Refusal]:
    """A refusal of a text to learn that has more tokens than there is room for."""
    if length > config.rollout.max_tokens:
        yield Refusal(
            f"a text of {length} tokens of the kind {kind!r} of algorithm.name={config.algorithm.name}",
            f"must not be longer than rollout.max_tokens={config.rollout.max_tokens}, as no response is",
            "learn None in its place, or raise rollout.max_tokens",
        )


def stop_at(refusals: Iterable[Refusal]) -> None:
    """Raise `TrainingStopped` with the first: what a run has learned before is kept. All ranks must see the same."""
    for refusal in refusals:
        raise TrainingStopped(str(refusal))


def _unmeasured(config: RunConfig, name: str, what: str) -> Iterator[Refusal]:
    """A refusal of log-probs under a parameter set that nobody measures."""
    implied = Implied(config)
    kept = [one.name for one in implied.parameter_sets if one.measures or one.trains]
    if name not in (POLICY, *kept, *(one.name for one in implied.served_sets)):
        yield _refused(
            config,
            f"wants log-probs under the parameter set {name!r} ({what}), which its settings do not declare",
            f"return ParameterSet({name!r}, measures=True) from their parameter_sets, or a ServedSet from served_sets",
        )


def _refused(config: RunConfig, rule: str, fix: str) -> Refusal:
    return Refusal(f"algorithm.name={config.algorithm.name}", rule, fix)
