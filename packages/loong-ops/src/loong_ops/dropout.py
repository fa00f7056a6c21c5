"""The op `dropout_add`: a branch's dropout and the residual it is added to, one pass each way.

No mask is kept: backward draws the same numbers again, from the seed of the call and the place of each element. The
seed is a tensor that torch's generator of the device fills, so that it follows `torch.manual_seed`, recomputation of
activations restores it, and each replay of a CUDA graph gets another one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

CONFIG: dict[str, int] = {"BLOCK": 512, "num_warps": 4}
"""Elements and warps of a program. Four elements a thread are what one call of the generator has numbers for: the
numbers are made in the threads that use them."""


def dropout_add(x: Tensor, residual: Tensor, rate: float, *, _config: dict[str, int] | None = None) -> Tensor:
    """As `loong_core.references.dropout.dropout_add`: x and residual [...] alike -> [...] in residual's dtype.

    Kept for backward: the seed. At rate 0 this is a plain addition, and nothing is drawn.
    """
    if not rate:
        return (residual + x).to(residual.dtype)
    result: Tensor = _DropoutAdd.apply(x, residual, rate, _config or CONFIG)
    return result


def seed_of(x: Tensor) -> Tensor:
    """A new seed [] on the device of x, drawn by torch's generator there."""
    return torch.empty((), dtype=torch.int64, device=x.device).random_()


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, rate: float, config: dict[str, int]) -> Tensor:
        seed = seed_of(x)
        result = torch.empty_like(residual, memory_format=torch.contiguous_format)
        if count := result.numel():
            _forward_kernel[(triton.cdiv(count, config["BLOCK"]),)](
                x.contiguous(), residual.contiguous(), result, seed, count, rate, 1.0 / (1.0 - rate), **config
            )
        ctx.save_for_backward(seed)
        ctx.rate, ctx.config, ctx.dtype = rate, config, x.dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        rate, config = ctx.rate, ctx.config
        d_x = None
        if ctx.needs_input_grad[0]:
            upstream = gradients[0].contiguous()
            d_x = torch.empty_like(upstream, dtype=ctx.dtype)
            if count := d_x.numel():
                _backward_kernel[(triton.cdiv(count, config["BLOCK"]),)](
                    upstream, d_x, seed, count, rate, 1.0 / (1.0 - rate), **config
                )
        return d_x, gradients[0], None, None


@triton.jit
def place(count, BLOCK: tl.constexpr):
    """Offsets [BLOCK] of this program as int64, and which of them exist."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return offsets, offsets < count


@triton.jit
def dropped(values, seed, rate, scale, BLOCK: tl.constexpr):
    """Dropout of this program's float32 values [BLOCK]: 0 or `scale` times the value.

    Philox draws for four elements at a time, whatever BLOCK is; seven of its rounds pass all tests of randomness
    (Salmon et al., 2011, table 2).
    """
    fours = tl.program_id(0).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    a, b, c, d = tl.rand4x(tl.load(seed), fours, 7)
    numbers = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK,))
    return tl.where(numbers >= rate, values * scale, 0.0)


@triton.jit
def _forward_kernel(x, residual, result, seed, count, rate, scale, BLOCK: tl.constexpr):
    offsets, inside = place(count, BLOCK)
    values = dropped(tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32), seed, rate, scale, BLOCK)
    values += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + offsets, values.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(upstream, d_x, seed, count, rate, scale, BLOCK: tl.constexpr):
    offsets, inside = place(count, BLOCK)
    values = dropped(tl.load(upstream + offsets, mask=inside, other=0.0).to(tl.float32), seed, rate, scale, BLOCK)
    tl.store(d_x + offsets, values.to(d_x.dtype.element_ty), mask=inside)
