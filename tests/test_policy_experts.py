"""Routers in whole passes of the policy: balancing loss, load, the engine's experts compared and replayed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import torch

#: Processes and layouts under which everything must be the same.
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"expert": 2}),
    (2, {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1}),
    (2, {"context": 2}),
    (2, {"pipeline": 2}),
]
#: Enough for the whole mini-batch: a balancing loss is of a micro-batch, so layouts must agree on what one is.
TOKENS = 2048
COEFFICIENT = 0.3


def configuration(path: Path, parallel: dict[str, Any], **moe: Any) -> Any:
    return parity.run_config(path, parallel=parallel, moe=moe, batch={"tokens_per_microbatch": TOKENS})


def routing(batch: list, seed: int) -> list:
    """The batch with experts drawn for all tokens but the last of each sequence; those of the third are not known."""
    random = np.random.default_rng(seed)
    made = []
    for index, sequence in enumerate(batch):
        shape = (sequence.length - 1, 3)
        drawn = np.stack([random.permuted(np.tile(np.arange(4), (*shape, 1)), axis=-1)[..., :2]])[0].astype(np.int16)
        made.append(replace(sequence, routed_experts=None if index == 2 else drawn))
    return made


def measure(world: Any, path: Path, layouts: list[dict[str, Any]], batch: list, routed: list) -> list[dict[str, Any]]:
    """Of every layout: an update with a balancing loss, its gradients, and log-probs under replayed routing."""
    return [measure_layout(world, path, layout, batch, routed) for layout in layouts]


def measure_layout(world: Any, path: Path, layout: dict[str, Any], batch: list, routed: list) -> dict[str, Any]:
    found: dict[str, Any] = {}
    # Two replicas take half of the mini-batch each, so their micro-batches are not those of one.
    whole = layout.get("expert", 1) == 1 or "tensor" in layout
    config = configuration(path, layout, aux_loss_coefficient=COEFFICIENT)
    with parity.policy_of(config, world) as policy:
        gradient = last_routers_gradient(policy, config, batch)
        # After a pass of which nothing may be left.
        result = parity.update(policy, parity.grpo(config), batch)
        found["means"], found["norm"], found["whole"] = result.means, result.grad_norm, whole
    config = configuration(path, layout, aux_loss_coefficient=0.0)
    with parity.policy_of(config, world) as policy:
        found["balancing gradient"] = gradient - last_routers_gradient(policy, config, batch)
    for kind in ("off", "compare", "on"):
        config = configuration(path, layout, routing_replay=kind)
        with parity.policy_of(config, world) as policy:
            mine = parity.share(batch, policy.grid)
            given = batch if kind == "off" else routed
            log_probs = policy.measure([given[i] for i in mine])
            found[kind] = {} if log_probs is None else dict(zip(mine, log_probs, strict=True))
            recompute = config.model_copy(update={"recompute": config.recompute.model_copy(update={"kind": "full"})})
        for name, one in (("", config), (" recomputed", recompute)):
            with parity.policy_of(one, world) as policy:
                result = parity.update(policy, parity.grpo(one), given)
                found[f"{kind}{name} norm"], found[f"{kind}{name} means"] = result.grad_norm, result.means
    return found


def last_routers_gradient(policy: Any, config: Any, batch: list) -> np.ndarray | float:
    """What one pass, discarded then, gives of the gradient of the last layer's router on this rank; 0 where another
    stage has that layer. The gradient is the sum over ranks, which only a step makes."""
    from megatron.core.transformer.moe.router import TopKRouter

    mine = [batch[i] for i in parity.share(batch, policy.grid)]
    policy.accumulate(mine, parity.grpo(config).objectives, parity.totals(batch), old_is_current=False)
    routers: list[Any] = [m for chunk in policy.chunks for m in chunk.modules() if isinstance(m, TopKRouter)]
    last = [m.weight for m in routers if m.layer_number == policy.shape.num_layers]
    found = last[0].main_grad.numpy().astype(np.float64) if last else 0.0
    policy.discard()
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parity.write_model(tmp_path_factory.mktemp("experts"), "qwen3-moe")


@pytest.fixture(scope="module")
def batches() -> tuple[list, list]:
    plain = parity.mini_batch(5)
    zeros = [np.full(s.trained, -3.0, np.float32) for s in plain]
    batch = parity.with_old_log_probs(plain, zeros, 5)
    return batch, routing(batch, 6)


@pytest.fixture(scope="module")
def outcomes(path: Path, batches: tuple[list, list]) -> list[list[dict[str, Any]]]:
    """By layout, of all ranks."""
    found: dict[int, list[list[dict[str, Any]]]] = {}
    for processes in (1, 2):
        layouts = [layout for number, layout in LAYOUTS if number == processes]
        found[processes] = parity.run_world("test_policy_experts", "measure", processes, path, layouts, *batches)
    taken = dict.fromkeys(found, 0)
    made = []
    for processes, _ in LAYOUTS:
        made.append([rank[taken[processes]] for rank in found[processes]])
        taken[processes] += 1
    return made


class Network:
    """Transformers' model, whose routers are told which experts to take and asked for what they chose."""

    def __init__(self, path: Path) -> None:
        self.model = parity.transformers_model(path)
        self.forced: np.ndarray | None = None
        self.logits: list[torch.Tensor] = []
        self.hidden: list[torch.Tensor] = []
        sparse = [layer.mlp for layer in self.model.model.layers if hasattr(layer.mlp, "gate")]
        for number, mlp in enumerate(sparse):
            mlp.gate.forward = self._gate(mlp.gate, number)

    def _gate(self, gate: Any, number: int) -> Any:
        def forward(hidden: torch.Tensor) -> Any:
            flat = hidden.reshape(-1, hidden.shape[-1])
            logits = flat @ gate.weight.T
            self.logits.append(logits)
            self.hidden.append(flat)
            probabilities = torch.softmax(logits, -1)
            chosen = probabilities.topk(2, -1).indices
            if self.forced is not None:
                known = torch.from_numpy(self.forced[:, number].astype(np.int64))
                chosen[: len(known)] = known
            weights = probabilities.gather(-1, chosen)
            return logits, weights / weights.sum(-1, keepdim=True), chosen

        return forward


def test_replayed_routing_is_that_of_transformers_told_the_same(path: Path, batches: Any, outcomes: Any) -> None:
    network = Network(path)
    for kind, batch in (("off", batches[0]), ("compare", batches[0]), ("on", batches[1])):
        expected = []
        for sequence in batch:
            network.forced = sequence.routed_experts if kind == "on" else None
            with torch.no_grad():
                expected.append(parity.token_values(network.model, sequence)[0].numpy())
        for (processes, layout), ranks in zip(LAYOUTS, outcomes, strict=True):
            values = {index: found for rank in ranks for index, found in rank[kind].items()}
            assert len(values) == len(expected)
            for index, ours in values.items():
                np.testing.assert_allclose(
                    ours, expected[index], rtol=0, atol=1e-5, err_msg=f"{kind} {processes} {layout}"
                )
    # The drawn experts are others than those chosen, or nothing would be shown.
    assert (
        max(
            np.abs(a - b).max()
            for a, b in zip(outcomes[0][0]["on"].values(), outcomes[0][0]["off"].values(), strict=True)
        )
        > 0.1
    )


def test_the_share_of_differing_routings(path: Path, batches: Any, outcomes: Any) -> None:
    network = Network(path)
    differing = total = 0
    for sequence in batches[1]:
        network.logits.clear()
        with torch.no_grad():
            parity.token_values(network.model, sequence)
        if sequence.routed_experts is None:
            continue
        for number, logits in enumerate(network.logits):
            own = logits.topk(2, -1).indices.sort(-1).values.numpy()[: sequence.length - 1]
            named = np.sort(sequence.routed_experts[:, number], -1)
            differing += int((own != named).any(-1).sum())
            total += len(named)
    assert 0 < differing < total
    for ranks in outcomes:
        for rank in ranks:
            assert "routing_differs" not in rank["off means"]
            assert rank["compare means"]["routing_differs"] == pytest.approx(differing / total)
            assert rank["compare norm"] == pytest.approx(rank["off norm"], rel=1e-6)
            assert abs(rank["on norm"] / rank["off norm"] - 1) > 1e-3


def test_recomputed_layers_take_the_same_experts(outcomes: Any) -> None:
    for ranks in outcomes:
        for kind in ("off", "compare", "on"):
            assert ranks[0][f"{kind} recomputed norm"] == pytest.approx(outcomes[0][0][f"{kind} norm"], rel=1e-5)
            for name, value in outcomes[0][0][f"{kind} means"].items():
                assert ranks[0][f"{kind} recomputed means"][name] == pytest.approx(value, rel=1e-4, abs=1e-6)


def balancing_loss(logits: torch.Tensor, experts: int, k: int) -> torch.Tensor:
    """experts x the sum over experts of (share of choices) x (mean probability): 1 where both are even."""
    probabilities = torch.softmax(logits, -1)
    chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(k, -1).indices, 1.0)
    return experts * (chosen.mean(0) / k * probabilities.mean(0)).sum()


def balancing_gradient(hidden: list[torch.Tensor], logits: torch.Tensor, k: int) -> np.ndarray:
    """That of `balancing_loss` to the router's weights (experts, hidden), in closed form: choices are constants.

    d loss / d logits[t, j] = experts / T · p[t, j] · (f[j] - Σᵢ f[i] p[t, i]), f the shares of choices.
    """
    states, scores = (part.detach().numpy().astype(np.float64) for part in (torch.cat(hidden), logits))
    probabilities = np.exp(scores - scores.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    chosen = np.argsort(-scores, axis=1)[:, :k]
    shares = np.bincount(chosen.flatten(), minlength=scores.shape[1]) / chosen.size
    to_logits = probabilities * (shares - (probabilities * shares).sum(1, keepdims=True))
    return scores.shape[1] / len(scores) * to_logits.T @ states


def test_the_balancing_loss_and_its_gradient(path: Path, batches: Any, outcomes: Any) -> None:
    network = Network(path)
    from test_policy_parity import token_losses

    batch = batches[0]
    values = [parity.token_values(network.model, s) for s in batch]
    layers = [torch.cat(network.logits[number::3]) for number in range(3)]
    aux = [balancing_loss(logits, 4, 2) for logits in layers]
    tokens = sum(s.trained for s in batch)
    loss = torch.stack([token_losses(*v, s).sum() for v, s in zip(values, batch, strict=True)]).sum() / tokens
    (loss + COEFFICIENT * torch.stack(aux).sum()).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(network.model.parameters(), 1e9))
    load = torch.stack(
        [torch.bincount(logits.topk(2, -1).indices.flatten(), minlength=4) for logits in layers]
    ).double()
    for ranks in outcomes:
        for rank in ranks:
            means = rank["means"]
            assert means["expert_load_max"] == pytest.approx(float((load.amax(1) / load.mean(1)).max()))
            assert means["experts_idle"] == float((load == 0).double().mean())
            if rank["whole"]:
                assert rank["norm"] == pytest.approx(norm, rel=1e-5)
                assert means["router_aux_loss"] == pytest.approx(float(torch.stack(aux).detach().mean()), rel=1e-5)
                found = sum(one["balancing gradient"] for one in ranks)
                expected = COEFFICIENT * balancing_gradient(network.hidden[2::3], layers[2], 2)
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    # Without it the gradient is another one.
    assert abs(outcomes[0][0]["off norm"] / norm - 1) > 1e-3
