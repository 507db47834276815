"""The policy in FP8 on the CPU: how far from fp32, under which layouts the same, what it remembers, and that it learns.

The models' sides are multiples of 128 on every rank, so that tiles are cut alike under every layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import parity
import pytest
import torch

from megarl.config.schema import RunConfig
from megarl.ops import fp8

MODELS = ("qwen2-untied", "qwen2-moe")
SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
OF_EXPERTS = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
#: By number of processes and model; the first is what the others are compared with.
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "qwen2-untied": [{"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"context": 2}],
    "qwen2-moe": [{"tensor": 2, "sequence": True}, {"expert": 2}, {"expert_tensor": 2}, {"context": 2}],
}


def config_of(folder: Path, model: str, precision: str, **sections: Any) -> RunConfig:
    sections = {"algorithm": {"name": "grpo"}, "batch": {"tokens_per_microbatch": 160, "logprob_chunk": 16}} | sections
    return parity.run_config(folder / model, precision=precision, **sections)


@contextmanager
def fp32_between_products() -> Iterator[None]:
    """Activations, gradients and weights stay fp32 under FP8 too: layouts then differ by fp32's rounding alone, which
    moves few numbers over the edge between two of FP8's."""
    with mock.patch.object(RunConfig, "params_dtype", property(lambda _: "fp32")):
        yield


class Noisy(torch.autograd.Function):
    """A linear layer whose operands are each off by an even draw from ±u, u what FP8 rounds by at most.

    FP8 itself is off by less: by half as much at the upper end of a binade, and by an even draw in between.
    """

    gradients: torch.dtype
    generator: torch.Generator

    @staticmethod
    def off(x: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
        drawn = torch.rand(x.shape, generator=Noisy.generator) * 2 - 1
        return x * (1 + fp8.ROUNDING[kind] * drawn)

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        inputs, weight = Noisy.off(inputs, fp8.E4M3), Noisy.off(weight, fp8.E4M3)
        ctx.save_for_backward(inputs, weight)
        ctx.biased = bias is not None
        return torch.nn.functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        inputs, weight = ctx.saved_tensors
        off = Noisy.off(gradient, Noisy.gradients)
        of_weight = off.flatten(0, -2).T @ inputs.flatten(0, -2)
        return off @ weight, of_weight, gradient.flatten(0, -2).sum(0) if ctx.biased else None


@contextmanager
def noise_for_fp8(recipe: str) -> Iterator[None]:
    """The products of an FP8 policy by `Noisy`."""
    from megarl.policy import cpu_layers

    Noisy.gradients, Noisy.generator = fp8.RECIPES[recipe].gradients, torch.Generator().manual_seed(7)
    noisy = lambda inputs, weight, bias, _: Noisy.apply(inputs, weight, bias)  # noqa: E731
    with mock.patch.object(cpu_layers, "fp8_linear", noisy), fp32_between_products():
        yield


def log_probs_and_gradient(policy: Any, batch: list) -> tuple[np.ndarray, np.ndarray]:
    """Of all trained tokens of the batch, and of all parameters, flat."""
    objectives = parity.grpo(policy.config).objectives
    log_probs = np.concatenate(policy.measure(batch))
    policy.accumulate(batch, objectives, parity.totals(batch), old_is_current=True)
    gradient = policy.trained["policy"].take()
    return log_probs, np.concatenate([one.flatten().numpy() for one in gradient.values])


def errors(world: Any, folder: Path) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Of each model and precision: error against fp32 of log-probs, in nats in the root mean square, and of gradients,
    relative; of FP8, and of noise in its place. A scenario of `run_world`."""
    batch, found = parity.mini_batch(0, number=24), {}
    for model in MODELS:
        with parity.policy_of(config_of(folder, model, "fp32"), world) as policy:
            exact = log_probs_and_gradient(policy, batch)

        def error(policy: Any, exact: Any = exact) -> tuple[float, float]:
            log_probs, gradient = log_probs_and_gradient(policy, batch)
            away = np.sqrt(np.mean((log_probs - exact[0]).astype(np.float64) ** 2))
            return float(away), float(np.linalg.norm(gradient - exact[1]) / np.linalg.norm(exact[1]))

        for recipe in fp8.RECIPES:
            config = config_of(folder, model, recipe)
            with parity.policy_of(config, world) as policy:
                if fp8.RECIPES[recipe].delayed:
                    know_amaxes(policy, batch)
                ours = error(policy)
            with noise_for_fp8(recipe), parity.policy_of(config, world) as policy:
                found[model, recipe] = [ours, error(policy)]
    return found


def know_amaxes(policy: Any, batch: list) -> None:
    """Let delayed scaling see the batch, without a step."""
    from megarl.policy.fp8_linear import end_step, scalings

    objectives = parity.grpo(policy.config).objectives
    policy.accumulate(batch, objectives, parity.totals(batch), old_is_current=True)
    end_step(scalings(policy.chunks))
    policy.discard()


def log_probs_of_layouts(world: Any, folder: Path, model: str, layouts: list) -> list[dict[str, Any]]:
    """By layout and recipe the log-probs that this rank holds, by sequence, and the gradient's norm."""
    batch, found = parity.mini_batch(0, number=24), []
    for layout in layouts:
        by_recipe = {}
        for recipe in fp8.RECIPES:
            config = config_of(folder, model, recipe, parallel=layout)
            with fp32_between_products(), parity.policy_of(config, world) as policy:
                mine = parity.share(batch, policy.grid)
                if fp8.RECIPES[recipe].delayed:
                    know_amaxes(policy, [batch[i] for i in mine])
                log_probs = policy.measure([batch[i] for i in mine]) or []
                objectives, counts = parity.grpo(config).objectives, parity.totals(batch)
                policy.accumulate([batch[i] for i in mine], objectives, counts, old_is_current=True)
                by_recipe[recipe] = dict(zip(mine, log_probs, strict=False)), policy.trained["policy"].take().norm
        found.append(by_recipe)
    return found


def write_models(folder: Path) -> Path:
    """With weights so small that an error of FP8 changes log-probs in proportion."""
    for model in MODELS:
        parity.write_model(folder, model, deviation=0.03, **SIZES, **(OF_EXPERTS if "moe" in model else {}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("precision"))


@pytest.fixture(scope="module")
def found_errors(folder: Path) -> dict[tuple[str, str], list[tuple[float, float]]]:
    return parity.run_world("test_precision", "errors", 1, folder)[0]


@pytest.mark.processes
def test_errors_are_those_of_the_formats(found_errors: dict):
    """Below what noise of the format's largest rounding makes of the same network, and above a third of it: it is FP8
    that was computed."""
    for case, ((log_probs, gradient), (most_log_probs, most_gradient)) in found_errors.items():
        assert most_log_probs / 3 < log_probs < most_log_probs, case
        assert most_gradient / 3 < gradient < most_gradient, case


#: Where amaxes are of other tokens than in one process: of a rank's share of them, and of what pads it.
OTHER_AMAXES = {
    "fp8-tensorwise": ("context", "expert", "expert_tensor"),
    "fp8-delayed": ("context",),
    "fp8-blockwise": (),
}


@pytest.mark.processes
def test_layouts_give_the_same_numbers(folder: Path, found_errors: dict):
    """With fp32 between products: nine in ten log-probs to 1e-5. A last bit that differs may put a number on the other
    side of the edge between two of FP8's, and what follows it. Where amaxes are of other tokens, the difference is that
    of two errors of the format."""
    for model in MODELS:
        whole = parity.run_world("test_precision", "log_probs_of_layouts", 1, folder, model, [{}])[0][0]
        ranks = parity.run_world("test_precision", "log_probs_of_layouts", 2, folder, model, LAYOUTS[model])
        for number, layout in enumerate(LAYOUTS[model]):
            for recipe, (log_probs, norm) in whole.items():
                found = {i: values for rank in ranks for i, values in rank[number][recipe][0].items()}
                assert sorted(found) == sorted(log_probs)
                away = np.abs(np.concatenate([found[i] - log_probs[i] for i in log_probs]))
                if any(cut in layout for cut in OTHER_AMAXES[recipe]):
                    noise = found_errors[model, recipe][1][0]
                    assert 0 < np.sqrt(np.mean(away**2)) < math.sqrt(2) * noise, (layout, recipe)
                else:
                    assert np.quantile(away, 0.9) < 1e-5, (layout, recipe)
                assert ranks[0][number][recipe][1] == pytest.approx(norm, rel=5e-3), (layout, recipe)
