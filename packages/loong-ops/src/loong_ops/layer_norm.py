"""The ops `layer_norm` and `residual_layer_norm`: one pass over the rows each way.

As in `loong_ops.rms_norm`: a row lies in one program's registers, backward's programs take many rows each and keep
their shares of the gradients of weight and bias. Shape legend: rows are all leading dims as one, n numbers of a row.
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


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, *, _config: Config | None = None
) -> Tensor:
    """`(x - mean) / sqrt(variance + epsilon) * weight + bias` over the last dim: x [..., n], weight and bias [n] (None:
    1 and 0) -> [..., n] in x's dtype, computed in float32 and rounded once.

    Kept for backward: x, weight, two numbers a row; nothing where no gradient is wanted.

    Raises `Unsupported` for more than 16384 numbers a row.
    """
    config = _config or cut("layer_norm", x.shape[-1], 16)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))):
        return _forward(x, weight, bias, epsilon, config, None)
    result: Tensor = _LayerNorm.apply(x, weight, bias, epsilon, False, config)
    return result


def residual_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, *, _config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """As `layer_norm`, and x for the branch to be added to: [..., n] -> ([..., n], [..., n] the memory of x).

    The gradients of both meet in backward's one pass: summed in float32, rounded once. The second result is x itself
    where no gradient goes to x, a view of it otherwise, into which autograd lets nobody write while gradients are on.

    Raises `Unsupported` for more than 16384 numbers a row.
    """
    config = _config or cut("residual_layer_norm", x.shape[-1], 16)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return layer_norm(x, weight, bias, epsilon, _config=config), x
    results: tuple[Tensor, Tensor] = _LayerNorm.apply(x, weight, bias, epsilon, True, config)
    return results


class _LayerNorm(torch.autograd.Function):
    """`through`: x is a second result."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, through: bool, config: Config
    ) -> Any:
        ctx.set_materialize_grads(False)  # a result that nobody used has no gradient, not one of zeros
        statistics = x.new_empty(2, x.numel() // x.shape[-1], dtype=torch.float32)
        result = _forward(x, weight, bias, epsilon, config, statistics)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.config = config
        return (result, x.view_as(x)) if through else result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_result: Tensor | None, d_residual: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if d_result is None:
            return d_residual, None, None, None, None, None
        x, weight, bias, statistics = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        d_x, shares = _backward(x, weight, statistics, d_result, d_residual, wanted[1:], ctx.config)
        sums = iter(shares.sum(1))
        d_weight, d_bias = (
            delivered(parameter, next(sums)) if wants else None
            for parameter, wants in zip((weight, bias), wanted[1:], strict=True)
        )
        return d_x if wanted[0] else None, d_weight, d_bias, None, None, None


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, config: Config, statistics: Tensor | None
) -> Tensor:
    """The normed rows [..., n]; to `statistics` float32 [2,rows] go the mean, and one over the standard deviation."""
    rows = as_rows(x)
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    count, n = rows.shape
    if count:
        _forward_kernel[(triton.cdiv(count, config.forward_rows),)](
            rows,
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            result,
            statistics,
            count,
            rows.stride(0),
            epsilon,
            n,
            triton.next_power_of_2(n),
            config.forward_rows,
            num_warps=config.forward_warps,
        )
    return result


def _backward(
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    d_result: Tensor,
    d_residual: Tensor | None,
    wanted: tuple[bool, bool],
    config: Config,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and float32 [0 to 2, programs, n]: shares of the gradients that are `wanted`, first of weight,
    then of bias."""
    rows, upstream = as_rows(x), as_rows(d_result)
    residual = None if d_residual is None else as_rows(d_residual)
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    count, n = rows.shape
    programs = min(triton.cdiv(count, config.rows), config.programs)
    shares = statistics.new_empty(sum(wanted), programs, n)
    if programs:
        _backward_kernel[(programs,)](
            rows,
            None if weight is None else weight.contiguous(),
            statistics,
            upstream,
            residual,
            d_x,
            shares[0] if wanted[0] else None,
            shares[-1] if wanted[1] else None,
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
    return d_x, shares


@triton.jit
def _forward_kernel(
    x, weight, bias, result, statistics, count, x_stride, epsilon,
    n: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One block of rows a program. The mean is subtracted before anything is squared: nothing cancels."""
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    rows = index[:, None]
    columns = tl.arange(0, padded)[None, :]
    inside = (rows < count) & (columns < n)
    values = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=1) / n
    values = tl.where(inside, values - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(values * values, axis=1) / n + epsilon)
    if statistics is not None:
        tl.store(statistics + index, mean, mask=index < count)
        tl.store(statistics + count + index, inverse, mask=index < count)
    values *= inverse[:, None]
    if weight is not None:
        values *= tl.load(weight + columns, mask=columns < n, other=0.0).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)
    tl.store(result + rows * n + columns, values.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    x, weight, statistics, upstream, residual, d_x, d_weight, d_bias,
    count, x_stride, upstream_stride, residual_stride,
    n: tl.constexpr, padded: tl.constexpr, block: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Every m-th block of rows; what they add to the gradients of weight and bias is one row of each [programs,n].

    `residual` is the gradient that came past the norm.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, padded)[None, :]
    if weight is not None:
        factor = tl.load(weight + columns, mask=columns < n, other=0.0).to(tl.float32)
    weights = tl.zeros([block, padded], tl.float32)
    biases = tl.zeros([block, padded], tl.float32)
    for first in tl.range(program * block, count, tl.num_programs(0) * block, num_stages=stages):
        index = tl.cast(first, tl.int64) + tl.arange(0, block)
        mean = tl.load(statistics + index, mask=index < count, other=0.0)[:, None]
        inverse = tl.load(statistics + count + index, mask=index < count, other=0.0)[:, None]
        rows = index[:, None]
        inside = (rows < count) & (columns < n)
        values = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(upstream + rows * upstream_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if residual is not None:
            past = tl.load(residual + rows * residual_stride + columns, mask=inside, other=0.0)
        # Numbers beyond the row count nowhere: what they meet in sums and products is `up`, 0 there.
        normal = (values - mean) * inverse
        if d_weight is not None:
            weights += up * normal
        if d_bias is not None:
            biases += up
        if weight is not None:
            up *= factor
        along = tl.sum(up * normal, axis=1)[:, None] / n
        result = inverse * (up - normal * along - tl.sum(up, axis=1)[:, None] / n)
        if residual is not None:
            result += past.to(tl.float32)
        tl.store(d_x + rows * n + columns, result.to(d_x.dtype.element_ty), mask=inside)
    place = tl.arange(0, padded)
    if d_weight is not None:
        tl.store(d_weight + program * n + place, tl.sum(weights, axis=0), mask=place < n)
    if d_bias is not None:
        tl.store(d_bias + program * n + place, tl.sum(biases, axis=0), mask=place < n)
