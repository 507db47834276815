"""What the proofs of the policy share: tiny models, mini-batches, worlds of real processes, transformers' answers.

A test gives a scenario, a function of its own file, to `run_world`. A process imports that file and forks the world's
ranks, which call the scenario under as many layouts as it likes; the test compares what all ranks returned.
"""

from __future__ import annotations

import importlib
import json
import pickle
import tempfile
from collections.abc import Iterator
from collections.abc import Sequence as Sequences
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import preloaded
import torch

from megarl.config.schema import RunConfig
from megarl.records import Sequence, from_place

TESTS = Path(__file__).resolve().parent

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
#: Layer 1 of 4 is dense.
QWEN_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}


@dataclass(frozen=True)
class Model:
    """A tiny architecture; `extra` are further fields of its transformers configuration.

    `file` changes config.json once it is saved: what is left out (...) stands at transformers' default for the family,
    and some files say things where older versions did.
    """

    classes: str
    tied: bool
    extra: dict[str, Any] = field(default_factory=dict)
    file: dict[str, Any] = field(default_factory=dict)


#: Every family, tied and untied, and every kind of rotary scaling. One key-value head is fewer than two ranks.
MODELS = {
    "qwen2-tied": Model("Qwen2", True),
    "qwen2-untied": Model("Qwen2", False),
    "qwen3-untied": Model("Qwen3", False),
    "qwen3-tied": Model("Qwen3", True, {"num_key_value_heads": 1}),
    "llama-llama3": Model("Llama", False, {"rope_parameters": LLAMA3_ROPE}),
    "qwen3-moe": Model("Qwen3Moe", False, QWEN_EXPERTS),
    "qwen2-moe": Model(
        "Qwen2Moe", True, QWEN_EXPERTS | {"shared_expert_intermediate_size": 48, "norm_topk_prob": False}
    ),
    # Its default base is a million, and its epsilon 1e-5, which no other family's is.
    "mixtral": Model(
        "Mixtral",
        False,
        {"num_local_experts": 4, "sliding_window": None},
        {"rope_parameters": ..., "rms_norm_eps": ..., "num_experts_per_tok": ..., "sliding_window": ...},
    ),
    "mistral-yarn": Model(
        "Mistral",
        False,
        {"sliding_window": None, "rope_parameters": YARN_ROPE},
        {
            "rope_parameters": ...,
            "rope_scaling": {"type": "yarn", "factor": 4.0},
            "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
        },
    ),
    "llama-linear": Model("Llama", True, {"rope_parameters": LINEAR_ROPE}),
}
#: 97 is odd, and less than the 128 rows that Megatron pads it to.
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
}

#: Settings under which every term of the loss counts: clipping, reference KL, entropy with its gradient.
ALGORITHM = {
    "name": "grpo",
    "clip_low": 0.15,
    "clip_high": 0.25,
    "dual_clip": 3.0,
    "kl_coefficient": 0.05,
    "entropy_coefficient": 0.01,
}
#: Gradients are clipped, weights decay, and epsilon stands well above fp32's rounding of a gradient, which Adam
#: would otherwise blow up to the full learning rate wherever a gradient is 0 up to rounding.
OPTIMIZER = {"lr": 2e-3, "betas": (0.9, 0.99), "epsilon": 1e-4, "weight_decay": 0.05, "clip_grad": 0.5}


def write_model(folder: Path, name: str, *, deviation: float = 0.1, **sizes: Any) -> Path:
    """A random checkpoint of `MODELS[name]` in Hugging Face format, with weights of that deviation; `sizes` replace
    those of `SIZES`."""
    import transformers

    path = folder / name
    model = MODELS[name]
    fields = SIZES | model.extra | sizes
    config = getattr(transformers, f"{model.classes}Config")(**fields, tie_word_embeddings=model.tied)
    torch.manual_seed(len(name))
    network = getattr(transformers, f"{model.classes}ForCausalLM")(config)
    for parameter_name, parameter in network.named_parameters():
        noise = torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else deviation)
        parameter.data.copy_(noise + 1 if parameter_name.endswith("norm.weight") else noise)
    network.save_pretrained(path)
    file = path / "config.json"
    written = json.loads(file.read_text()) | model.file
    file.write_text(json.dumps({key: value for key, value in written.items() if value is not ...}))
    return path


def run_config(path: Path, **changes: Any) -> RunConfig:
    """The configuration of a run with the model at `path`; `changes` replace or extend whole sections."""
    sections: dict[str, Any] = {
        "name": "proof",
        "steps": 6,
        "precision": "fp32",
        "model": {"path": str(path)},
        "algorithm": ALGORITHM,
        "data": {"path": "unused"},
        "batch": {"tokens_per_microbatch": 80, "logprob_chunk": 7},
        "optimizer": OPTIMIZER,
    }
    for key, value in changes.items():
        sections[key] = sections.get(key, {}) | value if isinstance(value, dict) and key != "algorithm" else value
    return RunConfig.model_validate(sections)


def mini_batch(seed: int, number: int = 13, vocab: int = 97, temperatures: Sequences[float] = (1.0,)) -> list[Sequence]:
    """Sequences of 5 to 44 tokens with unlike advantages and, in turns, these temperatures.

    The first response has one token. Of every third response a stretch in the middle is not trained, as if an
    environment had written it.
    """
    random = np.random.default_rng(seed)
    made = []
    for index in range(number):
        prompt, response = int(random.integers(1, 20)), 1 if index == 0 else int(random.integers(4, 25))
        tokens = random.integers(2, vocab, prompt + response).astype(np.int32)
        positions = from_place(prompt, prompt + response)
        if index % 3 == 2:
            positions = np.delete(positions, slice(response // 3, 2 * response // 3))
        made.append(
            Sequence(
                tokens=tokens,
                positions=positions,
                advantages=np.full(len(positions), random.normal(), np.float32),
                temperature=temperatures[index % len(temperatures)],
                group=index // 4,
            )
        )
    return made


def with_old_log_probs(batch: Sequences[Sequence], log_probs: Sequences[np.ndarray], seed: int) -> list[Sequence]:
    """The batch with old, rollout and reference log-probs scattered around `log_probs`: ratios differ, and clip."""
    random = np.random.default_rng(seed)

    def near(values: np.ndarray, scale: float) -> np.ndarray:
        return (values + random.normal(scale=scale, size=values.shape)).astype(np.float32)

    return [
        replace(
            s,
            old_log_probs=near(v, 0.2),
            rollout_log_probs=near(v, 0.2),
            log_probs_under={"reference": near(v, 0.3)},
        )
        for s, v in zip(batch, log_probs, strict=True)
    ]


# --- worlds of processes ---------------------------------------------------------------------------------------------


def run_world(module: str, scenario: str, processes: int, *arguments: Any) -> list[Any]:
    """Call `scenario(world, *arguments)` of a test file in that many processes; their results by rank."""
    with tempfile.TemporaryDirectory() as exchange:
        found = Path(exchange, "found")
        started = preloaded.Started(_launch, module, scenario, processes, arguments, found)
        output, _ = started.communicate(timeout=800)
        if started.returncode:
            raise RuntimeError(f"{scenario} with {processes} processes failed\n{output[-8000:]}")
        return pickle.loads(found.read_bytes())


def _launch(module: str, scenario: str, processes: int, arguments: tuple[Any, ...], found: Path) -> None:
    """In the process behind `run_world`: forks the ranks, hands their results over."""
    from megarl.parallel.launch import launch

    scenarios = importlib.import_module(module)
    result = launch(_rank, (getattr(scenarios, scenario), arguments), processes)
    found.write_bytes(pickle.dumps(result))


def _rank(function: Any, arguments: tuple[Any, ...]) -> list[Any]:
    from megarl.parallel import bootstrap
    from megarl.parallel.exchange import gather_all

    world = bootstrap.join()
    results = gather_all(function(world, *arguments))
    bootstrap.leave()
    return results


#: The layout whose groups are formed in this process.
_layout: Any = None


@contextmanager
def policy_of(config: RunConfig, world: Any, *, weights: bool = True, trains: Sequences[str] = ()) -> Iterator[Any]:
    """This rank's policy under `config.parallel`, with the weights of model.path, and the sets that train beside it:
    those named, or else the configured algorithm's.

    The grid stays for the next policy under the same layout: groups of a layout are formed once, as each costs sockets.
    """
    global _layout
    from megarl.config.implied import Implied
    from megarl.config.model_shape import read_model_shape
    from megarl.config.parameter_sets import ParameterSet
    from megarl.parallel.groups import dissolve_grid, form_grid
    from megarl.policy.hf_weights import load_hf_weights
    from megarl.policy.policy import Policy

    if _layout != config.parallel:
        dissolve_grid()
        _layout = config.parallel
    grid = form_grid(config.parallel, config.seed)
    sets = [ParameterSet(name, trains=True) for name in trains]
    sets = sets or [one for one in Implied(config).parameter_sets if one.trains]
    policy = Policy(config, read_model_shape(config.model.path), world, grid, step_budget=config.steps, trains=sets)
    if weights:
        load_hf_weights(policy, config.model.path)
    yield policy


def grpo(config: RunConfig) -> Any:
    """The configured algorithm."""
    from megarl import algorithms
    from megarl.algorithms.base import AlgorithmContext

    return algorithms.build(config.algorithm, AlgorithmContext(config.rollout.max_tokens, config.rollout.group_size))


def share(batch: Sequences[Sequence], grid: Any) -> list[int]:
    """Positions of the sequences that this data-parallel rank trains on."""
    from megarl.data.packing import balance

    return balance([s.length for s in batch], grid.data)[grid.data_rank]


def totals(batch: Sequences[Sequence]) -> Any:
    """Counts of the whole mini-batch."""
    from megarl.algorithms.objective import BatchTotals

    return BatchTotals.of({"answer": BatchTotals(float(sum(s.trained for s in batch)), float(len(batch)))})


def update(policy: Any, algorithm: Any, batch: Sequences[Sequence]) -> Any:
    """One optimizer update on the whole mini-batch, each data-parallel rank with its share; all that is said of it."""
    mine = [batch[i] for i in share(batch, policy.grid)]
    current = all(s.old_log_probs is None for s in batch)
    found = policy.accumulate(mine, algorithm.objectives, totals(batch), old_is_current=current)["policy"]
    return SimpleNamespace(**asdict(found), **asdict(policy.step()["policy"]))


def rounds_of(
    policy: Any, objectives: Sequences[Any], mine: Sequences[Sequence], counts: Any, *, current: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The passes and steps of one update, round by round as the loop makes it, on this rank's share."""
    from megarl.algorithms.objective import rounds

    passes, steps = {}, {}
    for part in rounds(objectives):
        options = {"old_is_current": current, "hands_on_old": part.hands_on_old}
        passes |= policy.accumulate(mine, part.objectives, counts, **options)
        steps |= policy.step(part.steps)
    return passes, steps


def exported(policy: Any, folder: Path) -> dict[str, np.ndarray] | None:
    """The policy's weights by Hugging Face name, on rank 0; written to `folder` on the way."""
    from megarl.weights.export import export_hf

    export_hf(policy, folder, Path(policy.config.model.path))
    return read_checkpoint(folder) if policy.world.is_first else None


def read_checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a Hugging Face checkpoint."""
    from safetensors.numpy import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


# --- transformers' answers -------------------------------------------------------------------------------------------


def transformers_model(path: Path) -> Any:
    """The checkpoint in transformers, fp32."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def checkpoint_of(model: Any) -> dict[str, np.ndarray]:
    """The model's weights as a checkpoint has them; in memory transformers keeps experts stacked."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return read_checkpoint(Path(folder))


def token_values(model: Any, sequence: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs (T,) of the trained tokens, and entropies (T,) there, by transformers, with gradient."""
    tokens = torch.from_numpy(sequence.tokens.astype(np.int64))
    positions = torch.from_numpy(sequence.positions.astype(np.int64))
    logits = model(tokens[None]).logits[0, positions - 1].float() / sequence.temperature
    log_probs = torch.log_softmax(logits, -1)
    chosen = log_probs.gather(-1, tokens[positions, None])[:, 0]
    return chosen, -(log_probs.exp() * log_probs).sum(-1)
