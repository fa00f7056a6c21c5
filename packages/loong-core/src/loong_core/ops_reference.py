"""The references of all ops in plain torch: short enough to check by eye, good enough to train with on any device.

Shape legend: s query rows, t key rows, b batch, h query heads, g key-value heads, d and e head sizes, v vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor

from loong_core.errors import DataError

PADDING = -1
IGNORED = -100
CHUNK_ELEMENTS = 1 << 24
"""Logits that `cross_entropy` holds in float32 at a time."""


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last dim: [..., n], [n] -> [..., n] in x's dtype.

    Statistics are float32 (float64 stays); the normalised value is rounded to x's dtype before it is scaled, the order
    of casts in transformers' RMSNorm modules. Source: Zhang and Sennrich, 2019.
    """
    wide = x.double() if x.dtype == torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (weight * normal.to(x.dtype)).to(x.dtype)


# ------------------------------------------------------------------------------------------------- attention
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    dropout: float = 0.0,
    rows: tuple[Tensor, Tensor] | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal softmax attention: query [s,b,h,d], key [t,b,g,d], value [t,b,g,e] -> [s,b,h*e].

    Head i reads key-value head i // (h/g). `scale` multiplies the scores; `dropout` is the rate on probabilities.
    `rows` = (query rows [s], key rows [t]) are positions in the whole row under context parallelism: a query sees keys
    of rows up to its own. None: row i is position i of both. `segments` = ([b,s], [b,t]) are numbers of packed samples:
    a query sees its own sample only. -1 marks padding, whose output and gradients are exactly zero.
    """
    s, b, h, d = query.shape
    t, g = key.shape[0], key.shape[2]
    mask = _mask(s, t, rows, segments, query.device)
    # [s,b,h,d] -> [b*g, h/g, s, d]: the heads of a group share one expanded (not copied) key-value head.
    q = query.reshape(s, b, g, h // g, d).permute(1, 2, 3, 0, 4).flatten(0, 1)
    k, v = (part.permute(1, 2, 0, 3).flatten(0, 1).unsqueeze(1).expand(-1, h // g, -1, -1) for part in (key, value))
    if mask is not None and mask.shape[0] > 1:
        mask = mask.repeat_interleave(g, dim=0)
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale
    )
    out = out.unflatten(0, (b, g)).permute(3, 0, 1, 2, 4).reshape(s, b, -1)
    if segments is not None:
        out = out.masked_fill((segments[0] == PADDING).t().unsqueeze(-1), 0.0)
    return out


def _mask(
    s: int, t: int, rows: tuple[Tensor, Tensor] | None, segments: tuple[Tensor, Tensor] | None, device: torch.device
) -> Tensor | None:
    """Which scores count: bool [1 or b, 1, s, t]; None for plain causal. Padding sees padding, so no row is empty."""
    if rows is None and segments is None:
        return None
    q_rows, k_rows = (torch.arange(s), torch.arange(t)) if rows is None else rows
    mask = (k_rows.to(device)[None, :] <= q_rows.to(device)[:, None])[None]
    if segments is not None:
        mask = mask & (segments[0][:, :, None] == segments[1][:, None, :])
    return mask[:, None]


# --------------------------------------------------------------------------------------------- cross entropy
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
