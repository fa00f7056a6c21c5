"""The op `ragged_attention` by FlashAttention-4 (CuTe DSL), forward and backward: the device is never asked for a
length, so it may be captured in a CUDA graph once its kernels are compiled, which the first call does.

Shape legend: q query rows, k key rows, s sequences, h query heads, g key-value heads, d head size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loong_ops import flash_kernels


def ragged_attention(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor, longest: tuple[int, int]
) -> Tensor:
    """As the reference: query [q,h,d], key and value [k,g,d], offsets int32 [s+1] -> [q,h*d].

    With torch's deterministic algorithms on, gradients are the same bits in every call; otherwise partial sums of dQ
    (and, with grouped heads, of dK and dV) are added in the order in which they are done.
    """
    run = partial(_run, query_offsets, key_offsets, longest, query.shape[2] ** -0.5)
    return flash_kernels.at_kernel_width(run, query, key, value).flatten(1)


def _run(
    query_offsets: Tensor,
    key_offsets: Tensor,
    longest: tuple[int, int],
    scale: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    result: Tensor = _Ragged.apply(query, key, value, query_offsets, key_offsets, longest, scale)
    return result


class _Ragged(torch.autograd.Function):
    """query [q,h,d], key and value [k,g,d] -> [q,h,d]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_offsets: Tensor,
        key_offsets: Tensor,
        longest: tuple[int, int],
        scale: float,
    ) -> Tensor:
        out = query.new_empty(query.shape)
        ctx.scale, ctx.longest = scale, longest
        ctx.deterministic = torch.are_deterministic_algorithms_enabled()
        normaliser = None
        if query.numel():
            lengths = _lengths(query_offsets, key_offsets, longest)
            normaliser = flash_kernels.forward(query, key, value, out, scale=scale, causal=False, **lengths)
        ctx.save_for_backward(query, key, value, out, normaliser, query_offsets, key_offsets)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, normaliser, query_offsets, key_offsets = ctx.saved_tensors
        gradients = [part.new_empty(part.shape) for part in (query, key, value)]
        if normaliser is None:  # no queries: nothing depends on keys
            for gradient in gradients:
                gradient.zero_()
        else:
            flash_kernels.backward(
                (query, key, value, out, upstream),
                normaliser,
                gradients,
                scale=ctx.scale,
                causal=False,
                deterministic=ctx.deterministic,
                **_lengths(query_offsets, key_offsets, ctx.longest),
            )
        wanted = (part if need else None for part, need in zip(gradients, ctx.needs_input_grad, strict=False))
        return *wanted, None, None, None, None


def _lengths(query_offsets: Tensor, key_offsets: Tensor, longest: tuple[int, int]) -> dict[str, Any]:
    return {
        "cu_seqlens_q": query_offsets,
        "cu_seqlens_k": key_offsets,
        "max_seqlen_q": longest[0],
        "max_seqlen_k": longest[1],
    }
