"""The reference of the op `cross_entropy`. Shape legend: v vocabulary, n ranks that share it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loong_core.errors import DataError

IGNORED = -100
CHUNK_ELEMENTS = 1 << 24
"""Logits that `cross_entropy` holds in float32 at a time."""


def cross_entropy(logits: Tensor, targets: Tensor, *, vocabulary: int, group: Any = None) -> Tensor:
    """`logsumexp(logits) - logits[target]`: logits [..., v/n], targets [...] -> [...] in float32.

    Rank r of the n ranks of `group` (None: one) holds columns r * v/n onwards. Columns from `vocabulary` on are padding
    and take no part. A target of -100 gives loss 0 and no gradient. The gradient is the exact softmax minus one-hot;
    nothing but the logits themselves is kept for it. Source of the sharding: Shoeybi et al., 2019, section 3.

    Raises `DataError` on a CPU (elsewhere the device reports it) for other targets outside the vocabulary.
    """
    loss: Tensor = _CrossEntropy.apply(logits, targets, vocabulary, group)
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Cut into chunks of rows, so that no float32 copy of all logits exists."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocabulary: int, group: Any) -> Tensor:
        size = 1 if group is None else group.size()
        width = logits.shape[-1]
        first = 0 if group is None else group.rank() * width
        _check_targets(targets, vocabulary)
        flat, wanted = logits.reshape(-1, width), targets.reshape(-1)
        held = min(max(vocabulary - first, 0), width)
        peak, total, picked = _statistics(flat, wanted - first, held)
        if size > 1:
            local_peak = peak.clone()
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack([total * torch.exp(local_peak - peak), picked])
            dist.all_reduce(sums, group=group)
            total, picked = sums[0], sums[1]
        normaliser = peak + torch.log(total)
        ctx.save_for_backward(logits, targets, normaliser)
        ctx.first, ctx.held = first, held
        return torch.where(wanted == IGNORED, 0.0, normaliser - picked).reshape(targets.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, normaliser = ctx.saved_tensors
        flat, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        upstream = torch.where(wanted == IGNORED, 0.0, gradients[0].reshape(-1))
        result = torch.zeros_like(flat, memory_format=torch.contiguous_format)
        column = wanted - ctx.first
        mine = (column >= 0) & (column < ctx.held)
        one_hot = mine.float().neg_()[:, None]
        safe = torch.where(mine, column, 0)[:, None]
        for part in _chunks(flat) if ctx.held else ():
            scaled = torch.exp(flat[part, : ctx.held].float() - normaliser[part, None])
            scaled.scatter_add_(-1, safe[part], one_hot[part])
            result[part, : ctx.held] = scaled.mul_(upstream[part, None])
        return result.reshape(logits.shape), None, None, None


def _statistics(flat: Tensor, column: Tensor, held: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per row, over the first `held` columns: largest logit, sum of exponentials below it, logit of the target here."""
    count = flat.shape[0]
    peak = flat.new_full((count,), float("-inf"), dtype=torch.float32)
    total = flat.new_zeros((count,), dtype=torch.float32)
    picked = flat.new_zeros((count,), dtype=torch.float32)
    if held == 0:
        return peak, total, picked
    mine = (column >= 0) & (column < held)
    safe = torch.where(mine, column, 0)
    for part in _chunks(flat):
        wide = flat[part, :held].float()
        peak[part] = wide.amax(-1)
        total[part] = torch.exp(wide - peak[part, None]).sum(-1)
        picked[part] = torch.where(mine[part], wide.gather(-1, safe[part, None]).squeeze(-1), 0.0)
    return peak, total, picked


def _chunks(flat: Tensor) -> list[slice]:
    count, width = flat.shape
    step = max(CHUNK_ELEMENTS // max(width, 1), 1)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != IGNORED)
    if targets.device.type == "cpu":
        if wrong.any():
            raise DataError(
                f"target {int(targets[wrong][0])} lies outside the vocabulary of {vocabulary} tokens "
                f"(allowed: 0 to {vocabulary - 1}, and {IGNORED} for positions that do not count). "
                "The data was tokenised with another tokenizer than the model's."
            )
    elif targets.device.type == "cuda":
        torch._assert_async(~wrong.any(), f"a target lies outside the vocabulary of {vocabulary} tokens")
