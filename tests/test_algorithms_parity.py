"""Every algorithm's gradient through the real policy: the same under every layout, and the same as transformers'.

Groups are routed as in a run: rank 0 holds all samples and explanations, the algorithm chooses what is trained, and
each data-parallel rank gets its share. Gradients, not weights, are compared: Adam would hide their size.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import torch

from megarl.records import Body, Head, Prompt, Sequence, Stretch

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
    "opd": {"name": "opd", "teacher": {"checkpoint": "unused"}, "discount": 0.9, "clip_low": 0.15, "clip_high": 0.2},
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


def made_for(rank: int) -> Any:
    """A step's groups of unlike lengths, with mixed rewards, as rank `rank` knows them; rank 0 holds all tokens.

    The second answer of each group has several turns, the third of one a prompt of its own, and the last of one failed
    before it had a token.
    """
    from group_case import group_of

    from megarl.train.groups import Made

    random = np.random.default_rng(11)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(int(t) for t in random.integers(2, VOCABULARY, int(random.integers(least, most))))

    groups, bodies = [], {}
    for number in range(GROUPS):
        prompt = Prompt(number, tokens(1, 12), "", "")
        answers = []
        for _ in range(SIZE):
            ids = tokens(4, 16)
            answers.append(Body(ids, tuple(float(x) for x in random.normal(-4.5, 0.2, len(ids)))))
        chosen = Body(tokens(4, 20))
        rewards = [float(k < 1 + number % 3) for k in range(SIZE)]
        lengths = [len(body.token_ids) for body in answers]
        ends = [None if k == 3 else length // 2 for k, length in enumerate(lengths)]
        # One prompt has no explanation.
        texts = [] if number == 2 else [len(chosen.token_ids)]
        if number == 4:
            answers[3], lengths[3] = Body(()), 0
        group = group_of(rewards, lengths, ends, explanations=texts, number=number, prompt=prompt)
        heads = list(group.heads)
        heads[1], answers[1] = in_turns(heads[1], answers[1])
        if number == 1:
            own = tokens(5, 9)
            heads[2] = replace(heads[2], prompt_length=len(own))
            answers[2] = replace(answers[2], prompt_ids=own)
        group = replace(group, heads=tuple(heads))
        groups.append(group)
        bodies |= dict(zip((head.key for head in group.heads), [*answers, chosen], strict=False))
    return Made(tuple(groups), bodies=bodies if rank == 0 else {})


def in_turns(head: Head, body: Body) -> tuple[Head, Body]:
    """A sample whose second token an environment put there, and some in its second half."""
    cuts = [0, 1, 2, head.length // 2, head.length - 1, head.length]
    stretches = tuple(
        Stretch(start, end, "environment" if number % 2 else "policy", 0)
        for number, (start, end) in enumerate(itertools.pairwise(cuts))
    )
    log_probs = list(body.log_probs)
    for start, end, source, _ in stretches:
        if source == "environment":
            log_probs[start:end] = [float("nan")] * (end - start)
    return replace(head, stretches=stretches), replace(body, log_probs=tuple(log_probs))


def batch_of(algorithm: Any, made: Any, data_parallel: int) -> list[Any]:
    """The mini-batch of all groups."""
    from megarl.train.route import assign
    from megarl.train.selection import credited_groups

    credited, _ = credited_groups(made.groups, algorithm.credit(1, made.groups))
    batches, _ = assign(credited, 1, data_parallel, together=algorithm.objectives[0].together)
    return batches


def near(values: np.ndarray, sequence: Sequence, purpose: int) -> np.ndarray:
    """Values scattered around `values`, always alike for the same sequence."""
    random = np.random.default_rng([purpose, *sequence.tokens.tolist()])
    return (values + random.normal(scale=0.2, size=values.shape)).astype(np.float32)


def measured(sequence: Sequence, values: np.ndarray) -> None:
    """Give the sequence what the policy would have measured where these are its log-probs now."""
    if sequence.kind == "answer":
        sequence.old_log_probs = near(values, sequence, 1)
    sequence.log_probs_under |= {"reference": near(values, sequence, 2), "teacher": near(values, sequence, 3)}


def routed(world: Any, config: Any, algorithm: Any) -> tuple[list[Sequence], Any]:
    """This rank's sequences of one mini-batch, and the counts of the whole."""
    from megarl.config.grid import grid_of_rank
    from megarl.train.route import deliver

    made = made_for(world.rank)
    grid = grid_of_rank(world.rank, world.size, config.parallel)
    batches = batch_of(algorithm, made, grid.data)
    assert grid.data_rank < len(batches[0].items)
    return deliver(made.bodies, [batch.items for batch in batches], config, world)[0], batches[0].totals


def put_gradients_in_place(optimizer: torch.optim.Optimizer) -> None:
    """In place of Adam's step: the weights become the gradient, which Megatron then gathers as it does weights."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.data.copy_(parameter.grad)


def gradients(world: Any, config: Any, folder: str) -> tuple[float, float, dict[str, np.ndarray] | None]:
    """Scenario: loss, gradient norm, and on rank 0 the gradient by Hugging Face name."""
    with parity.policy_of(config, world) as policy:
        algorithm = parity.grpo(config)
        sequences, totals = routed(world, config, algorithm)
        for s, values in zip(sequences, policy.measure(sequences) or [], strict=False):
            measured(s, values)
        for optimizer in policy.trained["policy"].optimizer.chained_optimizers:
            if not optimizer.is_stub_optimizer:
                optimizer.optimizer.step = lambda inner=optimizer.optimizer: put_gradients_in_place(inner)
        found = policy.accumulate(sequences, algorithm.objectives, totals)["policy"]
        step = policy.step()["policy"]
        assert not step.skipped
        return found.loss, step.grad_norm, parity.exported(policy, Path(folder))


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

    from megarl.algorithms.objective import LossInputs, total
    from megarl.policy.batch import lay_out

    config = configuration(model, name, True)
    algorithm = parity.grpo(config)
    made = made_for(0)
    (batch,) = batch_of(algorithm, made, 1)
    network = parity.transformers_model(model)
    sequences, parts, entropies = [], [], []
    for group, trained in batch.items[0]:
        body, target = made.bodies[trained.head.key], trained.head.key.kind == "explanation"
        prompt, spans = body.prompt_ids or group.prompt.token_ids, trained.spans
        places = [place for span in spans for place in range(span.start, span.end)]
        s = Sequence(
            np.array([*prompt, *body.token_ids[: spans[-1].end]], np.int32),
            np.array(places, np.int32) + len(prompt),
            None if target else np.full(trained.tokens, spans[0].advantage, np.float32),
            group=group.number,
            kind=trained.head.key.kind,
            rollout_log_probs=None if target else np.array([body.log_probs[place] for place in places], np.float32),
            signals=dict(trained.signals),
        )
        log_probs, entropy = parity.token_values(network, s)
        values = log_probs.detach().numpy()
        measured(s, values)
        sequences.append(s)
        parts.append(log_probs)
        entropies.append(entropy)
    flat: Any = lay_out(sequences, packed=True) if sequences else SimpleNamespace()
    terms = total(
        algorithm.objectives,
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
            log_probs_under_T=flat.log_probs_under,
            advantages_T=flat.advantages,
            signals_S=flat.signals,
            kind_S=flat.kinds,
            group_S=flat.group,
        ),
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
