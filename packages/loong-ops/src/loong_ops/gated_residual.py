"""The op `gated_residual`: a branch times its sample's gate, added to the residual, one pass each way.

Backward's programs take several blocks of rows of one sample and keep the gate's gradient with them. Shape legend: b
samples, s rows of each, n numbers of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loong_ops.modulation import Config, _cut, _even


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor, *, _config: Config | None = None) -> Tensor:
    """`residual + gate * x`: residual and x [b,s,n], gate [b,n] -> [b,s,n] in residual's dtype, rounded once.

    Kept for backward: x and gate. Raises `Unsupported` for more than 16384 numbers a row.
    """
    result: Tensor = _GatedResidual.apply(residual, x, gate, _config or _cut("gated_residual", x.shape[-1]))
    return result


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, gate: Tensor, config: Config) -> Tensor:
        residual, x, gate = residual.contiguous(), x.contiguous(), _even(gate)
        b, s, n = x.shape
        result = torch.empty_like(residual)
        if x.numel():
            _forward_kernel[(triton.cdiv(s, config.rows), b)](
                residual,
                x,
                gate,
                result,
                s,
                gate.stride(0),
                n,
                triton.next_power_of_2(n),
                config.rows,
                num_warps=config.warps,
            )
        ctx.save_for_backward(x, gate)
        ctx.config = config
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, gate = ctx.saved_tensors
        config, upstream = ctx.config, gradients[0].contiguous()
        wants_residual, wants_x, wants_gate, _ = ctx.needs_input_grad
        b, s, n = x.shape
        d_x = torch.empty_like(x)
        programs = max(1, min(triton.cdiv(s, config.rows), config.programs // max(1, b)))
        d_gate = x.new_empty(b, programs, n, dtype=torch.float32)
        if x.numel():
            _backward_kernel[(programs, b)](
                x,
                gate,
                upstream,
                d_x,
                d_gate,
                s,
                gate.stride(0),
                n,
                triton.next_power_of_2(n),
                config.rows,
                num_warps=config.warps,
            )
        else:
            d_gate.zero_()
        return (
            gradients[0] if wants_residual else None,
            d_x if wants_x else None,
            d_gate.sum(1).to(gate.dtype) if wants_gate else None,
            None,
        )


@triton.jit
def _forward_kernel(
    residual, x, gate, result, count, gate_stride, n: tl.constexpr, padded: tl.constexpr, block: tl.constexpr
):
    """One block of rows of one sample a program."""
    sample = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)[:, None]
    columns = tl.arange(0, padded)[None, :]
    inside = (index < count) & (columns < n)
    place = (sample * count + index) * n + columns
    share = tl.load(gate + sample * gate_stride + columns, mask=columns < n, other=0.0).to(tl.float32)
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * share
    values += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + place, values.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    x, gate, upstream, d_x, d_gate, count, gate_stride, n: tl.constexpr, padded: tl.constexpr, block: tl.constexpr
):
    """Every m-th block of rows of one sample; its share of the gate's gradient is one row of [b,m,n]."""
    program, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, padded)[None, :]
    share = tl.load(gate + sample * gate_stride + columns, mask=columns < n, other=0.0).to(tl.float32)
    sums = tl.zeros([block, padded], tl.float32)
    for first in tl.range(program * block, count, tl.num_programs(0) * block):
        index = tl.cast(first, tl.int64) + tl.arange(0, block)[:, None]
        inside = (index < count) & (columns < n)
        place = (sample * count + index) * n + columns
        up = tl.load(upstream + place, mask=inside, other=0.0).to(tl.float32)
        sums += up * tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + place, (up * share).to(d_x.dtype.element_ty), mask=inside)
    target = (sample * tl.num_programs(0) + program) * n + tl.arange(0, padded)
    tl.store(d_gate + target, tl.sum(sums, axis=0), mask=tl.arange(0, padded) < n)
