"""The op `swiglu`: one pass each way over rows of gates beside values, nothing kept but the input.

Shape legend: rows are all leading dims as one, f results of a row, out of 2f numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """Results of a program, as `rows` times `columns`, and its warps."""

    rows: int
    columns: int
    warps: int


def swiglu(x: Tensor, *, _config: Config | None = None) -> Tensor:
    """`silu(gate) * value` of the halves of the last dim: [..., 2f] -> [..., f] in x's dtype.

    As `loong_core.references.activation.swiglu`: computed in float32 and rounded once.
    """
    result: Tensor = _SwiGLU.apply(x, _config or _cut(x.shape[-1] // 2))
    return result


class _SwiGLU(torch.autograd.Function):
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


def _cut(f: int) -> Config:
    """1024 results a program, 16 bytes of each half a thread, in the widest block that wastes at most an eighth."""
    widths = (1024, 512, 256, 128, 64)
    columns = next((width for width in widths if triton.cdiv(f, width) * width <= f * 9 // 8), 64)
    return Config(1024 // columns, columns, 4)


def _rows(tensor: Tensor) -> Tensor:
    """`tensor` as [rows, last dim], without a copy where rows are evenly apart and whole."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _grid(rows: int, f: int, config: Config) -> tuple[int]:
    return (triton.cdiv(rows, config.rows) * triton.cdiv(f, config.columns),)


@triton.jit
def _place(count, f: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr):
    """Rows [block_rows,1] as int64 and columns [1,block_columns] of this program, and which of them exist."""
    program = tl.program_id(0)
    across = tl.cdiv(f, block_columns)
    rows = (program // across).to(tl.int64) * block_rows + tl.arange(0, block_rows)[:, None]
    columns = (program % across) * block_columns + tl.arange(0, block_columns)[None, :]
    return rows, columns, (rows < count) & (columns < f)


@triton.jit
def _forward_kernel(x, result, count, stride, f: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr):
    rows, columns, inside = _place(count, f, block_rows, block_columns)
    gate = tl.load(x + rows * stride + columns, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + rows * stride + f + columns, mask=inside, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * value
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
    share = tl.sigmoid(gate)
    d_gate = up * value * share * (1.0 + gate * (1.0 - share))
    d_value = up * gate * share
    tl.store(d_x + rows * (2 * f) + columns, d_gate.to(d_x.dtype.element_ty), mask=inside)
    tl.store(d_x + rows * (2 * f) + f + columns, d_value.to(d_x.dtype.element_ty), mask=inside)
