"""Every rule that spans several settings, in one place, checked before any process starts.

Torch-free. Which layout fits which model and how many processes stands in `megarl.config.layout_rules`, an
algorithm's own rules with its settings (`AlgorithmSettings.refusals`), those of the files on disk in
`megarl.config.files`, those of the `megatron:` and `vllm:` tables in `megarl.config.vendor_fields`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from megarl.config import (
    accelerations,
    adapter_rules,
    determinism,
    environments,
    files,
    fp8_rules,
    layout_rules,
    user_code,
    vendor_fields,
)
from megarl.config.algorithms.base import unusable as unusable_settings
from megarl.config.base import without_effect
from megarl.config.data import DEMONSTRATIONS, each_source, source_refusals
from megarl.config.grid import sequence_multiple
from megarl.config.implied import Implied
from megarl.config.model_shape import ModelShape, read_model_shape
from megarl.config.parameter_sets import POLICY
from megarl.config.rewards import BUILTIN_KINDS, RULE_KINDS, JudgeSettings, RewardSettings, RewardTerm, ScoreSettings
from megarl.config.schema import RunConfig
from megarl.config.wording import divisors, listed
from megarl.errors import Refusal

#: Fields of a chat-completions request that the judge's client fills, and what to do instead of giving them.
JUDGE_FIELDS = {
    "model": "set the judge's model",
    "messages": "set the judge's template and system",
    "temperature": "set the judge's temperature",
    "max_tokens": "set the judge's max_tokens",
    "max_completion_tokens": "set the judge's max_tokens and max_tokens_name",
    "stream": "replies are read whole",
    "n": "one verdict is asked for at a time",
}


def check(config: RunConfig, shape: ModelShape | None = None, processes: int | None = None) -> None:
    """Raise the first broken rule as a `Refusal`. Arguments as for `broken_rules`."""
    for refusal in broken_rules(config, shape, processes):
        raise refusal


def broken_rules(config: RunConfig, shape: ModelShape | None = None, processes: int | None = None) -> Iterator[Refusal]:
    """Yield each rule that `config` breaks.

    `shape` is the model's (default: read from model.path), `processes` the world that a launcher started (default:
    parallel.processes, or 1). Raises `Refusal` where the model cannot be read, and where the algorithm's settings are
    broken, of which rules ask.
    """
    yield from broken_setting_rules(config, shape, processes)
    yield from files.refusals(config)


def broken_setting_rules(
    config: RunConfig, shape: ModelShape | None = None, processes: int | None = None
) -> Iterator[Refusal]:
    """As `broken_rules`, without what must be on disk: for a run that is planned where its files are not."""
    yield from files.named(_broken_setting_rules(config, shape, processes))


def _broken_setting_rules(config: RunConfig, shape: ModelShape | None, processes: int | None) -> Iterator[Refusal]:
    for refusal in unusable_settings(config.algorithm, config):
        raise refusal
    world = processes or config.parallel.processes or 1
    if config.parallel.processes not in (None, world):
        yield Refusal(
            f"parallel.processes={config.parallel.processes}",
            f"differs from the {world} processes that the launcher started",
            "leave parallel.processes out under a launcher, or start that many",
        )
    yield from layout_rules.of_grid(config, world)
    shape = shape or read_model_shape(config.model.path)
    yield from layout_rules.of_model(config, shape)
    yield from chain(_data(config), _lengths(config, shape), _batch(config, world))
    yield from chain(
        config.algorithm.refusals(config), _reward(config), _schedule(config), _sampling(config, shape), _texts(config)
    )
    yield from chain(_consumer(config), _environment(config), _parameter_sets(config), _ahead(config))
    if config.algorithm.influence is not None:
        yield from config.algorithm.influence.refusals("algorithm.attention", shape.num_layers, shape.num_heads)
    yield from adapter_rules.refusals(config, shape)
    yield from fp8_rules.refusals(config, shape)
    yield from chain(vendor_fields.refusals("megatron", config.megatron), vendor_fields.refusals("vllm", config.vllm))
    yield from chain(_packages(config), accelerations.refusals(), determinism.refusals(config))


def _data(config: RunConfig) -> Iterator[Refusal]:
    data, evaluation = config.data, config.evaluation
    if data.path is None and not data.sources:
        yield Refusal("data.path=null", "names no data, and data.sources neither", "give a file or a hub name")
    yield from source_refusals("data", data.path, data.sources)
    yield from source_refusals("evaluation", evaluation.path, evaluation.sources)
    for number, source in enumerate(evaluation.sources):
        if source.weight is not None:
            yield Refusal(
                f"evaluation.sources.{number}.weight={source.weight:g}",
                "means nothing in an evaluation, which answers every row",
                "remove it, or use fewer rows with max_rows",
            )
    if data.system is not None and data.template is not None:
        yield Refusal(
            f"data.system={data.system!r}",
            "is never said, since data.template takes the place of the chat",
            "write it into data.template, or remove one of the two",
        )
    if config.algorithm.learns_solutions and any(one.settings.solution_column is None for one in each_source(data)):
        yield Refusal(
            "data.solution_column=null",
            f"must name the column of the worked solutions that algorithm.name={config.algorithm.name} learns",
            "set data.solution_column",
        )
    yield from _demonstrations(config)
    if config.epochs is not None and config.steps:
        yield Refusal(f"epochs={config.epochs:g}", f"contradicts steps={config.steps}", "give one: steps=null")


def _demonstrations(config: RunConfig) -> Iterator[Refusal]:
    settings, name = config.data.demonstrations, config.algorithm.name
    if not config.algorithm.learns_demonstrations:
        fix = "remove it, or choose an algorithm that learns demonstrations"
        rule = f"has no effect with algorithm.name={name}, which learns none"
        if settings is not None:
            yield Refusal(DEMONSTRATIONS, rule, fix)
        if config.batch.demonstrations is not None:
            yield Refusal(f"batch.demonstrations={config.batch.demonstrations}", rule, fix)
    elif settings is None:
        fix = "set data.demonstrations.path, and data.demonstrations.solution_column to the responses' column"
        yield Refusal(DEMONSTRATIONS, f"must be given: algorithm.name={name} learns demonstrations", fix)
    else:
        if settings.path is None and not settings.sources:
            rule = "names no data, and data.demonstrations.sources neither"
            yield Refusal("data.demonstrations.path=null", rule, "give a file or a hub name")
        yield from source_refusals(DEMONSTRATIONS, settings.path, settings.sources)


def _lengths(config: RunConfig, shape: ModelShape) -> Iterator[Refusal]:
    implied = Implied(config)
    prompt, longest_prompt = config.data.max_prompt_tokens, implied.longest_prompt
    what = "data.max_prompt_tokens" if longest_prompt == prompt else "the algorithm's longest prompt"
    for name, response in (("rollout", config.rollout.max_tokens), ("evaluation", config.evaluation.max_tokens)):
        if response is not None and longest_prompt + response > shape.max_positions:
            yield Refusal(
                f"{what}={longest_prompt} + {name}.max_tokens={response}",
                f"must fit the model's {shape.max_positions} positions",
                f"make them {longest_prompt + response - shape.max_positions} tokens shorter",
            )
    demonstration = implied.longest_demonstration
    if demonstration > config.rollout.max_tokens and prompt + demonstration > shape.max_positions:
        yield Refusal(
            f"data.max_prompt_tokens={prompt} + data.demonstrations.max_tokens={demonstration}",
            f"must fit the model's {shape.max_positions} positions",
            f"make them {prompt + demonstration - shape.max_positions} tokens shorter",
        )
    together = config.algorithm.sequences_together
    multiple = sequence_multiple(config.parallel.context)
    longest = implied.smallest_microbatch
    if config.batch.tokens_per_microbatch < longest:
        what, times = ("the longest sequence", "") if together == 1 else (f"{together} sequences", f"{together} x ")
        sizes = "data.max_prompt_tokens + rollout.max_tokens"
        if multiple > 1:
            sizes += f" up to a multiple of 2 x parallel.context = {multiple}"
        yield Refusal(
            f"batch.tokens_per_microbatch={config.batch.tokens_per_microbatch}",
            f"must hold {what}, {times}{f'({sizes})' if times else sizes} = {longest}",
            f"use {longest} or more",
        )


def _batch(config: RunConfig, world: int) -> Iterator[Refusal]:
    batch, parallel = config.batch, config.parallel
    if batch.prompts % batch.updates:
        yield Refusal(
            f"batch.updates={batch.updates}",
            f"must divide batch.prompts={batch.prompts}, so that every update gets an equal share",
            f"use {divisors(batch.prompts)}",
        )
        return
    if batch.generation_prompts is not None and batch.generation_prompts < batch.prompts:
        yield Refusal(
            f"batch.generation_prompts={batch.generation_prompts}",
            f"must be at least batch.prompts={batch.prompts}",
            "raise it, or remove it",
        )
    data_parallel = world // (parallel.tensor * parallel.pipeline * parallel.context)
    # Sequences that the loss sees together go to one rank together.
    alone = config.algorithm.generates and config.algorithm.sequences_together == 1
    sequences = batch.prompts // batch.updates * (config.rollout.group_size if alone else 1)
    if sequences < data_parallel:
        yield Refusal(
            f"batch.prompts={batch.prompts}",
            f"gives an update {sequences} sequence(s), fewer than the {data_parallel} data-parallel ranks",
            "use more prompts, fewer updates or fewer processes",
        )
    demonstrations = Implied(config).demonstrations
    if 0 < demonstrations // batch.updates < data_parallel or 0 < demonstrations < batch.updates:
        yield Refusal(
            f"batch.demonstrations={demonstrations}",
            f"gives an update {demonstrations // batch.updates}, fewer than the {data_parallel} data-parallel ranks",
            "use more demonstrations, fewer updates or fewer processes",
        )


def _reward(config: RunConfig) -> Iterator[Refusal]:
    yield from _reward_section("reward", config.reward)
    if config.evaluation.reward is not None:
        yield from _reward_section("evaluation.reward", config.evaluation.reward)
    if config.data.answer_column is not None:
        return
    # Of the questions of a suite the evaluation's reward alone scores.
    section = "reward" if config.evaluation.reward is None else "evaluation.reward"
    for name, one in (config.evaluation.reward or config.reward).named_parts(section):
        if one.kind in (*RULE_KINDS, "f1"):
            rule = f"leaves no reference, which {name}.kind={one.kind} compares with"
            yield Refusal("data.answer_column=null", rule, "name the column, or let a judge score")


def _reward_section(name: str, reward: RewardSettings) -> Iterator[Refusal]:
    """The rules of one section of reward settings; `name` is the section's key."""
    if reward.kind != "sum":
        yield from _one_reward(name, reward)
        if reward.terms:
            rule = f"are never asked, since {name}.kind={reward.kind}"
            yield Refusal(f"{name}.terms", rule, f"set {name}.kind=sum, or remove {name}.terms")
        return
    if not reward.terms:
        fix = f"list them in {name}.terms, each with a name, a kind and a weight"
        yield Refusal(f"{name}.kind=sum", "needs the rewards that it adds up", fix)
    names = [term.name for term in reward.terms]
    for doubled in sorted({one for one in names if names.count(one) > 1}):
        yield Refusal(f"{name}.terms with the name {doubled}", "must have a name each", "give one another name")
    for field, info in ScoreSettings.model_fields.items():
        value = getattr(reward, field)
        if field != "kind" and value != info.default:
            shown = f"{name}.{field}" if field == "judge" else f"{name}.{field}={value}"
            yield Refusal(shown, f"belongs to each term, since {name}.kind=sum", f"set it in {name}.terms")
    for number, term in enumerate(reward.terms):
        if term.weight == 0:
            yield Refusal(f"{name}.terms.{number}.weight=0", "must not be 0", "give another weight, or remove the term")
        yield from _one_reward(f"{name}.terms.{number}", term)


def _one_reward(name: str, reward: ScoreSettings) -> Iterator[Refusal]:
    if reward.low >= reward.high:
        yield Refusal(f"{name}.low={reward.low:g}", f"must be below {name}.high={reward.high:g}", "widen the range")
    if reward.kind not in BUILTIN_KINDS and not user_code.FORM.fullmatch(reward.kind):
        kinds = ", ".join(BUILTIN_KINDS if isinstance(reward, RewardTerm) else (*BUILTIN_KINDS, "sum"))
        rule = f"must be {kinds}, package.module:function or folder/file.py:function"
        yield Refusal(f"{name}.kind={reward.kind}", rule, f"correct {name}.kind")
    if reward.kind == "judge" and reward.judge is None:
        yield Refusal(f"{name}.kind=judge", "needs a judge to ask", f"set {name}.judge.url and {name}.judge.model")
    if reward.judge is not None:
        if reward.kind != "judge":
            rule = f"is never asked, since {name}.kind={reward.kind}"
            yield Refusal(f"{name}.judge", rule, f"set {name}.kind=judge, or remove {name}.judge")
        yield from _judge(f"{name}.judge", reward.judge)


def _judge(name: str, judge: JudgeSettings) -> Iterator[Refusal]:
    if judge.template is not None and "{response}" not in judge.template:
        yield Refusal(
            f"{name}.template={judge.template!r}",
            "must contain {response}",
            "put {response} where the answer belongs, and {question} and {reference} where they help",
        )
    for field in judge.extra.keys() & JUDGE_FIELDS.keys():
        rule = "is a field of the request that megarl fills itself"
        yield Refusal(f"{name}.extra.{field}", rule, f"remove it ({JUDGE_FIELDS[field]})")
    if judge.max_cost_per_step is not None and judge.input_price == judge.output_price == 0:
        yield Refusal(
            f"{name}.max_cost_per_step={judge.max_cost_per_step:g}",
            "needs prices to count by",
            f"set {name}.input_price and {name}.output_price",
        )


def _ahead(config: RunConfig) -> Iterator[Refusal]:
    """What goes on with samples that are there, from their midst or a step later."""
    rollout, algorithm, late = config.rollout, config.algorithm, config.rollout.ahead == 1
    if late and not algorithm.learns_late:
        rule = f"is not for algorithm.name={algorithm.name}, which learns from what the step's own weights wrote"
        yield Refusal("rollout.ahead=1", rule, "remove it")
    what = "rollout.ahead=1" if late else f"algorithm.name={algorithm.name}"
    if late and config.steps == 1 and config.epochs is None:
        yield Refusal("steps=1", "learns nothing with rollout.ahead=1, whose first step only asks", "make it 2 or more")
    if (late or algorithm.grows) and rollout.replay is not None:
        rule = f"cannot be with {what}, which goes on with samples that it has made"
        yield Refusal(f"rollout.replay={rollout.replay}", rule, "remove it")
    if late and config.moe.routing_replay != "off":
        rule = "cannot be with rollout.ahead=1, since no checkpoint keeps what the engine chose"
        yield Refusal(f"moe.routing_replay={config.moe.routing_replay}", rule, "set it to off, or remove rollout.ahead")


def _parameter_sets(config: RunConfig) -> Iterator[Refusal]:
    implied = Implied(config)
    kept, served = ({one.name for one in sets} for sets in (implied.parameter_sets, implied.served_sets))
    for name in sorted((kept | served) & {POLICY} | kept & served):
        rule = (
            "is the name of the policy's own weights" if name == POLICY else "is kept by this run and served by another"
        )
        yield Refusal(f"the parameter set {name!r}", f"{rule}, and a name stands for one", "give it another name")
    for one in implied.served_sets:
        if config.rollout.temperature != 1:
            yield Refusal(
                f"rollout.temperature={config.rollout.temperature:g}",
                f"must be 1 with {one.setting}, since a server gives the log-probs of the plain distribution",
                "remove it",
            )


def _schedule(config: RunConfig) -> Iterator[Refusal]:
    optimizer, checkpoint = config.optimizer, config.checkpoint
    if optimizer.min_lr > optimizer.lr:
        yield Refusal(
            f"optimizer.min_lr={optimizer.min_lr:g}", f"must not exceed optimizer.lr={optimizer.lr:g}", "lower min_lr"
        )
    elif optimizer.decay == "constant" and optimizer.min_lr < optimizer.lr:
        fix = "set optimizer.decay=linear or cosine, or remove it"
        yield from without_effect(optimizer, "optimizer", ("min_lr",), "with optimizer.decay=constant", fix)
    if config.resume == "never":
        return
    if not checkpoint.optimizer:
        rule = "needs the optimizer's state, which checkpoint.optimizer=false leaves out"
        yield Refusal(
            f"resume={config.resume}", rule, "set checkpoint.optimizer=true, or load weights alone with model.weights"
        )
    if checkpoint.every == 0 and not checkpoint.end:
        rule = "needs checkpoints, which checkpoint.every=0 with checkpoint.end=false never saves"
        yield Refusal(f"resume={config.resume}", rule, "set checkpoint.every")


def _sampling(config: RunConfig, shape: ModelShape) -> Iterator[Refusal]:
    rollout, evaluation = config.rollout, config.evaluation
    if rollout.top_k < 1 and rollout.top_k != -1:
        yield Refusal(f"rollout.top_k={rollout.top_k}", "must be -1 or at least 1", "use -1 to sample from all tokens")
    elif config.algorithm.generates and config.algorithm.draws_from_policy:
        truncated = {"top_p": rollout.top_p if rollout.top_p < 1 else None, "top_k": max(rollout.top_k, 0) or None}
        for name, value in truncated.items():
            if value is not None:
                yield Refusal(
                    f"rollout.{name}={value:g}",
                    f"samples from another distribution than the policy's, whose log-probs algorithm.name="
                    f"{config.algorithm.name} trains on: gradients and importance weights would be biased",
                    f"remove it; evaluation.{name} is free" if name == "top_p" else "remove it",
                )
    beyond = [token for token in rollout.stop_token_ids if not 0 <= token < shape.vocab_size]
    if beyond:
        yield Refusal(
            f"rollout.stop_token_ids={list(rollout.stop_token_ids)}",
            f"must be tokens of the model's vocabulary, 0 to {shape.vocab_size - 1}",
            f"remove {listed(beyond)}",
        )
    if evaluation.samples > 1 and evaluation.temperature == 0:
        yield Refusal(
            f"evaluation.samples={evaluation.samples}",
            "needs evaluation.temperature > 0, since greedy answers are all the same",
            "set evaluation.temperature, or samples to 1",
        )


def _consumer(config: RunConfig) -> Iterator[Refusal]:
    reward = config.evaluation.reward or config.reward
    section = "reward" if config.evaluation.reward is None else "evaluation.reward"
    for name, part in reward.named_parts(section):
        if config.evaluation.consumer is not None and part.graded != "response":
            yield Refusal(
                f"{name}.graded={part.graded}",
                "must be response with evaluation.consumer: only the response is the consumer's",
                f"set {name}.graded=response",
            )


def _environment(config: RunConfig) -> Iterator[Refusal]:
    settings = config.rollout.environment
    if settings is None:
        return
    yield from environments.refusals(settings, config.rollout.max_tokens)
    shown = f"rollout.environment.kind={settings.kind}"
    if not config.algorithm.takes_turns or config.algorithm.answers_in_parts:
        rule = f"answers between turns, and algorithm.name={config.algorithm.name} needs one thinking and one response"
        yield Refusal(shown, rule, "use another algorithm, or remove rollout.environment")
    if config.evaluation.consumer is not None:
        rule = "does not answer evaluation.consumer, which continues the policy's thinking"
        yield Refusal(shown, rule, "remove one of the two")


def _packages(config: RunConfig) -> Iterator[Refusal]:
    wanted = {"wandb": config.logging.wandb, "tensorboard": True if config.logging.tensorboard else None}
    for package, value in wanted.items():
        if value is None:
            continue
        without = f"leave logging.{package} out" if package == "wandb" else f"set logging.{package}=false"
        shown = f"logging.{package}={str(value) if value is not True else 'true'}"
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            # A folder of that name, such as the one that wandb writes to, can be imported too, and has nothing in it.
            yield Refusal(
                shown,
                f"needs the package {package}, which is not installed",
                f"install it (pip install {package}), or {without}",
            )
        elif Path(spec.origin) in (Path.cwd() / f"{package}.py", Path.cwd() / package / "__init__.py"):
            yield Refusal(
                shown, f"needs the package {package}, which {spec.origin} hides", f"rename that file, or {without}"
            )


def _texts(config: RunConfig) -> Iterator[Refusal]:
    data = config.data
    if data.template is not None and "{prompt}" not in data.template:
        yield Refusal(
            f"data.template={data.template!r}", "must contain {prompt}", "put {prompt} where the question belongs"
        )
    names = [column.rpartition(".")[2] for column in data.extra_columns]
    if len(set(names)) < len(names):
        yield Refusal(
            f"data.extra_columns={list(data.extra_columns)}",
            "must differ in what stands behind the last dots, the names by which a reward function gets them",
            "leave one of the like-named out",
        )
    if data.answer_pattern is None:
        return
    value, fix = f"data.answer_pattern={data.answer_pattern!r}", "write one pair of brackets around the answer"
    try:
        groups = re.compile(data.answer_pattern).groups
    except re.error as error:
        yield Refusal(value, f"must be a regular expression ({error})", fix)
        return
    if groups != 1:
        yield Refusal(value, f"must have exactly one group and has {groups}", fix)
