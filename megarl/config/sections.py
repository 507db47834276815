"""The sections of a run's YAML file: one typed, closed record each.

Each field has its default here and nowhere else, and a sentence that says what it does. Torch-free.
Rules that span sections are in `megarl.config.rules`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from megarl.config.adapters import AdapterSettings
from megarl.config.base import PathText, Settings
from megarl.config.data import DataSettings, DataSource, Sourced
from megarl.config.environments import EnvironmentSettings
from megarl.config.fp8 import Fp8Settings, Precision
from megarl.config.health import HealthSettings
from megarl.config.reproduces import ReproducesSettings
from megarl.config.rewards import RewardSettings


class ModelSettings(Settings):
    path: PathText = Field(description="Hugging Face checkpoint directory: config.json, weights, tokenizer files.")
    tokenizer: PathText | None = Field(
        default=None, description="Tokenizer directory or sentencepiece .model file; default model.path."
    )
    weights: PathText | None = Field(
        default=None,
        description="A megarl checkpoint (its directory, or a run's checkpoints/ folder) whose weights replace "
        "those of model.path.",
    )
    random_init: bool = Field(
        default=False, description="Draw the weights from seed instead of reading them (benchmarks)."
    )


class ParallelSettings(Settings):
    processes: PositiveInt | None = Field(
        default=None,
        description="World size; default: what the launcher started, or 1. Data parallelism follows from it.",
    )
    tensor: PositiveInt = Field(default=1, description="Tensor-model-parallel size.")
    pipeline: PositiveInt = Field(default=1, description="Pipeline-model-parallel size.")
    virtual_pipeline: PositiveInt | None = Field(
        default=None, description="Model chunks per pipeline stage (interleaved schedule)."
    )
    stage_layers: tuple[PositiveInt, ...] | None = Field(
        default=None,
        description="Layers of every model chunk in the order of the forward pass: pipeline x virtual_pipeline "
        "numbers. Default: equal shares.",
    )
    account_for_embedding: bool = Field(default=False, description="Equal shares count the embedding as a layer.")
    account_for_loss: bool = Field(default=False, description="Equal shares count the output layer as a layer.")
    context: PositiveInt = Field(default=1, description="Context-parallel size.")
    expert: PositiveInt = Field(default=1, description="Expert-parallel size.")
    expert_tensor: PositiveInt | None = Field(
        default=None, description="Tensor-parallel size of the experts; default parallel.tensor."
    )
    sequence: bool = Field(default=False, description="Megatron's sequence parallelism; needs parallel.tensor > 1.")


class RecomputeSettings(Settings):
    kind: Literal["none", "selective", "full"] = Field(
        default="none",
        description="What the backward pass computes again instead of keeping it: nothing, the modules named below, or "
        "whole layers (Megatron's recompute_granularity).",
    )
    modules: tuple[str, ...] = Field(
        default=("core_attn",),
        description="With selective: Megatron's recompute_modules, such as core_attn, mlp, moe, moe_act.",
    )
    method: Literal["uniform", "block"] = Field(
        default="uniform",
        description="With full: uniform keeps the input of every group of `layers` layers, block recomputes the first "
        "`layers` of each stage and keeps the others whole.",
    )
    layers: PositiveInt = Field(default=1, description="With full: see method.")


class MoeSettings(Settings):
    aux_loss_coefficient: NonNegativeFloat | None = Field(
        default=None,
        description="Coefficient of the load-balancing loss (Switch Transformer, arXiv 2101.03961, eq. 4). Default: as "
        "the model's config.json trains: router_aux_loss_coef with output_router_logits, else 0.",
    )
    router_dtype: Literal["fp32", "fp64"] = Field(
        default="fp32", description="Type in which the router computes. Our choice: that of routers in transformers."
    )
    routing_replay: Literal["off", "compare", "on"] = Field(
        default="off",
        description="What is done with the experts that the engine chose when it generated: nothing; compared with the "
        "policy's; or taken in training in place of the policy's (rollout routing replay, arXiv 2510.11370).",
    )


class RolloutSettings(Settings):
    tensor: PositiveInt = Field(default=1, description="Tensor-parallel size of each engine replica.")
    expert_parallel: bool = Field(
        default=False,
        description="Each rank of a replica has its share of the experts (vLLM's expert parallelism), instead of a "
        "share of every expert.",
    )
    precision: Literal["fp32", "bf16", "fp8"] | None = Field(
        default=None,
        description="Type of the engine's weights and activations; default: the policy's. Weights are cast before they "
        "are sent. fp8: linear layers of decoder layers in blocks of 128 x 128, the rest in bf16.",
    )
    group_size: PositiveInt = Field(default=8, description="Samples per prompt (G).")
    temperature: PositiveFloat = Field(
        default=1.0, description="Sampling temperature; the policy's log-probs use the same."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="Nucleus sampling bound.")
    top_k: int = Field(default=-1, description="Sample from the k most likely tokens; -1 from all.")
    max_tokens: PositiveInt = Field(default=1024, description="Longest response in tokens.")
    stop_token_ids: tuple[int, ...] = Field(
        default=(), description="Further ids that end a response, beside the end token."
    )
    thinking_end: str = Field(
        default="</think>", min_length=1, description="Text that ends the thinking; the response comes after it."
    )
    seeded: bool | None = Field(
        default=None,
        description="A seed per sample, so that answers do not depend on the replica; default: on the CPU yes (it cost "
        "0 to 4 % at 64 and 4 to 13 % at 512 sequences), with deterministic yes, else no (not measured on a GPU).",
    )
    assignment: Literal["fixed", "drawn"] | None = Field(
        default=None,
        description="fixed: which replica answers a prompt is known in advance; drawn: replicas draw work from a "
        "shared counter; default: fixed on the CPU and with deterministic, else drawn.",
    )
    environment: EnvironmentSettings | None = Field(
        default=None, description="What answers the policy between turns of one sample; none: a sample is one answer."
    )
    chunk: PositiveInt = Field(default=32, description="Requests a replica draws at a time.")
    max_concurrent: PositiveInt = Field(
        default=256, description="Requests in one engine at a time (vLLM's max_num_seqs)."
    )
    kv_cache_gib: PositiveFloat | None = Field(
        default=None,
        description="KV cache per process in GiB; default: 0.25 on the CPU, by gpu_memory_fraction on a GPU.",
    )
    gpu_memory_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.6, description="Share of GPU memory for the engine while it is awake."
    )
    save: bool = Field(
        default=False, description="Write each step's rollouts to the run directory, for rollout.replay."
    )
    keep_unfinished: bool | None = Field(
        default=None,
        description="Keep what the engines make until a checkpoint has the step (unfinished/, 8 bytes a token): a run "
        "that was killed does not make it again. Not with moe.routing_replay, nor what rollout.environment answers. "
        "Default: yes, but not with deterministic on a GPU, where a sample depends on those made beside it.",
    )
    ahead: Literal[0, 1] = Field(
        default=0,
        description="1: a step asks the prompts that the next step learns from, and learns from what the step before "
        "has asked (one-step off-policy); the first step only asks. Old log-probs are those of who wrote a token.",
    )
    replay: PathText | None = Field(
        default=None, description="Train from saved rollouts (a file, or a rollouts/ folder) instead of generating."
    )


class BatchSettings(Settings):
    prompts: PositiveInt = Field(default=64, description="Prompts per step (supervised: sequences per step).")
    generation_prompts: PositiveInt | None = Field(
        default=None,
        description="Prompts per generation batch, where the algorithm drops groups and more are sampled; default "
        "batch.prompts.",
    )
    updates: PositiveInt = Field(
        default=1, description="Optimizer updates per step, each on an equal share of the prompts."
    )
    demonstrations: PositiveInt | None = Field(
        default=None, description="Demonstrations per step, for algorithms that learn them; default batch.prompts."
    )
    tokens_per_microbatch: PositiveInt = Field(default=8192, description="Bound on tokens in one micro-batch.")
    packed: bool = Field(default=True, description="Pack sequences end to end; off: one padded sequence row each.")
    logprob_chunk: PositiveInt = Field(default=1024, description="Tokens per chunk when logits become log-probs.")


class OptimizerSettings(Settings):
    lr: NonNegativeFloat = Field(default=1e-6, description="Peak learning rate.")
    min_lr: NonNegativeFloat = Field(default=0.0, description="Learning rate at the end of the decay.")
    warmup_steps: NonNegativeInt = Field(default=0, description="Updates of linear warm-up from 0.")
    decay: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Decay after warm-up, over all updates of the run."
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="Adam's betas."
    )
    epsilon: PositiveFloat = Field(default=1e-8, description="Adam's epsilon.")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="Decoupled weight decay.")
    clip_grad: NonNegativeFloat = Field(default=1.0, description="Bound on the global gradient norm; 0 turns it off.")
    max_skipped: PositiveInt = Field(
        default=5, description="Updates in a row skipped for a NaN or infinite loss or gradient before the run stops."
    )


class EvaluationSettings(Sourced):
    path: PathText | None = Field(
        default=None,
        description="Data file of the evaluation, or a list of them; default: those of data. Columns as in data.",
    )
    sources: tuple[DataSource, ...] = Field(
        default=(), description="In place of evaluation.path several, as data.sources; without weights."
    )
    split: str = Field(default="test", description="Split of a hub data set.")
    every: NonNegativeInt = Field(
        default=0, description="Evaluate every that many steps; 0: only where start and end ask."
    )
    start: bool = Field(default=False, description="Evaluate before the first step.")
    end: bool = Field(default=False, description="Evaluate after the last step.")
    rows: PositiveInt | None = Field(default=None, description="Use only the first rows of each file.")
    samples: PositiveInt = Field(default=1, description="k of avg@k.")
    temperature: NonNegativeFloat = Field(default=0.0, description="0: greedy.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="Nucleus sampling bound.")
    max_tokens: PositiveInt | None = Field(default=None, description="Longest response; default rollout.max_tokens.")
    reward: RewardSettings | None = Field(default=None, description="How answers are scored; default: as in training.")
    consumer: PathText | None = Field(
        default=None,
        description="Cross-Generation (START, arXiv 2603.20799): whose answers to the policy's thinking are scored "
        "too: a megarl checkpoint of the same model, or initial, the policy that the run started with.",
    )
    save: bool = Field(
        default=True,
        description="Write every answer with its problem, reference, reward and verdict to evaluations/ in the run's "
        "folder.",
    )

    @property
    def names_files(self) -> bool:
        """Whether the evaluation has files of its own."""
        return self.path is not None or bool(self.sources)


class CheckpointSettings(Settings):
    every: NonNegativeInt = Field(default=0, description="Save every that many steps; 0: never.")
    end: bool = Field(default=True, description="Save after the last step.")
    keep: PositiveInt = Field(
        default=2, description="Checkpoints kept; older ones are removed after a newer is complete."
    )
    keep_every: NonNegativeInt = Field(
        default=0, description="Beside these, keep the checkpoints of every that many steps for good; 0: none."
    )
    optimizer: bool = Field(
        default=True,
        description="Save the optimizer's state too, and sets that train beside the policy; without it a run cannot be "
        "resumed.",
    )
    export_hf: bool = Field(
        default=False,
        description="At the end also write the weights as a Hugging Face checkpoint (hf/), with "
        "an adapter merged; one that trains alone also in PEFT's format (adapter/).",
    )
    export_precision: Literal["fp32", "bf16", "fp8"] | None = Field(
        default=None,
        description="Type of the weights in hf/; default: the policy's. fp8: linear layers in FP8 with a scale for "
        "every block of 128 x 128, as vLLM serves them, the rest in the policy's type.",
    )


class LoggingSettings(Settings):
    tensorboard: bool = Field(default=True, description="Write TensorBoard events.")
    wandb: str | None = Field(
        default=None,
        description="Project name in Weights & Biases, which the package wandb is needed for; none: not used.",
    )
    samples: NonNegativeInt = Field(
        default=16, description="Answers per step written to samples.jsonl, each with what goes on from it in a tree."
    )
    plot_every: PositiveInt = Field(default=10, description="Redraw curves.png every that many steps.")


class WeightsSettings(Settings):
    bucket_mib: float = Field(
        default=256.0,
        ge=0.01,
        description="Most a rank sends and receives in one round of a weight push, in MiB; two are under way.",
    )
    checksum: Literal["every", "first", "never"] = Field(
        default="every",
        description="Which weight pushes compare digests of what was sent and of what lies in the engine, and these "
        "again once it has generated.",
    )
    time_limit: PositiveFloat = Field(
        default=600.0, description="Seconds that a rank waits for others in a push or an export; then it names them."
    )


class RunSettings(Settings):
    """All of a run but its algorithm, whose own rules may ask for the rest."""

    name: str = Field(
        # File systems allow 255 bytes; arrays and temporary files add to it.
        description="Name of the run: it lives in runs/<name>/.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,
    )
    runs_dir: PathText = Field(default="runs", description="Folder of all runs.")
    seed: NonNegativeInt = Field(default=1234, description="Seed of everything drawn.")
    steps: NonNegativeInt = Field(description="Steps of the run; with epochs: as many as these take.")
    epochs: PositiveFloat | None = Field(
        default=None,
        description="Length of the run in passes over the data's usable rows, in place of steps, at batch.prompts rows "
        "a step.",
    )
    resume: Literal["never", "auto", "must"] = Field(
        default="never",
        description="auto: continue from the latest checkpoint where there is one; must: refuse without one.",
    )
    resume_changes: tuple[Literal["seed", "model", "data"], ...] = Field(
        default=(),
        description="Parts that a resumed run may have otherwise than its checkpoint was trained with: seed, model, "
        "data. Other settings may always differ; what does is said.",
    )
    precision: Precision = Field(
        default="bf16",
        description="What the policy computes in; the optimizer keeps fp32. fp8-...: linear layers of the decoder in "
        "FP8 by Transformer Engine's recipe of that name (tensorwise: current scaling), all else in bf16.",
    )
    fp8: Fp8Settings = Fp8Settings()
    deterministic: bool = Field(
        default=False,
        description="On a GPU: a run repeats, and resumes, to the last bit on the same GPUs, by slower algorithms "
        "(docs/gpu.md). On the CPU every run does.",
    )
    model: ModelSettings
    parameters: Literal["policy", "adapter"] = Field(
        default="policy",
        description="What is trained: all of the policy's weights, or an adapter (LoRA) alone beside frozen ones.",
    )
    adapter: AdapterSettings = AdapterSettings()
    gpus: PositiveInt | None = Field(
        default=None,
        description="GPUs that the run is written for: what megarl check, plan and submit take where they are told no "
        "other number. A run on more or fewer is not refused.",
    )
    parallel: ParallelSettings = ParallelSettings()
    recompute: RecomputeSettings = RecomputeSettings()
    moe: MoeSettings = MoeSettings()
    rollout: RolloutSettings = RolloutSettings()
    data: DataSettings
    reward: RewardSettings = RewardSettings()
    batch: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    logging: LoggingSettings = LoggingSettings()
    weights: WeightsSettings = WeightsSettings()
    health: HealthSettings = HealthSettings()
    reproduces: ReproducesSettings | None = Field(
        default=None, description="The row of a published table that the run is; none: it is none."
    )
    megatron: dict[str, Any] = Field(
        default={},
        description="Further fields of Megatron's TransformerConfig, OptimizerConfig or DistributedDataParallelConfig.",
    )
    vllm: dict[str, Any] = Field(default={}, description="Further fields of vLLM's EngineArgs.")

    @model_validator(mode="before")
    @classmethod
    def _steps_of_epochs(cls, given: Any) -> Any:
        """Where epochs are given the number of steps is known when the data is read; until then it is 0."""
        if isinstance(given, dict) and given.get("epochs") is not None and given.get("steps") is None:
            return given | {"steps": 0}
        return given

    @property
    def params_dtype(self) -> Literal["fp32", "bf16"]:
        """Type of the policy's weights and of what goes from layer to layer, whatever its products are computed in."""
        return "fp32" if self.precision == "fp32" else "bf16"

    @property
    def uses_fp8(self) -> bool:
        """Whether linear layers of the policy compute in FP8."""
        return self.precision.startswith("fp8-")

    @property
    def engine_dtype(self) -> Literal["fp32", "bf16"]:
        """Type of the engine's weights that are not quantised, and of what goes from layer to layer there."""
        wanted = self.rollout.precision
        return "bf16" if wanted == "fp8" else wanted or self.params_dtype
