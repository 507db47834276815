"""Log-probs from hidden states and the output layer's weight, in bf16 against the same numbers in fp64."""

from __future__ import annotations

import pytest
import torch

from megarl.parallel.vocab import token_log_probs, vocabulary_shard

TOKENS, HIDDEN, VOCABULARY = 512, 256, 2048


@pytest.fixture(scope="module")
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states and weight in bf16, with logits of a deviation of 8; targets; the gradient of their log-probs."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=generator) * 8 / HIDDEN**0.5).bfloat16()
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return hidden, weight, targets, torch.randn(TOKENS, generator=generator)


def chosen(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)


def gradients(
    case: tuple[torch.Tensor, ...], chunk: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, and the gradients of hidden states and weight."""
    hidden, weight, targets, upstream = case
    of_hidden, of_weight = (leaf.clone().to(dtype).requires_grad_() for leaf in (hidden, weight))
    shard = vocabulary_shard(VOCABULARY, VOCABULARY, 0, None)
    log_probs, _ = token_log_probs(of_hidden, of_weight, targets, shard, chunk=chunk)
    log_probs.backward(upstream)
    assert of_hidden.grad is not None and of_weight.grad is not None
    return log_probs.detach(), of_hidden.grad, of_weight.grad


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_log_probs_of_bf16_weights_are_not_rounded_on_their_way(case: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets, _ = case
    exact = chosen(hidden.double() @ weight.double().T, targets)
    log_probs, _, _ = gradients(case, chunk=100)
    assert log_probs.dtype == torch.float32
    assert float((log_probs - exact).abs().max()) < 2e-5
    # What rounded logits would give.
    rounded = chosen((hidden @ weight.T).double(), targets)
    assert float((rounded - exact).abs().max()) > 0.03


def test_the_weights_gradient_is_rounded_once_whatever_the_chunks(case: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets, upstream = case
    exact = (hidden.double().requires_grad_(), weight.double().requires_grad_())
    chosen(exact[0] @ exact[1].T, targets).backward(upstream.double())
    assert exact[0].grad is not None and exact[1].grad is not None
    errors: list[float] = []
    for chunk in (TOKENS, TOKENS // 64):
        _, of_hidden, of_weight = gradients(case, chunk)
        assert of_weight.dtype == of_hidden.dtype == torch.bfloat16
        assert relative(of_hidden, exact[0].grad) < 0.004
        errors.append(relative(of_weight, exact[1].grad))
    assert errors[0] < 0.003
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_a_frozen_weight_gets_no_gradient(case: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets, upstream = case
    leaf, shard = hidden.clone().requires_grad_(), vocabulary_shard(VOCABULARY, VOCABULARY, 0, None)
    token_log_probs(leaf, weight, targets, shard, chunk=64)[0].backward(upstream)
    assert weight.grad is None and leaf.grad is not None
    assert torch.equal(leaf.grad, gradients(case, 64)[1])


def test_sums_of_fp32_weights_are_those_of_their_own_type(case: tuple[torch.Tensor, ...]) -> None:
    """To the last bit: nothing is widened, nor cut up, that has nothing to gain from it."""
    hidden, weight, targets, upstream = (one.float() if one.is_floating_point() else one for one in case)
    log_probs, of_hidden, of_weight = gradients(case, TOKENS // 4, torch.float32)
    by_hand = torch.zeros_like(weight)
    for start in range(0, TOKENS, TOKENS // 4):
        part = slice(start, start + TOKENS // 4)
        logits = hidden[part] @ weight.T
        maximum = logits.amax(dim=1)
        log_normaliser = maximum + torch.log(torch.exp(logits - maximum[:, None]).sum(dim=1))
        index = targets[part, None]
        assert torch.equal(log_probs[part], logits.gather(1, index).squeeze(1) - log_normaliser)
        gradient = torch.exp(logits - log_normaliser[:, None]) * -upstream[part, None]
        gradient.scatter_add_(1, index, upstream[part, None])
        assert torch.equal(of_hidden[part], gradient @ weight)
        by_hand.addmm_(gradient.T, hidden[part])
    assert torch.equal(of_weight, by_hand)
