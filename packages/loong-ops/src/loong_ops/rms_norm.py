"""The op `rms_norm`: one pass over the rows each way.

A row lies in one program's registers. Backward's programs take many rows each and keep the weight's gradient with
them, so that it is summed without atomics. Shape legend: rows are all leading dims as one, n numbers of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loong_core.errors import Unsupported
from loong_ops.weight_gradient import delivered

WIDEST = 16384
"""Numbers of a row that one program holds."""


class Config(NamedTuple):
    """Rows of a block and warps, forward and backward; the most programs of backward, and the blocks it loads ahead."""

    forward_rows: int
    forward_warps: int
    rows: int
    warps: int
    programs: int
    stages: int


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, _config: Config | None = None) -> Tensor:
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last dim: [..., n], [n] -> [..., n] in x's dtype.

    As `loong_core.references.norm.rms_norm`, roundings included. Kept for backward: x, weight, a number a row.

    Raises `Unsupported` for more than 16384 numbers a row.
    """
    result: Tensor = _RMSNorm.apply(x, weight, epsilon, _config or _cut(x.shape[-1]))
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, config: Config) -> Tensor:
        result, scale = _forward(x, weight, epsilon, config)
        ctx.save_for_backward(x, weight, scale)
        ctx.config = config
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        d_x, d_weight = _backward(x, weight, scale, gradients[0], ctx.needs_input_grad[1], ctx.config)
        return d_x if ctx.needs_input_grad[0] else None, d_weight, None, None


def _forward(x: Tensor, weight: Tensor, epsilon: float, config: Config) -> tuple[Tensor, Tensor]:
    """The normed rows [..., n], and of each one over its root mean square, float32 [rows]."""
    rows = _rows(x)
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    count, n = rows.shape
    scale = x.new_empty(count, dtype=torch.float32)
    if count:
        _forward_kernel[(triton.cdiv(count, config.forward_rows),)](
            rows,
            weight.contiguous(),
            result,
            scale,
            count,
            rows.stride(0),
            epsilon,
            n,
            triton.next_power_of_2(n),
            config.forward_rows,
            num_warps=config.forward_warps,
        )
    return result, scale


def _backward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    d_result: Tensor,
    wants_weight: bool,
    config: Config,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of x, and what backward returns for the weight."""
    rows, upstream = _rows(x), _rows(d_result)
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    count, n = rows.shape
    programs = min(triton.cdiv(count, config.rows), config.programs)
    partial = scale.new_empty(programs, n) if wants_weight else None
    if programs:
        _backward_kernel[(programs,)](
            rows,
            weight.contiguous(),
            scale,
            upstream,
            d_x,
            partial,
            count,
            rows.stride(0),
            upstream.stride(0),
            n,
            triton.next_power_of_2(n),
            config.rows,
            config.stages,
            num_warps=config.warps,
        )
    return d_x, None if partial is None else delivered(weight, partial.sum(0))


def _cut(n: int) -> Config:
    """16 numbers a thread, as long as there are 4 to 16 warps to take them.

    Backward takes 80 registers a thread then, so 24 warps share a multiprocessor: one wave of programs.
    """
    if n > WIDEST:
        raise Unsupported(
            f"rms_norm: rows of {n} numbers are too wide for one program. Allowed: up to {WIDEST} "
            "(op rms_norm, implementation triton). Choose another implementation in the recipe's `ops`."
        )
    width = triton.next_power_of_2(n)
    warps = max(4, min(16, width // 512))
    rows = max(1, 2048 // width)
    return Config(rows, warps, rows, warps, 132 * max(1, 24 // warps), 1)


def _rows(tensor: Tensor) -> Tensor:
    """`tensor` as [rows, last dim], without a copy where rows are evenly apart and whole."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit
def _forward_kernel(
    x, weight, result, scale, count, x_stride, epsilon,
    n: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One block of rows a program."""
    rows = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)[:, None]
    columns = tl.arange(0, padded)[None, :]
    inside = (rows < count) & (columns < n)
    values = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=1)[:, None] / n + epsilon)
    tl.store(scale + rows, inverse, mask=rows < count)
    weights = tl.load(weight + columns, mask=columns < n, other=0.0).to(tl.float32)
    normal = (values * inverse).to(result.dtype.element_ty).to(tl.float32)
    tl.store(result + rows * n + columns, (normal * weights).to(result.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    x, weight, scale, upstream, d_x, partial, count, x_stride, upstream_stride,
    n: tl.constexpr, padded: tl.constexpr, block: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Every m-th block of rows; what they add to the weight's gradient is one row of `partial` [programs,n]."""
    program = tl.program_id(0)
    columns = tl.arange(0, padded)[None, :]
    weights = tl.load(weight + columns, mask=columns < n, other=0.0).to(tl.float32)
    sums = tl.zeros([block, padded], tl.float32)
    for first in tl.range(program * block, count, tl.num_programs(0) * block, num_stages=stages):
        index = tl.cast(first, tl.int64) + tl.arange(0, block)
        inverse = tl.load(scale + index, mask=index < count, other=0.0)[:, None]
        rows = index[:, None]
        inside = (rows < count) & (columns < n)
        values = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(upstream + rows * upstream_stride + columns, mask=inside, other=0.0).to(tl.float32)
        normal = values * inverse
        if partial is not None:
            sums += up * normal
        up *= weights
        mean = tl.sum(up * normal, axis=1)[:, None] / n
        result = inverse * (up - normal * mean)
        tl.store(d_x + rows * n + columns, result.to(d_x.dtype.element_ty), mask=inside)
    if partial is not None:
        place = tl.arange(0, padded)
        tl.store(partial + program * n + place, tl.sum(sums, axis=0), mask=place < n)
