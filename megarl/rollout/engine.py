"""The in-process vLLM engine: token ids in, token ids and log-probs out.

Every process of the world holds one engine core, by vLLM's external launcher; consecutive
`rollout.tensor` ranks form a replica. Only calls that vLLM 0.24 and 0.32 both have are used, but where routing is
recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from vllm import EngineArgs, SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.llm_engine import LLMEngine

from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.errors import MegarlError
from megarl.parallel import progress
from megarl.records import FinishReason
from megarl.rollout import routing, vllm_setup
from megarl.rollout.arguments import engine_arguments, register_model_class
from megarl.rollout.draw import FixedAssignment, SharedCounter, WorkSource
from megarl.rollout.phases import NoSleeper, Phases
from megarl.rollout.seeds import hash_seed

T = TypeVar("T")

#: Engine steps after which a replica's ranks agree again whether to go on.
STEPS_BETWEEN_QUESTIONS = 32


@dataclass(frozen=True, slots=True)
class Request:
    """One response to generate: `prompt_token_ids` (P,), P ≥ 1; `index` comes back with the completion; `max_tokens`
    is a bound of its own, in place of the sampling's."""

    prompt_token_ids: tuple[int, ...]
    index: int
    seed: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The response to request `index`: `token_ids` (T,), stop token included; `log_probs` (T,) in nats
    of these ids under the sampling distribution (temperature, top-p and top-k applied).

    `routed_experts` int16 (P + T - 1, sparse layers, experts per token), where the engine records it: the experts of
    every token of prompt and response but the last, which the engine never computes; those of one token and layer in
    ascending order. Left out of comparisons. `version`: that of the weights that made it, as whoever filled the engine
    numbers them."""

    index: int
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: FinishReason
    routed_experts: np.ndarray | None = field(default=None, compare=False, repr=False)
    version: int = 0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. Temperature 0 is greedy. `stop_token_ids` are beside the engine's end tokens.

    `seed` starts the engine's shared generator, for requests without a seed of their own.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0


class Engine:
    """One replica's engine, as seen by one of its ranks. All ranks of the world construct it together.

    Its weights are undefined until the first push (`megarl.rollout.weights`), unless `load_weights` lets
    vLLM read them from `model.path`. `eos_token_ids` end a response. With `record_routing` completions come with
    the experts of their tokens. `config` is one that keeps `megarl.config.rules`. Raises `Refusal` for a model that
    this build of vLLM has no kernels for, and where routing cannot be recorded.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: ModelShape,
        *,
        eos_token_ids: Sequence[int],
        rank: int,
        world_size: int,
        load_weights: bool = False,
        record_routing: bool = False,
    ) -> None:
        arguments = engine_arguments(config, shape, load_weights=load_weights, record_routing=record_routing)
        self.num_replicas = world_size // config.rollout.tensor
        self.replica, self.replica_rank = divmod(rank, config.rollout.tensor)
        self.replica_group = _replica_group(config.rollout.tensor, world_size, rank)
        self.eos_token_ids = tuple(eos_token_ids)
        self._on_gpu = torch.cuda.is_available()
        self._max_concurrent = config.rollout.max_concurrent
        self._chunk = config.rollout.chunk
        self._calls = itertools.count()
        self.stop: Callable[[], bool] = lambda: False
        self.interrupted = False
        self.version = 0
        """That of the weights in the engine."""
        self.tokens_generated = 0
        """Of all finished requests so far."""
        # The unfinished requests.
        self._running: set[str] = set()
        self._parameters: Callable[[Request], SamplingParams] | None = None
        self._pumps = itertools.count()
        with vllm_setup.quiet(), vllm_setup.own_randomness(None), self._eager():
            register_model_class(shape.family)
            vllm_config = EngineArgs(**arguments).create_engine_config(UsageContext.ENGINE_CONTEXT)
            if record_routing:
                routing.switch_on(vllm_config)
            self._engine = LLMEngine.from_vllm_config(vllm_config, disable_log_stats=True)
        self.phases = Phases(GpuSleeper(self._engine) if self._on_gpu else NoSleeper())
        self._routing = self.call_worker(routing.RoutingRecorder) if record_routing else None
        if load_weights:
            self.phases.weights_written()

    @property
    def speaks(self) -> bool:
        """Whether this rank is the first of its replica, whose completions count."""
        return self.replica_rank == 0

    def fixed_assignment(self, total: int) -> FixedAssignment:
        """This replica's share of `total` requests, assigned in advance."""
        return FixedAssignment(total, self.replica, self.num_replicas)

    def shared_counter(self, total: int) -> SharedCounter:
        """This replica's view of a counter over `total` requests; all ranks of the world must call it alike."""
        store = dist.distributed_c10d._get_default_store()
        return SharedCounter(store, f"megarl/rollout/{next(self._calls)}", total, self._chunk, self.replica_group)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        work: WorkSource | None = None,
        on_finished: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """Generate this replica's part of `requests` and return its completions in index order.

        `requests` is the same list on all ranks of a replica; `work` says which positions of it are this
        replica's (all, where None). Every rank of the replica returns the same completions, and hands each to
        `on_finished` as soon as it is whole; what that submits is generated too. Where `stop` asks for it on the
        replica's first rank, requests are given up, and `interrupted` says so; later calls return nothing. A chunk is
        drawn between two engine steps whenever it fits, one at a time, so that replicas that start
        together share the work evenly and none waits for another's prompts.
        Raises `PhaseError` where the engine sleeps or was never filled.
        """
        completions: list[Completion] = []
        with self.generating(sampling):
            for completion in self._made_of(requests, work or FixedAssignment(len(requests), 0, 1)):
                completions.append(completion)
                if on_finished is not None:
                    on_finished(completion)
        return sorted(completions, key=lambda completion: completion.index)

    def _made_of(self, requests: Sequence[Request], work: WorkSource) -> Iterator[Completion]:
        """The completions of what is drawn of `requests`, as they come."""
        chunk: Sequence[int] | None = ()
        while chunk is not None and not self.interrupted:
            if self.has_room:
                chunk = work.draw()
                for position in chunk or ():
                    self.submit(requests[position])
            yield from self.pump()
        yield from self.collect()

    @contextmanager
    def generating(self, sampling: Sampling) -> Iterator[None]:
        """Inside, requests can be submitted and pumped, all sampled by `sampling`.

        The engine begins without cached prefixes and with random states of its own, seeded by sampling and replica.
        What is left unfinished is given up. Raises `PhaseError` where the engine sleeps or was never filled.
        """
        self.phases.require_ready()
        shared_seed = hash_seed("replica", sampling.seed, self.replica)
        self._parameters, self._pumps = self._parameter_factory(sampling), itertools.count()
        # Prefixes cached by earlier calls would change batch shapes, and with them last bits, from run to resumed run.
        self._engine.reset_prefix_cache()
        try:
            with vllm_setup.own_randomness(shared_seed), self._eager(), torch.inference_mode():
                yield
        finally:
            self._give_up()
            self._parameters = None

    @property
    def running(self) -> int:
        """How many submitted requests are unfinished."""
        return len(self._running)

    @property
    def has_room(self) -> bool:
        """Whether a chunk more fits beside the unfinished requests."""
        return len(self._running) + self._chunk <= max(self._max_concurrent, self._chunk)

    def submit(self, request: Request) -> None:
        """Let the engine work on a request from the next `pump` on; others may run already, but none of its index.

        All ranks of a replica must submit the same between the same two pumps: see `told`.
        """
        name = str(request.index)
        if self._parameters is None or name in self._running:
            raise MegarlError(f"request {name} submitted outside `generating`, or while one of its index runs")
        prompt = tokens_input(list(request.prompt_token_ids))
        self._engine.add_request(name, prompt, self._parameters(request))
        self._running.add(name)

    def pump(self) -> list[Completion]:
        """One step of the engine, if it has anything to do: the requests that finished in it.

        From time to time the replica's ranks agree whether to go on. Where not, everything is given up.
        """
        if next(self._pumps) % STEPS_BETWEEN_QUESTIONS == 0 and self._asked_to_stop():
            self._give_up()
        if not self._running:
            return []
        outputs = self._engine.step()
        progress.tick()
        finished = [one for one in outputs if one.finished]
        self._running.difference_update(one.request_id for one in finished)
        return [self._completion(one) for one in finished]

    def collect(self) -> Iterator[Completion]:
        """The completions as they come, until nothing runs any more, nor what was submitted on taking one."""
        while self._running:
            yield from self.pump()

    def told(self, value: T) -> T:
        """What `value` is on the replica's first rank, on all its ranks. Collective over them."""
        if self.replica_group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.replica_group, group_src=0)
        return values[0]

    def _give_up(self) -> None:
        if self._running:
            self._engine.abort_request(sorted(self._running))
            self._running.clear()

    def _asked_to_stop(self) -> bool:
        """What `stop` says on the replica's first rank, on all its ranks."""
        if self.interrupted:
            return True
        asked = torch.tensor([self.stop()])
        if self.replica_group is not None:
            dist.broadcast(asked, group=self.replica_group, group_src=0)
        self.interrupted = bool(asked)
        return self.interrupted

    def _parameter_factory(self, sampling: Sampling) -> Callable[[Request], SamplingParams]:
        """A function from a request to vLLM's sampling parameters."""
        stops = sorted({*self.eos_token_ids, *sampling.stop_token_ids})

        def parameters(request: Request) -> SamplingParams:
            return SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=request.max_tokens or sampling.max_tokens,
                stop_token_ids=stops,
                seed=request.seed if sampling.temperature > 0 else None,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )

        return parameters

    def _completion(self, output: Any) -> Completion:
        """Translate vLLM's RequestOutput. Raises `MegarlError` where vLLM gave a request up."""
        answer = output.outputs[0]
        if answer.finish_reason not in ("stop", "length"):
            raise MegarlError(f"vLLM ended request {output.request_id} with {answer.finish_reason!r}")
        # One log-prob per position, the chosen token's: `logprobs=0` asks for no others.
        log_probs = tuple(answer.logprobs.logprobs)
        experts = None
        if self._routing is not None:
            tokens = len(output.prompt_token_ids) + len(answer.token_ids) - 1
            experts = self._routing.experts_of(output, tokens)
        tokens = tuple(answer.token_ids)
        self.tokens_generated += len(tokens)
        return Completion(int(output.request_id), tokens, log_probs, answer.finish_reason, experts, self.version)

    def call_worker(self, function: Callable[..., T]) -> T:
        """`function(worker)` on this process's vLLM worker."""
        return self._engine.collective_rpc(function)[0]

    def weights_changed(self, version: int = 0) -> None:
        """After a push of the weights `version`: forget cached prefixes, whose keys and values belong to the old."""
        self.phases.weights_written()
        self.version = version
        self._engine.reset_prefix_cache()

    def wake_weights(self) -> None:
        """Make room for new weights."""
        self.phases.wake_weights()

    def wake_cache(self) -> None:
        """Make room for keys and values: the engine can generate."""
        self.phases.wake_cache()

    def sleep(self) -> None:
        """Give the engine's memory back."""
        self.phases.sleep()

    def close(self) -> None:
        """Shut vLLM's core down. It takes torch's default process group with it, so this comes last."""
        with vllm_setup.quiet():
            self._engine.engine_core.shutdown()

    @contextmanager
    def _eager(self) -> Iterator[None]:
        """Run vLLM's few torch-compiled helpers as they are on the CPU.

        With sequences of RL's lengths they gain nothing measurable there, and compiling them takes 10 to 15 seconds
        and a C++ compiler in the first generation.
        """
        if self._on_gpu:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield


class GpuSleeper:
    """vLLM's sleep mode at level 2: weights are not kept, because every wake-up is followed by a push."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def sleep(self) -> None:
        self._engine.sleep(level=2)

    def wake(self, tags: Sequence[str]) -> None:
        self._engine.wake_up(tags=list(tags))


def _replica_group(tensor: int, world_size: int, rank: int) -> dist.ProcessGroup | None:
    """The gloo group of this rank's replica, or None for replicas of one rank. Collective over the world."""
    if tensor == 1:
        return None
    mine = None
    for first in range(0, world_size, tensor):
        ranks = list(range(first, first + tensor))
        group = dist.new_group(ranks, backend="gloo")
        if rank in ranks:
            mine = cast(dist.ProcessGroup, group)
    return mine
