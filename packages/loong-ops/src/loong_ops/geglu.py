"""The op `geglu`: one pass each way over rows of gates beside values, cut as `swiglu` is.

Shape legend: rows are all leading dims as one, f results of a row, out of 2f numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loong_ops.swiglu import Config, _cut, _grid, _place, _rows


def geglu(x: Tensor, *, _config: Config | None = None) -> Tensor:
    """`gelu(gate) * value` of the halves of the last dim, in GELU's tanh form: [..., 2f] -> [..., f] in x's dtype.

    As `loong_core.references.activation.geglu`: computed in float32 and rounded once.
    """
    result: Tensor = _GeGLU.apply(x, _config or _cut(x.shape[-1] // 2))
    return result


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, config: Config) -> Tensor:
        rows = _rows(x)
        result = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        f = result.shape[-1]
        if result.numel():
            _forward_kernel[_grid(rows.shape[0], f, config)](
                rows, result, rows.shape[0], rows.stride(0), f, config.rows, config.columns, num_warps=config.warps
            )
        ctx.save_for_backward(x)
        ctx.config = config
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        config = ctx.config
        rows, upstream = _rows(x), _rows(gradients[0])
        d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        if x.numel():
            _backward_kernel[_grid(upstream.shape[0], upstream.shape[1], config)](
                rows,
                upstream,
                d_x,
                rows.shape[0],
                rows.stride(0),
                upstream.stride(0),
                upstream.shape[1],
                config.rows,
                config.columns,
                num_warps=config.warps,
            )
        return d_x, None


@triton.jit
def _share(gate):
    """GELU is gate * sigmoid(2 u), u = sqrt(2/pi) (gate + 0.044715 gate^3); below -80 its exponential overflows."""
    return tl.sigmoid(tl.maximum(1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate), -80.0))


@triton.jit
def _slope(gate, share):
    """The derivative of GELU, given `_share` of the gate."""
    return share * (1.0 + gate * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * gate * gate))


@triton.jit
def _forward_kernel(x, result, count, stride, f: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr):
    rows, columns, inside = _place(count, f, block_rows, block_columns)
    gate = tl.load(x + rows * stride + columns, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + rows * stride + f + columns, mask=inside, other=0.0).to(tl.float32)
    product = gate * _share(gate) * value
    tl.store(result + rows * f + columns, product.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    x, upstream, d_x, count, stride, up_stride,
    f: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
):  # fmt: skip
    rows, columns, inside = _place(count, f, block_rows, block_columns)
    gate = tl.load(x + rows * stride + columns, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + rows * stride + f + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(upstream + rows * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    share = _share(gate)
    d_gate = up * value * _slope(gate, share)
    d_value = up * gate * share
    tl.store(d_x + rows * (2 * f) + columns, d_gate.to(d_x.dtype.element_ty), mask=inside)
    tl.store(d_x + rows * (2 * f) + f + columns, d_value.to(d_x.dtype.element_ty), mask=inside)
