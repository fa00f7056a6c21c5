"""The attention op by FlashAttention-4 (CuTe DSL): it reads and writes the layers' own layout, so nothing is copied.

The padding behind packed samples is neither computed nor masked: it is set to zero where it lies.

Shape legend: s rows, b batch, h query heads, g key-value heads, d and e head sizes, t tokens of a packed row.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loong_core.errors import Unsupported
from loong_core.parallel.segments import Packing, packing
from loong_ops import flash_kernels


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
    """As the reference, without `rows`: query [s,b,h,d], key [s,b,g,d], value [s,b,g,e] -> [s,b,h*e]. Tokens of a
    segment must follow one another, as packing lays them out.

    With torch's deterministic algorithms on, gradients are the same bits in every call; otherwise partial sums of dQ
    (and, with grouped heads, of dK and dV) are added in the order in which they are done.

    Raises `Unsupported` for dropout, which `loong_ops.support.flash4` refuses in a recipe.
    """
    assert rows is None, "support.flash4 refuses context parallelism"
    if dropout:
        raise Unsupported(
            "ops.attention = flash4: FlashAttention-4 has no dropout. Set model.dropout to 0, or choose another "
            "implementation of attention."
        )
    if segments is None:
        return _run(query, key, value, scale, None).flatten(2)
    s, b = query.shape[:2]
    found = packing(segments[0])
    # One row is a view. Several have to be laid end to end: kernels want a sequence's tokens one after the other.
    query, key, value = (part.transpose(0, 1).reshape(b * s, 1, *part.shape[2:]) for part in (query, key, value))
    out = _run(query, key, value, scale, found).reshape(b, s, -1).transpose(0, 1)
    return out.masked_fill(found.padding, 0.0) if found.inner and found.padding is not None else out


def _run(query: Tensor, key: Tensor, value: Tensor, scale: float, packed: Packing | None) -> Tensor:
    return flash_kernels.at_kernel_width(partial(_apply, scale, packed), query, key, value)


def _apply(scale: float, packed: Packing | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    result: Tensor = _FlashAttention.apply(query, key, value, scale, packed)
    return result


class _FlashAttention(torch.autograd.Function):
    """Causal attention of [s,b,h,d] with [s,b,g,d] and [s,b,g,e] -> [s,b,h,e]; packed: b = 1 and s = t."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, packed: Packing | None) -> Tensor:
        out = query.new_empty(*query.shape[:3], value.shape[3])
        ctx.scale, ctx.packed = scale, packed
        ctx.deterministic = torch.are_deterministic_algorithms_enabled()
        views = _views(packed, query, key, value, out)
        normaliser = None
        if views[0].numel():
            normaliser = flash_kernels.forward(*views, scale=scale, causal=True, **_lengths(packed))
        _clear_tail(packed, out)
        ctx.save_for_backward(query, key, value, out, normaliser)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, normaliser = ctx.saved_tensors
        gradients = [part.new_empty(part.shape) for part in (query, key, value)]
        views = _views(ctx.packed, query, key, value, out, upstream)
        if normaliser is not None:
            flash_kernels.backward(
                views,
                normaliser,
                _views(ctx.packed, *gradients),
                scale=ctx.scale,
                causal=True,
                deterministic=ctx.deterministic,
                **_lengths(ctx.packed),
            )
        _clear_tail(ctx.packed, *gradients)
        wanted = (part if need else None for part, need in zip(gradients, ctx.needs_input_grad, strict=False))
        return *wanted, None, None


def _views(packed: Packing | None, *parts: Tensor) -> list[Tensor]:
    """[s,b,...] as the kernels index it: [b,s,...], or the tokens of a packed row, [t,...], without its tail."""
    if packed is None:
        return [part.transpose(0, 1) for part in parts]
    return [part[: packed.tokens, 0] for part in parts]


def _lengths(packed: Packing | None) -> dict[str, Any]:
    if packed is None:
        return {}
    offsets, longest = packed.without_tail, packed.longest
    return {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}


def _clear_tail(packed: Packing | None, *parts: Tensor) -> None:
    if packed is not None:
        for part in parts:
            part[packed.tokens :].zero_()
