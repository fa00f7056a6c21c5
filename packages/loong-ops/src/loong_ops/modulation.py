"""The ops `ada_rms_norm`, `residual_ada_rms_norm` and `layer_norm_modulate`: a norm whose scale and shift belong to the
sample, one pass over the rows each way.

A row lies in one program's registers. Backward's programs take several blocks of rows of one sample and keep the
gradients of its scale and shift with them; their sums over programs need no atomics. With one sample of many rows this
is the norm of a transformer whose weights are stored less one (Gemma). Shape legend: b samples, s rows of each, n
numbers of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from loong_ops.norm_rows import block_of

PROGRAMS = 132 * 6
"""Programs of backward, roughly: several on each multiprocessor of a Hopper GPU. One less where x is handed through,
which takes more registers."""


class Config(NamedTuple):
    """Rows of a block, warps, and the most programs of backward over all samples."""

    rows: int
    warps: int
    programs: int


def ada_rms_norm(
    x: Tensor, scale: Tensor, shift: Tensor | None, epsilon: float, *, _config: Config | None = None
) -> Tensor:
    """`x / sqrt(mean(x^2) + epsilon) * (1 + scale) + shift` over the last dim: x [b,s,n], scale and shift [b,n] (shift
    None: 0) -> [b,s,n] in x's dtype, computed in float32 and rounded once.

    Kept for backward: x, scale, and a number a row. Raises `Unsupported` for more than 16384 numbers a row.
    """
    result: Tensor = _Norm.apply(x, scale, shift, epsilon, False, False, _config or _cut("ada_rms_norm", x.shape[-1]))
    return result


def residual_ada_rms_norm(
    x: Tensor, scale: Tensor, shift: Tensor | None, epsilon: float, *, _config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """As `ada_rms_norm`, and x for the branch to be added to: the gradients of both meet in backward's one pass, and
    are rounded once. As `loong_ops.rms_norm.residual_rms_norm`, also in what the second result is."""
    config = _config or _cut("residual_ada_rms_norm", x.shape[-1], 132 * 5)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return ada_rms_norm(x, scale, shift, epsilon, _config=config), x
    results: tuple[Tensor, Tensor] = _Norm.apply(x, scale, shift, epsilon, False, True, config)
    return results


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor | None, epsilon: float, *, _config: Config | None = None
) -> Tensor:
    """As `ada_rms_norm` of x less its mean over the last dim. Kept for backward: x, scale, two numbers a row."""
    result: Tensor = _Norm.apply(
        x, scale, shift, epsilon, True, False, _config or _cut("layer_norm_modulate", x.shape[-1])
    )
    return result


class _Norm(torch.autograd.Function):
    """`centred`: of x less its mean. `through`: x is a second result."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        epsilon: float,
        centred: bool,
        through: bool,
        config: Config,
    ) -> Any:
        ctx.set_materialize_grads(False)  # a result that nobody used has no gradient, not one of zeros
        given = x
        x, scale, shift = x.contiguous(), _even(scale), None if shift is None else _even(shift)
        b, s, n = x.shape
        result = torch.empty_like(x)
        inverse = x.new_empty(b, s, dtype=torch.float32)
        mean = x.new_empty(b, s, dtype=torch.float32) if centred else None
        if x.numel():
            _forward_kernel[(triton.cdiv(s, config.rows), b)](
                x,
                scale,
                shift,
                result,
                inverse,
                mean,
                s,
                scale.stride(0),
                0 if shift is None else shift.stride(0),
                epsilon,
                n,
                triton.next_power_of_2(n),
                config.rows,
                num_warps=config.warps,
            )
        ctx.save_for_backward(x, scale, inverse, mean)
        ctx.shift_dtype = None if shift is None else shift.dtype
        ctx.config = config
        return (result, given.view_as(given)) if through else result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_result: Tensor | None, d_residual: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if d_result is None:
            return d_residual, None, None, None, None, None, None
        x, scale, inverse, mean = ctx.saved_tensors
        config, upstream = ctx.config, d_result.contiguous()
        residual = None if d_residual is None else d_residual.contiguous()
        b, s, n = x.shape
        wants_scale, wants_shift = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        d_x = torch.empty_like(x)
        # Samples share the programs; each has at least one, and no more than it has blocks.
        programs = max(1, min(triton.cdiv(s, config.rows), config.programs // max(1, b)))
        d_scale, d_shift = (
            inverse.new_empty(b, programs, n) if wanted else None for wanted in (wants_scale, wants_shift)
        )
        if x.numel():
            _backward_kernel[(programs, b)](
                x,
                scale,
                inverse,
                mean,
                upstream,
                residual,
                d_x,
                d_scale,
                d_shift,
                s,
                scale.stride(0),
                n,
                triton.next_power_of_2(n),
                config.rows,
                num_warps=config.warps,
            )
        else:
            for part in (d_scale, d_shift):
                if part is not None:
                    part.zero_()
        return (
            d_x if ctx.needs_input_grad[0] else None,
            None if d_scale is None else d_scale.sum(1).to(scale.dtype),
            None if d_shift is None else d_shift.sum(1).to(ctx.shift_dtype),
            None,
            None,
            None,
            None,
        )


def _cut(op: str, n: int, programs: int = PROGRAMS) -> Config:
    return Config(*block_of(op, n), programs)


def _even(tensor: Tensor) -> Tensor:
    """[b,n] whose rows are whole: parts of one modulation are taken as they lie."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


@triton.jit
def _forward_kernel(
    x, scale, shift, result, inverses, means, count, scale_stride, shift_stride, epsilon,
    n: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One block of rows of one sample a program."""
    sample = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    columns = tl.arange(0, padded)[None, :]
    inside = (index[:, None] < count) & (columns < n)
    place = (sample * count + index)[:, None] * n + columns
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if means is not None:
        mean = tl.sum(values, axis=1) / n
        tl.store(means + sample * count + index, mean, mask=index < count)
        values = tl.where(inside, values - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(values * values, axis=1) / n + epsilon)
    tl.store(inverses + sample * count + index, inverse, mask=index < count)
    factor = 1.0 + tl.load(scale + sample * scale_stride + columns, mask=columns < n, other=0.0).to(tl.float32)
    values = values * inverse[:, None] * factor
    if shift is not None:
        values += tl.load(shift + sample * shift_stride + columns, mask=columns < n, other=0.0).to(tl.float32)
    tl.store(result + place, values.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    x, scale, inverses, means, upstream, residual, d_x, d_scale, d_shift, count, scale_stride,
    n: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Every m-th block of rows of one sample; its share of the gradients of scale and shift is one row of [b,m,n].

    `residual` is the gradient that came past the norm.
    """
    program, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, padded)[None, :]
    factor = 1.0 + tl.load(scale + sample * scale_stride + columns, mask=columns < n, other=0.0).to(tl.float32)
    scales = tl.zeros([block, padded], tl.float32)
    shifts = tl.zeros([block, padded], tl.float32)
    for first in tl.range(program * block, count, tl.num_programs(0) * block):
        index = tl.cast(first, tl.int64) + tl.arange(0, block)
        inside = (index[:, None] < count) & (columns < n)
        place = (sample * count + index)[:, None] * n + columns
        inverse = tl.load(inverses + sample * count + index, mask=index < count, other=0.0)[:, None]
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(upstream + place, mask=inside, other=0.0).to(tl.float32)
        if residual is not None:
            past = tl.load(residual + place, mask=inside, other=0.0)
        if means is not None:
            values -= tl.load(means + sample * count + index, mask=index < count, other=0.0)[:, None]
            values = tl.where(inside, values, 0.0)
        normal = values * inverse
        if d_scale is not None:
            scales += up * normal
        if d_shift is not None:
            shifts += up
        up *= factor
        found = up - normal * (tl.sum(up * normal, axis=1)[:, None] / n)
        if means is not None:
            found -= tl.sum(up, axis=1)[:, None] / n
        found *= inverse
        if residual is not None:
            found += past.to(tl.float32)
        tl.store(d_x + place, found.to(d_x.dtype.element_ty), mask=inside)
    target = (sample * tl.num_programs(0) + program) * n + tl.arange(0, padded)
    if d_scale is not None:
        tl.store(d_scale + target, tl.sum(scales, axis=0), mask=tl.arange(0, padded) < n)
    if d_shift is not None:
        tl.store(d_shift + target, tl.sum(shifts, axis=0), mask=tl.arange(0, padded) < n)
