"""How long a run takes, roughly: work by formulas, divided by the cluster's speeds and by what is usually had of them.

Torch-free, and a matter of microseconds: `megarl reproduce` lists every recipe with it. Nothing here has been measured;
all shares are our assumptions, and docs/plan.md says so. Evaluations, saves and starts are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.cluster import Cluster
from megarl.config.implied import Implied
from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.reshard.wire import BYTES

#: Share of a GPU's arithmetic that training reaches, and of its memory's speed that generation does.
TRAINING, GENERATION = 0.25, 0.25
#: Mean length of a response, as a share of the longest; and of a prompt.
RESPONSE, PROMPT = 0.5, 0.25


@dataclass(frozen=True, slots=True)
class Hours:
    """Seconds of a step, and GPU-hours of all `steps` on `gpus` GPUs; None where epochs give no number of steps."""

    generate: float
    train: float
    gpus: int
    steps: int | None

    @property
    def gpu_hours(self) -> float | None:
        """Of the whole run."""
        return None if self.steps is None else self.gpus * self.steps * (self.generate + self.train) / 3600


def hours_of(config: RunConfig, shape: ModelShape, cluster: Cluster, gpus: int) -> Hours:
    """The estimate for `config` on `gpus` GPUs of `cluster`."""
    steps = config.steps or None
    return Hours(_generation(config, shape, cluster, gpus), _training(config, shape, cluster, gpus), gpus, steps)


def parameters(shape: ModelShape, *, active: bool = False) -> int:
    """Weights of all matrices, embeddings included; `active`: of those alone that a token is multiplied with."""
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = shape.hidden_size * (2 * query + 2 * key)
    dense = 3 * shape.hidden_size * shape.ffn_size
    chosen = shape.experts_per_token if active else shape.num_experts
    sparse = shape.hidden_size * (
        3 * chosen * shape.expert_ffn_size + 3 * shape.shared_expert_ffn_size + shape.num_experts
    )
    sparse_layers = sum(shape.sparse_layers)
    vocabulary = shape.hidden_size * shape.vocab_size * (1 if active or shape.tied_embeddings else 2)
    return (
        shape.num_layers * attention + (shape.num_layers - sparse_layers) * dense + sparse_layers * sparse + vocabulary
    )


def _forward(shape: ModelShape, sequence: float) -> float:
    """Operations of a token's forward pass in a sequence of that mean length: matrices, and causal attention."""
    attention = 2 * shape.num_layers * shape.num_heads * shape.head_dim * sequence
    return 2 * parameters(shape, active=True) + attention


def _training(config: RunConfig, shape: ModelShape, cluster: Cluster, gpus: int) -> float:
    """Seconds of a step's passes: three forward passes' work for a pass with its gradient, four where layers are
    recomputed, for each set that trains; and one for each set that log-probs are measured under."""
    implied = Implied(config)
    sequence = PROMPT * config.data.max_prompt_tokens + RESPONSE * config.rollout.max_tokens
    tokens = implied.sequences_per_update * config.batch.updates * sequence
    trained = (4 if config.recompute.kind == "full" else 3) * (1 + len(implied.trained_sets))
    measured = 1 + len(implied.kept_sets) if config.algorithm.generates else 0
    work = tokens * _forward(shape, sequence) * (trained + measured)
    return work / (gpus * TRAINING * cluster.bf16_flops_per_second)


def _generation(config: RunConfig, shape: ModelShape, cluster: Cluster, gpus: int) -> float:
    """Seconds until a replica has written its share: for each token of the sequences that it has in hand it reads its
    weights and their cache, or multiplies, whichever takes longer."""
    if not Implied(config).makes_rollouts:
        return 0.0
    algorithm, ranks = config.algorithm, config.rollout.tensor
    first = config.rollout.group_size
    # A dropped group costs its samples: the generation batch is what is asked for at once.
    prompts = max(config.batch.prompts, config.batch.generation_prompts or 0)
    grown = algorithm.sequences_per_prompt(config) - algorithm.learns_solutions - first
    # A continuation begins somewhere in its first sample.
    samples = prompts * (first + max(grown, 0) * (0.5 if algorithm.grows else 1.0))
    response = RESPONSE * config.rollout.max_tokens
    share = max(samples * ranks / gpus, 1.0)
    together = min(share, config.rollout.max_concurrent)
    element = 1 if config.rollout.precision == "fp8" else BYTES[config.engine_dtype]
    heads = max(1.0, shape.num_kv_heads / ranks)
    context = PROMPT * config.data.max_prompt_tokens + response / 2
    cache = together * context * 2 * shape.num_layers * heads * shape.head_dim * BYTES[config.engine_dtype]
    read = (element * parameters(shape) / ranks + cache) / (GENERATION * cluster.hbm_bytes_per_second)
    multiplied = together * _forward(shape, context) / (ranks * TRAINING * cluster.bf16_flops_per_second)
    return share / together * response * max(read, multiplied)
