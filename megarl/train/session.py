"""All parts of a run on this rank, built in the order in which they may fail: cheap first."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megarl import algorithms
from megarl.algorithms.base import Algorithm, AlgorithmContext
from megarl.config.implied import Implied
from megarl.config.model_shape import ModelShape, read_model_shape
from megarl.config.parameter_sets import POLICY, ParameterSet
from megarl.config.schema import RunConfig
from megarl.data.dataset import SKIPPED_SHARE, LoadedPrompts, evaluation_data, training_data
from megarl.data.sampler import MixedStream, PromptStream
from megarl.data.thinking import ThinkingEnd
from megarl.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from megarl.formats import checkpoint_folder
from megarl.parallel import terminal
from megarl.parallel.bootstrap import World
from megarl.parallel.groups import Grid
from megarl.policy import checkpoint
from megarl.policy.hf_weights import draw_random_weights, load_hf_weights
from megarl.policy.policy import Policy
from megarl.rewards.scorer import Scoring, build_scoring
from megarl.rollout.engine import Engine
from megarl.servers.log_probs import LogProbServer
from megarl.train.carry import Carry, Counters
from megarl.train.clock import Clock
from megarl.train.feed import Feed
from megarl.train.past import run_directory
from megarl.train.recorder import Recorder
from megarl.train.replica_host import ReplicaHost
from megarl.train.served_texts import ServedTexts
from megarl.train.stops import Stops
from megarl.weights.push import Push


@dataclass
class Progress:
    """Where the loop is; saved with every checkpoint, beside the states of `Session.carry`. `step` counts finished
    steps."""

    step: int = 0
    accuracy_before: float | None = None
    skipped_updates: int = 0
    evaluation_due: bool = False
    """An evaluation was begun and not finished."""


@dataclass
class Session:
    """One rank's view of a run. `engine`, `push` and the scorers are None where the run never generates, and
    `host` where it has no environment.

    `serving` names the parameter set that the engine was last filled with.
    """

    config: RunConfig
    shape: ModelShape
    world: World
    grid: Grid
    tokenizer: Tokenizer
    data: LoadedPrompts
    evaluation_data: LoadedPrompts | None
    stream: PromptStream | MixedStream
    algorithm: Algorithm
    policy: Policy
    engine: Engine | None
    host: ReplicaHost | None
    push: Push | None
    scorer: Scoring | None
    evaluation_scorer: Scoring | None
    thinking_end: ThinkingEnd
    recorder: Recorder
    clock: Clock
    progress: Progress
    counters: Counters
    texts: ServedTexts
    feed: Feed
    carry: Carry
    stops: Stops
    serving: str = POLICY
    served: Mapping[str, LogProbServer | None] = field(default_factory=dict)
    """The parameter sets that others serve, by name; None on ranks that another one asks for."""
    saved_step: int | None = None
    """The step of the newest checkpoint that this session saved or continues from."""
    rows: dict[str, Any] | None = None
    """Number and digest of the prompts that are trained on, once they are known (`differences.rows_of`)."""
    failures_told: set[str] = field(default_factory=set)
    """Of what a failure was said on the terminal: of the reward, of the environment."""

    def tell_failure(self, failure: str | None, of: str = "reward") -> None:
        """Say once how the reward, or something else, failed on an answer, where it did; all ranks know it."""
        if failure is None or of in self.failures_told:
            return
        self.failures_told.add(of)
        if self.world.is_first:
            terminal.say(f"{failure}; such answers are counted in metrics.jsonl, and this is said once")

    @functools.cached_property
    def problems_in_training_data(self) -> int:
        """How many of the evaluation's prompts are among those that are trained on, by their texts."""
        trained = {prompt.text for prompt in self.data.prompts}
        return sum(prompt.text in trained for prompt in self.evaluation_data.prompts) if self.evaluation_data else 0

    def close(self) -> None:
        """End what finds rewards and environments, flush what is recorded, and shut the engine down."""
        for helper in (self.scorer, self.evaluation_scorer, self.host):
            if helper is not None:
                helper.close()
        self.recorder.close()
        if self.engine is not None:
            self.engine.close()


def build(config: RunConfig, world: World, grid: Grid, stops: Stops, *, evaluate_only: bool = False) -> Session:
    """Build the session of this rank. Collective. Raises `Refusal` for data or checkpoints that cannot be used."""
    _seed_everything(config.seed)
    shape = read_model_shape(config.model.path)
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
    check_vocabulary(tokenizer, shape.vocab_size)
    eos = tuple({tokenizer.eos_token_id, *shape.eos_token_ids})
    algorithm = algorithms.build(config.algorithm, AlgorithmContext.of(config, shape, tokenizer))
    needs_solutions = Implied(config, evaluate_only).needs_solutions
    data = training_data(config, tokenizer, need_solution=needs_solutions)
    config = _with_steps(config, data)
    implied = Implied(config, evaluate_only)
    thinking_end = ThinkingEnd(tokenizer, config.rollout.thinking_end)
    if implied.marks_thinking:
        thinking_end.require_token()
    held_out = evaluation_data(config, tokenizer) if implied.evaluates else None
    recorder = Recorder(config, world.is_first, show=world.is_first)
    for key, loaded in (("data", data), ("evaluation", held_out)):
        if loaded is not None and loaded.skipped_share > SKIPPED_SHARE:
            recorder.status(f"warning: {key}: {loaded.sentence()}")
    served = _served_sets(implied, tokenizer, recorder, world, grid)
    engine = None
    if implied.has_engine:
        recorder.status("building the inference engine")
        engine = Engine(
            config,
            shape,
            eos_token_ids=eos,
            rank=world.rank,
            world_size=world.size,
            record_routing=implied.records_routing,
        )
        engine.stop = lambda: stops.too_late
        engine.sleep()
    scorer, evaluation_scorer = _scorers(config, engine, recorder, data, held_out)
    environment = config.rollout.environment
    host = None
    if engine is not None and environment is not None:
        host = ReplicaHost(environment, tokenizer, engine, data.prompts[0])
    recorder.status("building the policy")
    stream, counters, texts, feed = _stream(config, data), Counters(), ServedTexts(), Feed(config.steps)
    trains = [one.name for one in implied.parameter_sets if one.trains]
    policy = Policy(config, shape, world, grid, step_budget=implied.updates, trains=trains)
    _load_weights(policy, config, implied.parameter_sets)
    return Session(
        config=config,
        shape=shape,
        world=world,
        grid=grid,
        tokenizer=tokenizer,
        data=data,
        evaluation_data=held_out,
        stream=stream,
        algorithm=algorithm,
        policy=policy,
        engine=engine,
        host=host,
        push=Push(policy, engine) if engine is not None else None,
        scorer=scorer,
        evaluation_scorer=evaluation_scorer,
        thinking_end=thinking_end,
        recorder=recorder,
        clock=Clock(recorder.phase),
        progress=Progress(),
        counters=counters,
        texts=texts,
        feed=feed,
        carry=Carry({"stream": stream, "counters": counters, "texts": texts, "algorithm": algorithm}),
        stops=stops,
        served=served,
    )


def _served_sets(
    implied: Implied, tokenizer: Tokenizer, recorder: Recorder, world: World, grid: Grid
) -> dict[str, LogProbServer | None]:
    """The servers of log-probs, introduced to the rank of each replica that asks."""
    found: dict[str, LogProbServer | None] = {}
    # Of several that wait, one says so.
    say = recorder.status if world.is_first else terminal.say if grid.data_rank == 0 else None
    for one in implied.served_sets:
        longest = implied.longest_trained_sequence
        found[one.name] = LogProbServer(one, tokenizer, longest, say) if grid.reports else None
    return found


def _scorers(
    config: RunConfig,
    engine: Engine | None,
    recorder: Recorder,
    data: LoadedPrompts,
    evaluation_data: LoadedPrompts | None,
) -> tuple[Scoring | None, Scoring | None]:
    """What finds the rewards of rollouts, and of evaluations where these have a reward of their own."""
    if engine is None or not engine.speaks:
        return None, None
    replicas, say, own = engine.num_replicas, recorder.status, config.evaluation.reward
    scorer = build_scoring(config.reward, replicas, say, "reward", data.prompts[0])
    if own is None or evaluation_data is None:
        return scorer, None
    return scorer, build_scoring(own, replicas, say, "evaluation.reward", evaluation_data.prompts[0])


def _with_steps(config: RunConfig, data: LoadedPrompts) -> RunConfig:
    """`config` with the number of steps that its epochs take, the last of them begun if not whole."""
    if config.epochs is None:
        return config
    steps = math.ceil(config.epochs * len(data.prompts) / config.batch.prompts)
    return config.model_copy(update={"steps": steps, "epochs": None})


def _stream(config: RunConfig, data: LoadedPrompts) -> PromptStream | MixedStream:
    """The order of the prompts: all as one, or parts with weights."""
    weights = [part.weight for part in data.parts if part.weight is not None]
    if not weights:
        return PromptStream(len(data.prompts), config.seed, config.data.shuffle)
    return MixedStream([part.count for part in data.parts], weights, config.seed, config.data.shuffle)


def unfinished_directory(config: RunConfig) -> Path:
    """Where completions of steps that no checkpoint has are kept (`megarl.train.journal`)."""
    return run_directory(config) / "unfinished"


def _load_weights(policy: Policy, config: RunConfig, sets: Sequence[ParameterSet]) -> None:
    """Give the `sets` of parameters their weights, and leave the policy with the weights that the run begins with."""
    for one in sets:
        if one.checkpoint is not None:
            checkpoint.load(policy, checkpoint_folder.require(one.checkpoint, one.setting), optimizer=False)
            policy.keep(one.name)
    _load_start(policy, config)
    for one in sets:
        if one.checkpoint is None:
            policy.keep(one.name)


def _load_start(policy: Policy, config: RunConfig) -> None:
    if config.model.weights is not None:
        checkpoint.load(policy, checkpoint_folder.require(config.model.weights, "model.weights"), optimizer=False)
    elif config.model.random_init:
        draw_random_weights(policy, config.seed)
    else:
        load_hf_weights(policy, config.model.path)


def _seed_everything(seed: int) -> None:
    # Nothing in megarl draws from these; libraries might.
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
