"""Log-probs and entropy of chosen tokens under a vocabulary-parallel output layer.

Logits exist for one chunk of tokens at a time, in the forward and in the backward pass: the backward
recomputes them from the saved log-normaliser. Two small all-reduces serve a whole micro-batch.

Of bf16 weights logits come in fp32 all the same: rounded to bf16, whose step is 1/8 from 16 on, they would put the
log-probs off by hundredths of a nat. The weight's gradient is added up in fp32 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Function

#: Whether products of bf16 matrices can come in fp32, as they were added up. On the CPU no version of torch has them.
_PRODUCTS_WIDEN = "dtype" in torch.ops.aten.mm.overloads()

#: Least rows of the vocabulary whose part of the weight's gradient is added in one go, where it is added in fp32.
_LEAST_ROWS = 256


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """This rank's rows of the output weight: rows `start … start + valid` of the vocabulary; the rest is padding."""

    start: int
    valid: int
    group: dist.ProcessGroup | None


def vocabulary_shard(vocab_size: int, rows: int, rank: int, group: dist.ProcessGroup | None) -> VocabularyShard:
    """The shard of `rank` when every rank holds `rows` rows of a vocabulary padded past `vocab_size`."""
    start = rank * rows
    return VocabularyShard(start, min(max(vocab_size - start, 0), rows), group)


def token_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    shard: VocabularyShard,
    *,
    temperature: float | torch.Tensor = 1.0,
    chunk: int = 1024,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of `targets` and the entropy of the distribution, both in nats, fp32.

    hidden (R, H); weight (rows, H), this rank's shard; targets (R,) ids in the whole vocabulary; `temperature` of all
    or, (R,), of each.
    Returns (log_probs (R,), entropy (R,)) of softmax(hidden @ weightᵀ / temperature). The gradient of
    `hidden` is this rank's part: the caller sums it over the tensor-parallel group. The entropy carries
    a gradient only with `entropy_gradient`.
    """
    log_probs, entropy = _TokenLogProbs.apply(
        hidden, weight, targets, shard, _reciprocal(temperature), chunk, entropy_gradient
    )
    return log_probs, entropy


class _TokenLogProbs(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        shard: VocabularyShard,
        scale: float | torch.Tensor,
        chunk: int,
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = hidden.shape[0]
        # Per token: local maximum, and sums relative to it: exp, exp * logit, and the target's logit.
        maximum = hidden.new_full((rows,), -torch.inf, dtype=torch.float32)
        sums = torch.zeros(3, rows, dtype=torch.float32, device=hidden.device)
        for part in _chunks(rows, chunk):
            if shard.valid == 0:
                break
            logits = _logits(hidden[part], weight, shard, _of_rows(scale, part))
            maximum[part] = logits.amax(dim=1)
            exponentials = torch.exp(logits - maximum[part, None])
            sums[0, part] = exponentials.sum(dim=1)
            sums[1, part] = torch.linalg.vecdot(exponentials, logits)
            index, held = _local_targets(targets[part], shard)
            sums[2, part] = torch.where(held, logits.gather(1, index[:, None]).squeeze(1), 0.0)
            # Names that stood while the next chunk's logits come would keep these.
            del logits, exponentials
        if shard.group is not None and dist.get_world_size(shard.group) > 1:
            local_maximum = maximum.clone()
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group=shard.group)
            sums[:2] *= torch.exp(local_maximum - maximum)
            dist.all_reduce(sums, group=shard.group)
        log_normaliser = maximum + torch.log(sums[0])
        log_probs = sums[2] - log_normaliser
        entropy = log_normaliser - sums[1] / sums[0]
        ctx.save_for_backward(hidden, weight, targets, log_normaliser, entropy)
        ctx.shard, ctx.scale, ctx.chunk, ctx.entropy_gradient = shard, scale, chunk, entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        log_prob_gradient, entropy_gradient = gradients
        hidden, weight, targets, log_normaliser, entropy = ctx.saved_tensors
        shard: VocabularyShard = ctx.shard
        hidden_gradient = torch.zeros_like(hidden)
        weight_gradient = torch.zeros_like(weight, dtype=_sum_type(weight)) if ctx.needs_input_grad[1] else None
        valid = slice(0, shard.valid)
        for part in _chunks(hidden.shape[0], ctx.chunk):
            if shard.valid == 0:
                break
            scale = _of_rows(ctx.scale, part)
            log_softmax = _logits(hidden[part], weight, shard, scale).sub_(log_normaliser[part, None])
            softmax = torch.exp(log_softmax)
            index, held = _local_targets(targets[part], shard)
            # d log p_target / d logit = onehot - softmax;  d entropy / d logit = -softmax (log softmax + entropy).
            gradient = softmax * -log_prob_gradient[part, None]
            gradient.scatter_add_(1, index[:, None], torch.where(held, log_prob_gradient[part], 0.0)[:, None])
            if ctx.entropy_gradient:
                weighted = softmax * (log_softmax + entropy[part, None])
                gradient -= entropy_gradient[part, None] * weighted
                del weighted
            gradient = gradient.mul_(scale).to(hidden.dtype)
            del log_softmax, softmax
            hidden_gradient[part] = gradient @ weight[valid]
            if weight_gradient is not None:
                _add_product(weight_gradient[valid], gradient.T, hidden[part])
            del gradient
        if weight_gradient is not None:
            weight_gradient = weight_gradient.to(weight.dtype)
        return hidden_gradient, weight_gradient, None, None, None, None, None


def _reciprocal(temperature: float | torch.Tensor) -> float | torch.Tensor:
    """Rounded once, so that a row comes out the same whether or not the others have its temperature."""
    if isinstance(temperature, torch.Tensor):
        return temperature.reciprocal().float()
    return 1.0 / temperature


def _chunks(rows: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]


def _of_rows(scale: float | torch.Tensor, part: slice) -> float | torch.Tensor:
    """What the logits of a chunk are multiplied by, (r, 1) where rows differ."""
    return scale[part, None] if isinstance(scale, torch.Tensor) else scale


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, shard: VocabularyShard, scale: float | torch.Tensor
) -> torch.Tensor:
    """fp32 logits (r, valid) of this rank's real vocabulary rows; padding rows take no part in the softmax."""
    logits = _product(hidden, weight[: shard.valid].T).float()
    return logits if isinstance(scale, float) and scale == 1.0 else logits.mul_(scale)


def _sum_type(matrix: torch.Tensor) -> torch.dtype:
    """The type in which products of such matrices are added up: fp32 of those with fewer bits."""
    return torch.float32 if matrix.element_size() < 4 else matrix.dtype


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` as it was added up, not rounded to their type."""
    wide = _sum_type(left)
    if wide == left.dtype:
        return left @ right
    if _PRODUCTS_WIDEN and left.device.type != "cpu":
        return torch.mm(left, right, out_dtype=wide)
    return left.to(wide) @ right.to(wide)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left @ right` to `total`, which is of their type or wider.

    To a wider one by rows, no more elements at a time than `left` has, where these are many: what adds to fp32 as it
    multiplies bf16 is not in every version of torch.
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    step = max(_LEAST_ROWS, left.numel() // right.shape[1])
    for start in range(0, len(total), step):
        rows = slice(start, start + step)
        total[rows].add_(_product(left[rows], right))


def _local_targets(targets: torch.Tensor, shard: VocabularyShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each target in this shard (0 where another rank holds it), and whether it is held here."""
    local = targets - shard.start
    held = (local >= 0) & (local < shard.valid)
    return torch.where(held, local, 0), held
