"""Every algorithm's gradient through the real policy: the same under every layout, and the same as transformers'.

Groups are routed as in a run: rank 0 holds all samples and explanations, the algorithm chooses what is trained, and
each data-parallel rank gets its share. Gradients, not weights, are compared: Adam would hide their size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import torch

from megarl.records import Prompt, Sample, Sequence

LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [{"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {}, {"context": 2}],
    4: [{"tensor": 2}, {"tensor": 2, "pipeline": 2}, {"context": 2, "tensor": 2}],
}
#: Settings under which every term of each loss counts.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo-mismatch": {
        "name": "grpo",
        "advantage": "reinforce_pp_baseline",
        "aggregation": "token_sum",
        "kl_coefficient": 0.05,
        "kl_kind": "k3+",
        "importance_cap": 1.5,
        "importance_level": "sequence",
        "rejection_bounds": (0.9, 1.2),
        "rejection_level": "sequence_mean",
    },
    "nft": {"name": "nft", "aggregation": "token_mean"},
    "nft-sequence": {"name": "nft", "ratio_level": "sequence", "prompt_weight": "sqrt_odds", "epsilon": 0.9},
    "exp_grpo": {"name": "exp_grpo", "explanation_weight": 0.3, "kl_coefficient": 0.05, "clip_low": 0.15},
    "exp_grpo-sum": {"name": "exp_grpo", "explanation_weight": 0.3, "explanation_aggregation": "sum"},
    "exp_dpo": {"name": "exp_dpo", "beta": 0.4, "rejected": "wrong"},
    "start": {"name": "start", "kl_coefficient": 0.05, "dual_clip": 3.0},
    "start-second": {"name": "start", "thinking_steps": 0, "normalizer": "response"},
}
GROUPS, SIZE, VOCABULARY = 5, 4, 97
#: Processes and layout under which rows are padded too: alone, with tensor and data, with context parallelism. How they
#: are is no algorithm's business, so beyond one process one stands for all, the one that reads every log-prob.
PADDED = {(1, 0), (4, 0), (2, 4), (4, 2)}
#: Algorithm, processes, layout, packed.
KEYS = [
    (name, processes, layout, packed)
    for name in ALGORITHMS
    for processes, layouts in LAYOUTS.items()
    for layout in range(len(layouts))
    for packed in (True, False)
    if packed or ((processes, layout) in PADDED and (processes == 1 or name == "grpo-mismatch"))
]


def groups(rank: int) -> Any:
    """A step's groups of unlike lengths, with mixed rewards, as rank `rank` knows them; rank 0 holds all tokens."""
    from megarl.train.groups import Rollouts, Score, Target

    random = np.random.default_rng(11)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(int(t) for t in random.integers(2, VOCABULARY, int(random.integers(least, most))))

    made = Rollouts(SIZE)
    for group in range(GROUPS):
        made.prompts.append(Prompt(group, tokens(1, 12), "", ""))
        for k in range(SIZE):
            ids = tokens(4, 16)
            reward = float(k < 1 + group % 3)
            made.scores[group * SIZE + k] = Score(reward, len(ids), True, 0, None if k == 3 else len(ids) // 2)
            log_probs = tuple(float(x) for x in random.normal(-4.5, 0.2, len(ids)))
            if rank == 0:
                made.mine[group * SIZE + k] = Sample(group, k, ids, log_probs, "stop", reward=reward)
        chosen = tokens(4, 20)
        # One prompt has no explanation.
        if group != 2:
            made.targets[group] = [Target(0, 0, len(chosen), len(chosen) - 2)]
            if rank == 0:
                made.my_targets[group, 0] = chosen
        made.kept.append(group)
    return made


def items_of(algorithm: Any, rollouts: Any) -> dict[int, list[Any]]:
    """What is trained; the explanations only where the algorithm asks for them."""
    from megarl.train.selection import step_items

    if not algorithm.needs.explanations:
        rollouts.targets = {}
    return step_items(algorithm, rollouts)


def near(values: np.ndarray, sequence: Sequence, purpose: int) -> np.ndarray:
    """Values scattered around `values`, always alike for the same sequence."""
    random = np.random.default_rng([purpose, sequence.group, sequence.sample, sequence.target])
    return (values + random.normal(scale=0.2, size=values.shape)).astype(np.float32)


def routed(world: Any, config: Any, algorithm: Any) -> tuple[list[Sequence], Any]:
    """This rank's sequences of one mini-batch, and the counts of the whole."""
    from megarl.config.grid import grid_of_rank
    from megarl.train.route import assign, deliver

    rollouts = groups(world.rank)
    items = items_of(algorithm, rollouts)
    grid = grid_of_rank(world.rank, world.size, config.parallel)
    batches = assign(rollouts, items, 1, grid.data, together=algorithm.needs.pairs)
    assert grid.data_rank < len(batches[0].items)
    return deliver(rollouts, batches, config, world)[0], batches[0].totals


def put_gradients_in_place(optimizer: torch.optim.Optimizer) -> None:
    """In place of Adam's step: the weights become the gradient, which Megatron then gathers as it does weights."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.data.copy_(parameter.grad)


def gradients(world: Any, config: Any, folder: str) -> tuple[float, float, dict[str, np.ndarray] | None]:
    """Scenario: loss, gradient norm, and on rank 0 the gradient by Hugging Face name."""
    with parity.policy_of(config, world) as policy:
        algorithm = parity.grpo(config)
        algorithm.begin_step(1)
        sequences, totals = routed(world, config, algorithm)
        for s, values in zip(sequences, policy.log_probs(sequences) or [], strict=False):
            s.old_log_probs, s.reference_log_probs = near(values, s, 1), near(values, s, 2)
        for optimizer in policy.optimizer.chained_optimizers:
            if not optimizer.is_stub_optimizer:
                optimizer.optimizer.step = lambda inner=optimizer.optimizer: put_gradients_in_place(inner)
        result = policy.update(sequences, algorithm, totals)
        assert not result.skipped
        return result.loss, result.grad_norm, parity.exported(policy, Path(folder))


def scenario(world: Any, configs: list[Any], folder: str) -> list[Any]:
    """`gradients` under each configuration."""
    return [gradients(world, config, f"{folder}/{world.size}-{i}") for i, config in enumerate(configs)]


def configuration(path: Path, algorithm: str, packed: bool, **parallel: Any) -> Any:
    return parity.run_config(
        path,
        algorithm=ALGORITHMS[algorithm],
        parallel=parallel,
        rollout={"group_size": SIZE, "max_tokens": 24},
        reward={"graded": "response"},
        batch={"packed": packed, "tokens_per_microbatch": 160},
        optimizer={"clip_grad": 0.0},
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parity.write_model(tmp_path_factory.mktemp("models"), "qwen2-tied")


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], Any]:
    """Rank 0's results by algorithm, number of processes, layout and packing."""
    results: dict[tuple[Any, ...], Any] = {}
    for processes in LAYOUTS:
        keys = [key for key in KEYS if key[1] == processes]
        configs = [configuration(model, a, p, **LAYOUTS[n][i]) for a, n, i, p in keys]
        folder = str(tmp_path_factory.mktemp("gradients"))
        ranks = parity.run_world("test_algorithms_parity", "scenario", processes, configs, folder)
        results |= dict(zip(keys, ranks[0], strict=True))
    return results


def expected(model: Path, name: str) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradient by transformers, all sequences in one go."""
    from types import SimpleNamespace

    from megarl.algorithms.objective import LossInputs
    from megarl.policy.batch import lay_out
    from megarl.train.route import assign

    config = configuration(model, name, True)
    algorithm = parity.grpo(config)
    algorithm.begin_step(1)
    rollouts = groups(0)
    items = items_of(algorithm, rollouts)
    (batch,) = assign(rollouts, items, 1, 1, together=algorithm.needs.pairs)
    network = parity.transformers_model(model)
    sequences, parts, entropies = [], [], []
    for item in batch.items[0]:
        prompt = rollouts.prompts[item.group].token_ids
        sample = None if item.target else rollouts.mine[item.group * SIZE + item.number]
        tokens = rollouts.my_targets[item.group, item.number] if sample is None else sample.token_ids
        s = Sequence(
            np.array([*prompt, *tokens[: item.end]], np.int32),
            len(prompt) + item.start,
            np.full(item.trained, item.advantage, np.float32),
            group=item.group,
            sample=item.number,
            target=item.target,
            rollout_log_probs=None
            if sample is None
            else np.array(sample.rollout_log_probs[item.start : item.end], np.float32),
            signals=item.signals,
        )
        log_probs, entropy = parity.token_values(network, s)
        values = log_probs.detach().numpy()
        s.old_log_probs, s.reference_log_probs = near(values, s, 1), near(values, s, 2)
        sequences.append(s)
        parts.append(log_probs)
        entropies.append(entropy)
    flat: Any = lay_out(sequences, packed=True) if sequences else SimpleNamespace()
    terms = algorithm.loss(
        LossInputs(
            log_probs_T=torch.cat(parts),
            entropy_T=torch.cat(entropies),
            mask_T=torch.ones(len(flat.sequence)),
            sequence_T=flat.sequence,
            num_sequences=len(sequences),
            lengths_S=flat.lengths,
            totals=batch.totals,
            old_log_probs_T=flat.old_log_probs,
            rollout_log_probs_T=flat.rollout_log_probs,
            reference_log_probs_T=flat.reference_log_probs,
            advantages_T=flat.advantages,
            signals_S=flat.signals,
            target_S=flat.target,
            group_S=flat.group,
        )
    )
    terms.loss.backward()
    return terms.loss.item(), {n: p.grad.numpy() for n, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradient_is_that_of_transformers(found: dict[Any, Any], model: Path, name: str) -> None:
    loss, gradient = expected(model, name)
    for packed in (True, False):
        reached, norm, exported = found[name, 1, 0, packed]
        assert reached == pytest.approx(loss, rel=1e-5, abs=1e-7)
        assert norm > 1e-4
        scale = max(np.abs(g).max() for g in gradient.values())
        for parameter, wanted in gradient.items():
            np.testing.assert_allclose(exported[parameter], wanted, rtol=0, atol=1e-5 * scale, err_msg=parameter)


CASES = [key for key in KEYS if key[1] > 1]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{LAYOUTS[c[1]][c[2]]}-{'packed' if c[3] else 'padded'}"
)
def test_gradient_is_the_same_under_every_layout(found: dict[Any, Any], case: tuple[str, int, int, bool]) -> None:
    loss, norm, gradient = found[case[0], 1, 0, True]
    reached, reached_norm, exported = found[case]
    assert reached == pytest.approx(loss, rel=1e-5, abs=1e-7)
    assert reached_norm == pytest.approx(norm, rel=1e-5)
    scale = max(np.abs(g).max() for g in gradient.values())
    for parameter, wanted in gradient.items():
        np.testing.assert_allclose(exported[parameter], wanted, rtol=0, atol=1e-5 * scale, err_msg=parameter)
