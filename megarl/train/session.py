"""All parts of a run on this rank, built in the order in which they may fail: cheap first."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from megarl import algorithms
from megarl.algorithms.base import Algorithm, AlgorithmContext
from megarl.config.data import DEMONSTRATIONS
from megarl.config.implied import Implied
from megarl.config.model_shape import ModelShape, read_model_shape
from megarl.config.parameter_sets import ParameterSet
from megarl.config.schema import RunConfig
from megarl.data.dataset import SKIPPED_SHARE, LoadedPrompts
from megarl.data.thinking import ThinkingEnd
from megarl.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from megarl.formats import checkpoint_folder
from megarl.parallel import terminal
from megarl.parallel.bootstrap import World
from megarl.parallel.groups import Grid
from megarl.policy import checkpoint
from megarl.policy.adapter_files import load_adapter
from megarl.policy.hf_weights import draw_random_weights, load_hf_weights
from megarl.policy.policy import Policy
from megarl.rewards.scorer import build_scoring
from megarl.rollout.engine import Engine
from megarl.servers.log_probs import LogProbServer
from megarl.train import run_data
from megarl.train.carry import Carry, Counters, Progress
from megarl.train.clock import Clock
from megarl.train.feed import Feed
from megarl.train.inference import Inference
from megarl.train.memory import MemoryWatch
from megarl.train.past import run_directory
from megarl.train.recorder import Recorder
from megarl.train.replica_host import ReplicaHost
from megarl.train.run_data import RunData
from megarl.train.scoring import Grading
from megarl.train.stops import Stops
from megarl.train.text_cache import TextCache
from megarl.train.waiting import Place


@dataclass
class Session:
    """One rank's view of a run. Where it never grades, `grading` and `evaluation_grading` are None, and `host` where it
    has no environment."""

    config: RunConfig
    world: World
    grid: Grid
    tokenizer: Tokenizer
    data: RunData
    algorithm: Algorithm
    policy: Policy
    host: ReplicaHost | None
    inference: Inference
    grading: Grading | None
    evaluation_grading: Grading | None
    thinking_end: ThinkingEnd
    recorder: Recorder
    clock: Clock
    memory: MemoryWatch
    progress: Progress
    counters: Counters
    texts: TextCache
    feed: Feed
    carry: Carry
    stops: Stops
    served: Mapping[str, LogProbServer | None] = field(default_factory=dict)
    """The parameter sets that others serve, by name; None on ranks that another one asks for."""
    saved_step: int | None = None
    """The step of the newest checkpoint that this session saved or continues from."""

    def close(self) -> None:
        """End what finds rewards and environments, flush what is recorded, and shut the engine down."""
        for helper in (self.grading, self.evaluation_grading, self.host):
            if helper is not None:
                helper.close()
        self.recorder.close()
        if self.inference.engine is not None:
            self.inference.engine.close()


def build(
    config: RunConfig, world: World, grid: Grid, stops: Stops, *, evaluate_only: bool = False, warns: bool = True
) -> Session:
    """Build the session of this rank. Collective. `warns`: of rows that are skipped it says how many and why.

    Raises `Refusal` for data or checkpoints that cannot be used.
    """
    _seed_everything(config.seed)
    shape = read_model_shape(config.model.path)
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
    check_vocabulary(tokenizer, shape.vocab_size)
    eos = tuple({tokenizer.eos_token_id, *shape.eos_token_ids})
    algorithm = algorithms.build(config.algorithm, AlgorithmContext.of(config, shape, tokenizer))
    implied = Implied(config, evaluate_only)
    data = run_data.load(
        config,
        tokenizer,
        need_solution=implied.needs_solutions,
        evaluates=implied.evaluates,
        demonstrations=implied.demonstrations,
    )
    config = _with_steps(config, data.training)
    implied = Implied(config, evaluate_only)
    thinking_end = ThinkingEnd(tokenizer, config.rollout.thinking_end)
    if implied.marks_thinking:
        thinking_end.require_token()
    recorder = Recorder(config, world.is_first, show=world.is_first)
    if warns:
        _warn_of_skipped(data, recorder)
    served = _served_sets(implied, tokenizer, recorder, world, grid)
    engine = _engine(config, shape, implied, eos, recorder, world) if implied.has_engine else None
    if engine is not None:
        engine.stop = lambda: stops.too_late
    grading = functools.partial(
        Grading, tokenizer=tokenizer, thinking_end=thinking_end, splits_thinking=algorithm.splits_thinking
    )
    gradings = _gradings(config, engine, recorder.status, data, grading)
    environment = config.rollout.environment
    host = None
    if engine is not None and environment is not None:
        host = ReplicaHost(environment, tokenizer, engine, data.training.prompts[0])
    recorder.status("building the policy")
    counters, texts = Counters(), TextCache()
    place = Place.of(world.rank, world.size, config.rollout.tensor)
    feed = Feed(config.rollout.ahead, place, data.training.prompts)
    policy = Policy(
        config,
        shape,
        world,
        grid,
        step_budget=implied.updates,
        trains=[one for one in implied.parameter_sets if one.trains],
    )
    _load_weights(policy, config, implied.parameter_sets)
    clock, progress, memory = Clock(recorder.phase), Progress(), MemoryWatch(config.health.memory_growth_mib)
    return Session(
        config=config,
        world=world,
        grid=grid,
        tokenizer=tokenizer,
        data=data,
        algorithm=algorithm,
        policy=policy,
        host=host,
        inference=Inference(policy, engine, clock, memory, progress),
        grading=gradings[0],
        evaluation_grading=gradings[1],
        thinking_end=thinking_end,
        recorder=recorder,
        clock=clock,
        memory=memory,
        progress=progress,
        counters=counters,
        texts=texts,
        feed=feed,
        carry=Carry(
            {"stream": data.stream, "counters": counters, "texts": texts, "algorithm": algorithm} | data.other_streams,
            {"waiting": feed},
        ),
        stops=stops,
        served=served,
    )


def _engine(
    config: RunConfig, shape: ModelShape, implied: Implied, eos: tuple[int, ...], recorder: Recorder, world: World
) -> Engine:
    """The engine, asleep."""
    recorder.status("building the inference engine")
    engine = Engine(
        config,
        shape,
        eos_token_ids=eos,
        rank=world.rank,
        world_size=world.size,
        record_routing=implied.records_routing,
    )
    engine.sleep()
    return engine


def _warn_of_skipped(data: RunData, recorder: Recorder) -> None:
    demonstrations = None if data.demonstrations is None else data.demonstrations.data
    for key, loaded in (("data", data.training), (DEMONSTRATIONS, demonstrations), ("evaluation", data.held_out)):
        if loaded is not None and loaded.skipped_share > SKIPPED_SHARE:
            recorder.status(f"warning: {key}: {loaded.sentence()}")


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


def _gradings(
    config: RunConfig, engine: Engine | None, say: Callable[[str], None], data: RunData, grading: Callable[..., Grading]
) -> tuple[Grading | None, Grading | None]:
    """What finds the rewards of rollouts, and what those of evaluations: the same, but where these have a reward of
    their own."""
    if engine is None or not engine.speaks:
        return None, None
    replicas, own = engine.num_replicas, config.evaluation.reward
    one = grading(build_scoring(config.reward, replicas, say, "reward", data.training.prompts[0]))
    if own is None or data.held_out is None:
        return one, one
    return one, grading(build_scoring(own, replicas, say, "evaluation.reward", data.held_out.prompts[0]))


def _with_steps(config: RunConfig, data: LoadedPrompts) -> RunConfig:
    """`config` with the number of steps that its epochs take, the last of them begun if not whole; under rollout.ahead
    one more, which asks nothing."""
    if config.epochs is None:
        return config
    steps = math.ceil(config.epochs * len(data.prompts) / config.batch.prompts) + config.rollout.ahead
    return config.model_copy(update={"steps": steps, "epochs": None})


def unfinished_directory(config: RunConfig) -> Path:
    """Where completions of steps that no checkpoint has are kept (`megarl.train.journal`)."""
    return run_directory(config) / "unfinished"


def _load_weights(policy: Policy, config: RunConfig, sets: Sequence[ParameterSet]) -> None:
    """Give the `sets` of parameters their weights, and leave the policy with the weights that the run begins with."""
    for one in sets:
        if one.checkpoint is not None:
            if policy.network.adapter is not None:
                # The checkpoint may be of an adapter, whose base these are.
                _load_start(policy, config)
            checkpoint.load(policy, checkpoint_folder.require(one.checkpoint, one.setting), optimizer=False)
            policy.keep(one.name)
    _load_start(policy, config)
    for one in sets:
        if one.checkpoint is None:
            policy.keep(one.name, base=not policy.network.base_is_frozen)


def _load_start(policy: Policy, config: RunConfig) -> None:
    saved = None if config.model.weights is None else checkpoint_folder.require(config.model.weights, "model.weights")
    # A checkpoint of an adapter has no base.
    if saved is None or "adapter" in checkpoint_folder.read_progress(saved):
        if config.model.random_init:
            draw_random_weights(policy, config.seed)
        else:
            load_hf_weights(policy, config.model.path)
    if saved is not None:
        checkpoint.load(policy, saved, optimizer=False)
    adapter = Implied(config).adapter
    if adapter is not None and adapter.path is not None:
        load_adapter(policy, Path(adapter.path))


def _seed_everything(seed: int) -> None:
    # Nothing in megarl draws from these; libraries might.
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
