"""The ops `rms_norm` and `residual_rms_norm`: one pass over the rows each way.

A row lies in one program's registers. Backward's programs take many rows each and keep the weight's gradient with
them, so that it is summed without atomics; what came to x past the norm they add before they round. Shape legend: rows
are all leading dims as one, n numbers of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from loong_ops.norm_rows import Config, as_rows, cut
from loong_ops.weight_gradient import delivered


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, _config: Config | None = None) -> Tensor:
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last dim: [..., n], [n] -> [..., n] in x's dtype.

    As `loong_core.references.norm.rms_norm`, roundings included. Kept for backward: x, weight, a number a row.

    Raises `Unsupported` for more than 16384 numbers a row.
    """
    result: Tensor = _RMSNorm.apply(x, weight, epsilon, False, _config or cut("rms_norm", x.shape[-1], 24))
    return result


def residual_rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, *, _config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """As `rms_norm`, and x for the branch to be added to: [..., n], [n] -> ([..., n], [..., n] the memory of x).

    The gradients of both meet in backward's one pass: summed in float32, rounded once. The second result is x itself
    where no gradient goes to x, a view of it otherwise, into which autograd lets nobody write while gradients are on.

    Raises `Unsupported` for more than 16384 numbers a row.
    """
    config = _config or cut("residual_rms_norm", x.shape[-1], 20)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return rms_norm(x, weight, epsilon, _config=config), x
    results: tuple[Tensor, Tensor] = _RMSNorm.apply(x, weight, epsilon, True, config)
    return results


class _RMSNorm(torch.autograd.Function):
    """`through`: x is a second result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, through: bool, config: Config) -> Any:
        ctx.set_materialize_grads(False)  # a result that nobody used has no gradient, not one of zeros
        result, scale = _forward(x, weight, epsilon, config)
        ctx.save_for_backward(x, weight, scale)
        ctx.config = config
        return (result, x.view_as(x)) if through else result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_result: Tensor | None, d_residual: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if d_result is None:
            return d_residual, None, None, None, None
        x, weight, scale = ctx.saved_tensors
        d_x, d_weight = _backward(x, weight, scale, d_result, d_residual, ctx.needs_input_grad[1], ctx.config)
        return d_x if ctx.needs_input_grad[0] else None, d_weight, None, None, None


def _forward(x: Tensor, weight: Tensor, epsilon: float, config: Config) -> tuple[Tensor, Tensor]:
    """The normed rows [..., n], and of each one over its root mean square, float32 [rows]."""
    rows = as_rows(x)
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
    d_residual: Tensor | None,
    wants_weight: bool,
    config: Config,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of x, and what backward returns for the weight."""
    rows, upstream = as_rows(x), as_rows(d_result)
    residual = None if d_residual is None else as_rows(d_residual)
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
            residual,
            d_x,
            partial,
            count,
            rows.stride(0),
            upstream.stride(0),
            0 if residual is None else residual.stride(0),
            n,
            triton.next_power_of_2(n),
            config.rows,
            config.stages,
            num_warps=config.warps,
        )
    return d_x, None if partial is None else delivered(weight, partial.sum(0))


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
    x, weight, scale, upstream, residual, d_x, partial, count, x_stride, upstream_stride, residual_stride,
    n: tl.constexpr, padded: tl.constexpr, block: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Every m-th block of rows; what they add to the weight's gradient is one row of `partial` [programs,n].

    `residual` is the gradient that came past the norm.
    """
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
        if residual is not None:
            past = tl.load(residual + rows * residual_stride + columns, mask=inside, other=0.0)
        normal = values * inverse
        if partial is not None:
            sums += up * normal
        up *= weights
        mean = tl.sum(up * normal, axis=1)[:, None] / n
        result = inverse * (up - normal * mean)
        if residual is not None:
            result += past.to(tl.float32)
        tl.store(d_x + rows * n + columns, result.to(d_x.dtype.element_ty), mask=inside)
    if partial is not None:
        place = tl.arange(0, padded)
        tl.store(partial + program * n + place, tl.sum(sums, axis=0), mask=place < n)
