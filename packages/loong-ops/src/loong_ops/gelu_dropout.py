"""GELU (tanh form) and dropout of it in one pass each way, as `linear_gelu` ends where it is trained with dropout.

Kept for backward are the numbers before the activation and a seed: the mask is drawn again (`loong_ops.dropout`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from loong_ops.dropout import CONFIG, dropped, place, seed_of
from loong_ops.geglu import _share, _slope


def gelu_dropout(x: Tensor, rate: float, *, _config: dict[str, int] | None = None) -> Tensor:
    """Dropout (0 < rate < 1) of GELU of x [...], in x's dtype: computed in float32 and rounded once."""
    result: Tensor = _GeluDropout.apply(x, rate, _config or CONFIG)
    return result


class _GeluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float, config: dict[str, int]) -> Tensor:
        x, seed = x.contiguous(), seed_of(x)
        result = torch.empty_like(x)
        if count := x.numel():
            _forward_kernel[(triton.cdiv(count, config["BLOCK"]),)](
                x, result, seed, count, rate, 1.0 / (1.0 - rate), **config
            )
        ctx.save_for_backward(x, seed)
        ctx.rate, ctx.config = rate, config
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, seed = ctx.saved_tensors
        rate, config = ctx.rate, ctx.config
        d_x = torch.empty_like(x)
        if count := x.numel():
            _backward_kernel[(triton.cdiv(count, config["BLOCK"]),)](
                x, gradients[0].contiguous(), d_x, seed, count, rate, 1.0 / (1.0 - rate), **config
            )
        return d_x, None, None


@triton.jit
def _forward_kernel(x, result, seed, count, rate, scale, BLOCK: tl.constexpr):
    offsets, inside = place(count, BLOCK)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    values = dropped(values * _share(values), seed, rate, scale, BLOCK)
    tl.store(result + offsets, values.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(x, upstream, d_x, seed, count, rate, scale, BLOCK: tl.constexpr):
    offsets, inside = place(count, BLOCK)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(upstream + offsets, mask=inside, other=0.0).to(tl.float32)
    values = dropped(up * _slope(values, _share(values)), seed, rate, scale, BLOCK)
    tl.store(d_x + offsets, values.to(d_x.dtype.element_ty), mask=inside)
