"""The memory of every phase of a step, from the shards, the settings and the formulas of the activations.

What is resident when follows `megarl.policy.residence` and `megarl.rollout.phases`: the optimizer and the gradients
train alone, the policy's weights are there for training and pushing, the engine's for a push and generating.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from megarl.algorithms.base import Algorithm
from megarl.algorithms.objective import first_pass_is_old
from megarl.config.cluster import Cluster
from megarl.config.fp8 import BLOCKWISE
from megarl.config.implied import Implied
from megarl.config.influence import InfluenceSettings
from megarl.config.model_shape import ModelShape
from megarl.config.quantisation import BLOCK
from megarl.config.schema import RunConfig
from megarl.ops.fp8 import SLAB_BYTES
from megarl.rehearsal import activations
from megarl.rehearsal.engine import EngineMemory
from megarl.rehearsal.report import Amount, HostMemory, PhaseMemory, PhaseName, Work
from megarl.rehearsal.schedule import peak_of_chunks
from megarl.rehearsal.shards import Buffer, Shard
from megarl.reshard.wire import BYTES

#: Bytes of one of AdamW's two moments, and of the optimizer's own copy of a weight: fp32.
OPTIMIZER_ELEMENT = 4


@dataclass(frozen=True, slots=True)
class Run:
    """What the memory follows from. `replicas`: data-parallel size; `engine`: None where the run never generates."""

    config: RunConfig
    shape: ModelShape
    cluster: Cluster
    algorithm: Algorithm
    replicas: int
    engine: EngineMemory | None

    @property
    def work(self) -> Work:
        """An update of a replica."""
        return work_of(self.config, self.replicas)

    @property
    def implied(self) -> Implied:
        """What follows from the settings alone."""
        return Implied(self.config)


def work_of(config: RunConfig, replicas: int) -> Work:
    """Sequences and micro-batches of a replica's update, where all sequences are the longest."""
    batch, implied = config.batch, Implied(config)
    sequences = -(-implied.sequences_per_update // replicas)
    in_one = max(1, batch.tokens_per_microbatch // implied.longest_trained_sequence)
    count = -(-sequences // in_one)
    if (config.parallel.virtual_pipeline or 1) > 1:
        # The interleaved schedule wants a multiple of the stages.
        count = -(-count // config.parallel.pipeline) * config.parallel.pipeline
    return Work(sequences, count, batch.tokens_per_microbatch)


def phases_of(run: Run, shards: list[Shard]) -> list[PhaseMemory]:
    """Every phase of every stage."""
    found: list[PhaseMemory] = []
    for shard in shards:
        amounts: dict[PhaseName, Iterator[Amount]] = {"train": _train(run, shard)}
        late = run.config.rollout.ahead > 0
        measures = _is_measured(run) or late or run.config.algorithm.influence is not None
        if measures or not first_pass_is_old(run.algorithm.objectives, run.config.batch.updates):
            amounts["log-probs"] = _log_probs(run, shard)
        if run.implied.trained_sets:
            amounts |= {"train beside": _train_beside(run, shard), "save": _save(run, shard)}
        if run.engine is not None:
            amounts |= {"push": _push(run, run.engine, shard), "rollout": _rollout(run, run.engine)}
        for phase in get_args(PhaseName):
            if phase in amounts:
                own = tuple(amount for amount in amounts[phase] if amount.bytes)
                found.append(PhaseMemory(phase, shard.stage, own, run.cluster.gpu_memory))
    return found


def _train(run: Run, shard: Shard) -> Iterator[Amount]:
    """An update at the most that its micro-batches in flight keep, in the backward pass of a layer or of the head."""
    yield from _trained(run, shard)
    if any(one.apart for one in run.algorithm.objectives):
        # This rank's part of the gradients of one pass, while the next one fills the buffers.
        rebuilt = sum(one.rebuilt for one in run.implied.parameter_sets)
        aside = _shards_in_fp32(shard.trained) + rebuilt * _shards_in_fp32(shard.buffers)
        yield Amount("gradients set aside", aside, True)
    for one in run.implied.parameter_sets:
        if one.rebuilt:
            yield Amount(f"set {one.name}", weights(shard.buffers) + optimizer(shard.buffers), True)
    yield from _work(run, shard)


def _train_beside(run: Run, shard: Shard) -> Iterator[Amount]:
    """An update of a model that trains beside the policy, whose memory is away meanwhile."""
    name = run.implied.trained_sets[0]
    own = shard.buffers
    yield Amount(f"set {name}", weights(own) + gradients(own) + optimizer(own), True)
    yield Amount("FP8 weights", fp8_weights(run.config, shard), False)
    yield from _adapter(shard)
    yield Amount("gradients set aside", _shards_in_fp32(own + shard.adapter_buffers), True)
    yield Amount("reserved", run.cluster.reserved, False)
    yield from _work(run, shard)


def _save(run: Run, shard: Shard) -> Iterator[Amount]:
    """A checkpoint of all that trains: weights and optimizers, without gradients."""
    yield from _weights(run, shard)
    yield Amount("optimizer", optimizer(shard.trained), True)
    for name in run.implied.trained_sets:
        yield Amount(f"set {name}", weights(shard.buffers) + optimizer(shard.buffers), True)
    yield Amount("reserved", run.cluster.reserved, False)


def _work(run: Run, shard: Shard) -> Iterator[Amount]:
    """What passes with a gradient take beside what trains."""
    config, shape = run.config, run.shape
    tokens = run.config.batch.tokens_per_microbatch / config.parallel.context
    chunks = [activations.chunk_activations(config, shape, chunk) for chunk in shard.chunks]
    kept = peak_of_chunks(
        [chunk.kept for chunk in chunks], config.parallel.pipeline, shard.stage, run.work.micro_batches
    )
    layer = max(chunk.again + chunk.moving for chunk in chunks) * tokens
    # Gradients of a layer's weights are added to the buffers when they are complete.
    layer += shard.largest_layer * BYTES[config.params_dtype]
    head = 0
    if shard.chunks[-1].last:
        entropy = any(objective.entropy_gradient for objective in run.algorithm.objectives)
        head = activations.head_bytes(config, shape, int(tokens), backward=True, entropy_gradient=entropy)
    yield Amount("merged weights", merged_bytes(config, shard), False)
    yield Amount("activations", int(kept * tokens), False)
    yield Amount("backward pass", int(max(layer, head)), False)
    yield Amount("micro-batches", micro_batch_bytes(config, shape, run.work.sequences), False)


def _log_probs(run: Run, shard: Shard) -> Iterator[Amount]:
    """Passes without a gradient, under the reference's weights where these are needed."""
    config = run.config
    tokens = config.batch.tokens_per_microbatch / config.parallel.context
    layer = max(activations.forward_bytes(config, run.shape, chunk) for chunk in shard.chunks) * tokens
    head = 0
    if shard.chunks[-1].last:
        head = activations.head_bytes(config, run.shape, int(tokens), backward=False, entropy_gradient=False)
    yield from _trained(run, shard)
    yield Amount("merged weights", merged_bytes(config, shard), False)
    if _is_measured(run):
        yield Amount("weight set", weight_set(run, shard), True)
    yield Amount("forward pass", int(max(layer, head)), False)
    if config.algorithm.influence is not None:
        yield Amount("attention scores", score_bytes(config, run.shape, shard, config.algorithm.influence), False)
    yield Amount(
        "micro-batches", micro_batch_bytes(config, run.shape, run.work.sequences * config.batch.updates), False
    )


def score_bytes(config: RunConfig, shape: ModelShape, shard: Shard, settings: InfluenceSettings) -> int:
    """What `megarl.policy.influence` takes at its peak, of the longest sequence in one layer.

    In fp32 the keys, a block of queries with their logits and what the softmax makes of these, and twice what every key
    is worth. Under context parallelism there are beside these the keys of all tokens of the micro-batch in the layers'
    type, and three times, alone, while they are put in order.
    """
    layers = {layer for chunk in shard.chunks for layer in chunk.layers}
    if settings.layers is not None and layers.isdisjoint(settings.layers):
        return 0
    e, width = BYTES[config.params_dtype], shape.head_dim
    heads, keys = shape.num_heads // config.parallel.tensor, max(1, shape.num_kv_heads // config.parallel.tensor)
    gathered = e * config.batch.tokens_per_microbatch * keys * width if config.parallel.context > 1 else 0
    if settings.heads is not None:
        # Of the rank that has most of them, each with keys of its own.
        heads = keys = min(heads, len(settings.heads))
    length = Implied(config).longest_trained_sequence
    block = min(settings.query_block, length)
    of_block = heads * block * (width + 2 * length)
    return max(3 * gathered, gathered + 4 * (of_block + length * (keys * width + 2 * heads)))


def _is_measured(run: Run) -> bool:
    """Whether log-probs are computed under other weights than those that train."""
    return any(one.measures for one in run.implied.kept_sets)


def _trained(run: Run, shard: Shard) -> Iterator[Amount]:
    """The policy with what trains it; models that train beside it are away."""
    yield from _weights(run, shard)
    yield Amount("FP8 weights", fp8_weights(run.config, shard), False)
    yield Amount("gradients", gradients(shard.trained), True)
    yield Amount("optimizer", optimizer(shard.trained), True)
    yield Amount("reserved", run.cluster.reserved, False)


def _weights(run: Run, shard: Shard) -> Iterator[Amount]:
    adapter = weights(shard.adapter_buffers)
    yield Amount("policy weights", policy_weights(run, shard) - adapter, True)
    yield Amount("adapter", adapter, True)


def _adapter(shard: Shard) -> Iterator[Amount]:
    """An adapter, with what trains it, in the passes of another model than the policy."""
    own = shard.adapter_buffers
    yield Amount("adapter", weights(own), True)
    yield Amount("gradients", gradients(own), True)
    yield Amount("optimizer", optimizer(own), True)


def policy_weights(run: Run, shard: Shard) -> int:
    """Bytes of the policy's weights on a rank, frozen ones beside an adapter included."""
    return weights(shard.trained) + shard.frozen * BYTES[run.config.params_dtype]


def fp8_weights(config: RunConfig, shard: Shard) -> int:
    """What Transformer Engine keeps beside bf16 weights while it multiplies them in FP8: their values, the same
    transposed, as Hopper's tensor cores want them for the gradients of inputs, and with blockwise scaling both's
    scales. Weights that are FP8 themselves (`fp8.param`) are values and transposed in the two bytes of the bf16 ones.
    """
    scales = 2 * 4 / BLOCK**2 if config.precision == BLOCKWISE else 0
    return int(shard.fp8 * (scales + (0 if config.fp8.param else 2)))


def weights(buffers: Sequence[Buffer]) -> int:
    """Bytes of the weights in buffers, padding included."""
    return sum(one.numel * one.parameter_bytes for one in buffers)


def merged_bytes(config: RunConfig, shard: Shard) -> int:
    """What a module computes with in place of the weights that an adapter changes, and in fp32, of one of them, what it
    is made of: the base, the product of the factors, the same in the base's order, and the sum."""
    if not shard.merged:
        return 0
    return shard.largest_layer * BYTES[config.params_dtype] + 4 * OPTIMIZER_ELEMENT * shard.merged


def gradients(buffers: Sequence[Buffer]) -> int:
    """Bytes of their gradients."""
    return sum(one.numel * one.gradient_bytes for one in buffers)


def optimizer(buffers: Sequence[Buffer]) -> int:
    """Bytes of the optimizer's state on a rank: two moments and, beside bf16 weights, weights in fp32."""
    return sum(
        one.numel // one.shards * OPTIMIZER_ELEMENT * (2 if one.parameter_bytes == OPTIMIZER_ELEMENT else 3)
        for one in buffers
    )


def _shards_in_fp32(buffers: Sequence[Buffer]) -> int:
    """Bytes of a rank's part of all that is in buffers, in fp32."""
    return sum(one.numel // one.shards * OPTIMIZER_ELEMENT for one in buffers)


def weight_set(run: Run, shard: Shard, *, base: bool = True) -> int:
    """Bytes of a named copy of the weights (`Policy.keep`), without `base` of an adapter's alone."""
    return ((shard.parameters if base else 0) + shard.adapter) * BYTES[run.config.params_dtype]


def micro_batch_bytes(config: RunConfig, shape: ModelShape, sequences: int) -> int:
    """The micro-batches of a pass over the longest sequences, which lie on the device all at once.

    Their tensors are the fields of `megarl.policy.batch.MicroBatch`. Per token of a context-parallel rank: id, position
    and padding, the row and id of a token to predict, and the engine's experts of every sparse layer where they are
    replayed. Per token of the whole: its place and sequence, four numbers in fp32.
    """
    own = 8 + 8 + 1 + 8 + 8
    if Implied(config).records_routing:
        own += 2 * sum(shape.sparse_layers) * shape.experts_per_token
    return int(sequences * Implied(config).longest_trained_sequence * (own / config.parallel.context + 8 + 8 + 4 * 4))


def _push(run: Run, engine: EngineMemory, shard: Shard) -> Iterator[Amount]:
    """The engine's weights arrive beside the policy's, in two rounds under way. On a GPU they land where they stay.

    What is made on the way out is one tensor at a time: merged, as in training; quantised, its values beside a copy in
    the order of the checkpoint's rows, and what a slab takes.
    """
    yield from _weights(run, shard)
    for one in run.implied.parameter_sets:
        if one.trains and one.generates:
            yield Amount(f"set {one.name}", weights(shard.buffers), True)
    if any(one.generates for one in run.implied.kept_sets):
        yield Amount("weight set", weight_set(run, shard), True)
    yield Amount("engine weights", engine.weights, True)
    element = BYTES[run.config.params_dtype]
    yield Amount("merged weights", shard.merged * (element + 4 * OPTIMIZER_ELEMENT), False)
    if run.config.rollout.precision == "fp8":
        yield Amount("quantised weights", shard.largest_linear * (1 + element) + SLAB_BYTES, False)
    yield Amount("push buckets", 2 * int(run.config.weights.bucket_mib * 2**20), True)
    yield Amount("reserved", run.cluster.reserved, False)


def _rollout(run: Run, engine: EngineMemory) -> Iterator[Amount]:
    yield Amount("engine weights", engine.weights, True)
    yield Amount("KV cache", engine.cache.bytes, run.config.rollout.kv_cache_gib is not None)
    yield Amount("engine's work", engine.working, False)
    yield Amount("reserved", run.cluster.reserved, False)


def host_of(run: Run, shards: list[Shard], processes: int) -> HostMemory:
    """What a node's host keeps: the busiest rank's share, for all of the node's GPUs."""
    gpus = min(run.cluster.gpus_per_node, processes)
    kept, trained = run.implied.kept_sets, run.implied.trained_sets
    found: list[HostMemory] = []
    for shard in shards:
        # Of the run's start an adapter alone is kept, where the base is frozen.
        sets = sum(weight_set(run, shard, base=not shard.frozen or one.checkpoint is not None) for one in kept)
        amounts = [Amount("weight sets", gpus * sets, True)]
        if run.engine is not None or trained:
            amounts.append(Amount("policy weights", gpus * policy_weights(run, shard), True))
            amounts.append(Amount("optimizer", gpus * optimizer(shard.trained), True))
            both = weights(shard.buffers) + optimizer(shard.buffers)
            amounts += [Amount(f"set {name}", gpus * both, True) for name in trained]
        found.append(HostMemory(tuple(amount for amount in amounts if amount.bytes), run.cluster.host_memory))
    return max(found, key=lambda host: host.used)
