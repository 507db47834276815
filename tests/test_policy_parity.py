"""The policy against transformers, and every parallel layout against the same numbers.

Transformers' models and PyTorch's AdamW, in one process without a layout, give the log-probs, entropies, losses,
gradient norms and weights that Megatron must reach, whatever the layout, packed or not.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import torch
from parity import ALGORITHM, MODELS, OPTIMIZER

from megarl.config.grid import grid_of_rank
from megarl.config.sections import ParallelSettings

#: Of the sequences in turns, so that micro-batches hold both.
TEMPERATURES = (0.8, 1.25)
UPDATES = 3

SP = {"tensor": 2, "sequence": True}
FULL = {"recompute": {"kind": "full"}}
#: Settings of the section `parallel`, and others under the section's name, by number of processes.
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [
        {},
        FULL,
        {"recompute": {"kind": "selective", "modules": ("core_attn", "mlp")}},
        {"recompute": {"kind": "selective", "modules": ("moe", "shared_experts")}},
        {"recompute": {"kind": "selective", "modules": ("moe_act",)}},
    ],
    2: [
        {"tensor": 2},
        SP,
        {"pipeline": 2},
        {},
        {"context": 2},
        {"pipeline": 2, "virtual_pipeline": 2},
        {"pipeline": 2, "stage_layers": (1, 3)},
        {"expert": 2},
        {"expert_tensor": 2},
        SP | {"expert": 2, "expert_tensor": 1},
        {"context": 2, "expert": 2},
        {"context": 2} | FULL,
        {"expert": 2} | FULL,
        {"pipeline": 2, "virtual_pipeline": 2, "recompute": {"kind": "full", "method": "block"}},
        SP | {"deterministic": True},
    ],
    4: [
        {"tensor": 2, "pipeline": 2},
        {"tensor": 2},
        SP | {"pipeline": 2},
        {"context": 2, "tensor": 2},
        SP | {"context": 2},
        {"context": 2},
        SP | {"expert": 2},
        {"expert": 2, "expert_tensor": 2},
        {"expert": 2, "pipeline": 2, "virtual_pipeline": 2},
    ],
    8: [
        {"tensor": 2, "pipeline": 2, "context": 2},
        SP | {"pipeline": 2, "context": 2, "expert": 4, "expert_tensor": 1},
    ],
}
#: Mixtures of experts, and the dense models that layouts train.
MOE = ("qwen3-moe", "qwen2-moe", "mixtral")
TRAINED = ("qwen2-tied", "qwen3-tied", "llama-llama3")


#: Layouts whose models are chosen, by what of a model they cut: every model in one process, heads, vocabulary and
#: shared experts by tensor and sequence parallelism, tied and untied embeddings by the pipeline, every kind of mixture
#: by experts, a mixture with a dense layer by the interleaved schedule, whose chunks are then unlike. Under any other
#: layout it is one model, in turns.
CHOSEN: dict[tuple[int, str], tuple[str, ...]] = {
    (1, "{}"): tuple(MODELS),
    (2, str({"tensor": 2})): tuple(name for name in MODELS if name not in MOE),
    (2, str(SP)): (TRAINED[0], MOE[1]),
    (2, str({"pipeline": 2})): (TRAINED[0], TRAINED[2], MOE[0], MOE[2]),
    (2, str({"context": 2})): (TRAINED[1], MOE[1]),
    (2, str({"expert": 2})): MOE,
    (4, str({"expert": 2, "pipeline": 2, "virtual_pipeline": 2})): MOE[:1],
}


def models_of(processes: int, number: int, layout: dict[str, Any]) -> tuple[str, ...]:
    """The models that are trained under the layout of that number."""
    if chosen := CHOSEN.get((processes, str(layout))):
        return chosen
    if "moe" in str(layout):
        return MOE[1:2]
    turns = MOE if "expert" in layout or "expert_tensor" in layout else TRAINED
    return (turns[number % len(turns)],)


@dataclass(frozen=True)
class Case:
    """A model under a layout of so many processes."""

    model: str
    processes: int
    layout: int
    packed: bool

    @property
    def settings(self) -> dict[str, Any]:
        return LAYOUTS[self.processes][self.layout]

    @property
    def sections(self) -> dict[str, Any]:
        settings = self.settings.copy()
        others = {"recompute": settings.pop("recompute", {}), "deterministic": settings.pop("deterministic", False)}
        return {"parallel": settings, **others}

    @property
    def name(self) -> str:
        sizes = [f"{key}={value}" for key, value in self.settings.items()]
        return " ".join([self.model, f"{self.processes} processes", *sizes, "packed" if self.packed else "padded"])


#: Padded too: every model in one process, else the layout's first.
CASES = [
    Case(model, processes, number, packed)
    for processes, layouts in LAYOUTS.items()
    for number, layout in enumerate(layouts)
    for place, model in enumerate(models_of(processes, number, layout))
    for packed in ((True, False) if (processes, layout) == (1, {}) or (place == 0 and processes < 8) else (True,))
]


@dataclass
class Outcome:
    """What one rank found: values by position in the mini-batch where it holds them, weights on rank 0."""

    log_probs: dict[int, np.ndarray]
    entropies: dict[int, np.ndarray]
    losses: list[float]
    norms: list[float]
    entropy_means: list[float]
    weights: dict[str, np.ndarray] | None
    micro_batches: int
    #: Whether PyTorch's algorithms were those that repeat, in the passes.
    deterministic: set[bool]


class Recording:
    """The algorithm, recording each sequence's entropies; its advantages, unlike any other's, name the sequence."""

    def __init__(self, algorithm: Any) -> None:
        (self._own,) = algorithm.objectives
        self.objectives = (replace(self._own, loss=self.loss),)
        self.entropies: dict[float, np.ndarray] = {}
        self.calls = 0
        self.deterministic: set[bool] = set()

    def loss(self, inputs: Any) -> Any:
        self.calls += 1
        self.deterministic.add(torch.are_deterministic_algorithms_enabled())
        for index in range(inputs.num_sequences):
            rows = inputs.sequence_T == index
            self.entropies[float(inputs.advantages_T[rows][0])] = inputs.entropy_T[rows].detach().numpy()
        return self._own.loss(inputs)


def measure(world: Any, folder: Path, cases: list[Case], batches: dict[str, list]) -> dict[Case, Outcome]:
    """Log-probs, and three updates, of every case in turn. A scenario of `run_world`."""
    return {case: measure_case(world, folder, case, batches[case.model]) for case in cases}


def measure_case(world: Any, folder: Path, case: Case, batches: list) -> Outcome:
    config = parity.run_config(
        folder / case.model,
        **case.sections,
        batch={"packed": case.packed, "tokens_per_microbatch": 80, "logprob_chunk": 7},
    )
    with parity.policy_of(config, world) as policy:
        mine = parity.share(batches[0], policy.grid)
        log_probs = policy.measure([batches[0][i] for i in mine])
        recording = Recording(parity.grpo(config))
        results = [parity.update(policy, recording, batches[0])]
        entropies = {
            i: recording.entropies[float(s.advantages[0])]
            for i, s in enumerate(batches[0])
            if float(s.advantages[0]) in recording.entropies
        }
        results += [parity.update(policy, parity.grpo(config), batch) for batch in batches[1:]]
        return Outcome(
            log_probs={} if log_probs is None else dict(zip(mine, log_probs, strict=True)),
            entropies=entropies,
            losses=[r.loss for r in results],
            norms=[r.grad_norm for r in results],
            entropy_means=[r.means["entropy"] for r in results],
            weights=parity.exported(policy, folder / re.sub(r"\W+", "_", case.name)),
            micro_batches=recording.calls,
            deterministic=recording.deterministic,
        )


@dataclass
class Reference:
    """Transformers' answers on three mini-batches."""

    batches: list
    log_probs: list[np.ndarray]
    entropies: list[np.ndarray]
    losses: list[float]
    norms: list[float]
    entropy_means: list[float]
    before: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]


def token_losses(log_probs: torch.Tensor, entropies: torch.Tensor, sequence: Any) -> torch.Tensor:
    """GRPO's loss of each token as the papers write it: clipped objective, dual clip, k3 to the reference, entropy."""
    old, reference = torch.from_numpy(sequence.old_log_probs), torch.from_numpy(sequence.log_probs_under["reference"])
    advantage = float(sequence.advantages[0])
    ratio = (log_probs - old).exp()
    bounded = ratio.clamp(1 - ALGORITHM["clip_low"], 1 + ALGORITHM["clip_high"])
    objective = torch.minimum(ratio * advantage, bounded * advantage)
    if advantage < 0:
        objective = objective.clamp(min=ALGORITHM["dual_clip"] * advantage)
    divergence = (reference - log_probs).exp() - (reference - log_probs) - 1
    return -objective + ALGORITHM["kl_coefficient"] * divergence - ALGORITHM["entropy_coefficient"] * entropies


def train_by_transformers(path: Path) -> Reference:
    """Three updates by transformers, autograd and AdamW; weights of more than one dimension decay."""
    model = parity.transformers_model(path)
    before = parity.checkpoint_of(model)
    plain = [parity.mini_batch(seed, temperatures=TEMPERATURES) for seed in range(UPDATES)]
    with torch.no_grad():
        start = [[parity.token_values(model, s) for s in batch] for batch in plain]
    batches = [
        parity.with_old_log_probs(batch, [v[0].numpy() for v in values], seed)
        for seed, (batch, values) in enumerate(zip(plain, start, strict=True))
    ]
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER["lr"], betas=OPTIMIZER["betas"], eps=OPTIMIZER["epsilon"])
    losses, norms, entropy_means = [], [], []
    for batch in batches:
        optimizer.zero_grad()
        tokens = sum(s.trained for s in batch)
        values = [parity.token_values(model, s) for s in batch]
        total = torch.stack([token_losses(*v, s).sum() for v, s in zip(values, batch, strict=True)]).sum() / tokens
        total.backward()
        losses.append(float(total.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clip_grad"])))
        entropy_means.append(float(torch.cat([v[1] for v in values]).mean().detach()))
        optimizer.step()
    return Reference(
        batches=batches,
        log_probs=[v[0].numpy() for v in start[0]],
        entropies=[v[1].numpy() for v in start[0]],
        losses=losses,
        norms=norms,
        entropy_means=entropy_means,
        before=before,
        weights=parity.checkpoint_of(model),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    for model in MODELS:
        parity.write_model(folder, model)
    return folder


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, Reference]:
    return {model: train_by_transformers(folder / model) for model in MODELS}


@pytest.fixture(scope="module")
def outcomes(folder: Path, references: dict[str, Reference]) -> dict[Case, list[Outcome]]:
    """Every case's outcomes by rank; one world of processes serves all cases of its size."""
    batches = {model: reference.batches for model, reference in references.items()}
    found: dict[Case, list[Outcome]] = {}
    for processes in LAYOUTS:
        cases = [case for case in CASES if case.processes == processes]
        ranks = parity.run_world("test_policy_parity", "measure", processes, folder, cases, batches)
        found |= {case: [rank[case] for rank in ranks] for case in cases}
    return found


def by_case(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def values_of_all_ranks(parts: list[dict[int, np.ndarray]], count: int) -> list[np.ndarray]:
    """The values of every sequence; ranks that hold the same sequence must agree bitwise."""
    merged: dict[int, np.ndarray] = {}
    for part in parts:
        for index, values in part.items():
            assert index not in merged or np.array_equal(merged[index], values)
            merged[index] = values
    assert sorted(merged) == list(range(count))
    return [merged[i] for i in range(count)]


@by_case(CASES)
def test_log_probs_and_entropies_are_those_of_transformers(case: Case, outcomes: dict, references: dict):
    reference = references[case.model]
    for name in ("log_probs", "entropies"):
        expected = getattr(reference, name)
        found = values_of_all_ranks([getattr(rank, name) for rank in outcomes[case]], len(expected))
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=name)


@by_case(CASES)
def test_only_a_run_that_must_repeat_takes_algorithms_that_do(case: Case, outcomes: dict):
    for rank in outcomes[case]:
        assert rank.deterministic <= {case.sections["deterministic"]}
    assert any(rank.deterministic for rank in outcomes[case])


@by_case(CASES)
def test_losses_and_gradient_norms_are_those_of_transformers(case: Case, outcomes: dict, references: dict):
    reference = references[case.model]
    # A loss is a difference of larger terms, and may come out near 0: it is compared by the size of the largest.
    scale = max(map(abs, reference.losses))
    for rank in outcomes[case]:
        assert rank.losses == pytest.approx(reference.losses, rel=0, abs=1e-5 * scale)
        assert rank.norms == pytest.approx(reference.norms, rel=1e-5)
        assert rank.entropy_means == pytest.approx(reference.entropy_means, rel=1e-5)


@by_case(CASES)
def test_weights_after_three_updates_are_those_of_transformers(case: Case, outcomes: dict, references: dict):
    """Relative to the largest weight of each tensor, and relative to what the updates changed."""
    reference = references[case.model]
    weights = outcomes[case][0].weights
    assert set(weights) == set(reference.weights)
    worst_weight = worst_change = 0.0
    for name, expected in reference.weights.items():
        difference = np.abs(weights[name] - expected)
        worst_weight = max(worst_weight, float(difference.max() / np.abs(expected).max()))
        change = np.linalg.norm(expected - reference.before[name])
        worst_change = max(worst_change, float(np.linalg.norm(difference) / change))
    assert worst_weight < 1e-5
    assert worst_change < 1e-4


def test_the_comparison_covers_what_it_says(outcomes: dict, references: dict):
    """Several micro-batches in every case, clipped tokens on both sides, clipped gradients, weights that moved."""
    for case, ranks in outcomes.items():
        # Four replicas have three or four sequences each, which may fit one micro-batch.
        replicas = grid_of_rank(0, case.processes, ParallelSettings(**case.sections["parallel"])).data
        assert max(rank.micro_batches for rank in ranks) > 1 or replicas == 4, case.name
    for reference in references.values():
        assert all(norm > OPTIMIZER["clip_grad"] for norm in reference.norms)
        assert all(math.isfinite(loss) for loss in reference.losses)
        for name, weights in reference.weights.items():
            assert np.abs(weights - reference.before[name]).max() > OPTIMIZER["lr"]
