"""The ops `linear` and `linear_gelu` by torch's products (cuBLAS): weights' gradients are written where the engine sums
them.

Autograd would round a weight's gradient to the weight's dtype and leave it to the engine to add it to the buffer: a
pass of eight bytes a weight that is not needed. Shape legend: t rows (all leading dims as one), n inputs, m outputs.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.autograd.function import once_differentiable

from loong_ops.gelu_dropout import gelu_dropout
from loong_ops.weight_gradient import delivered, weight_gradient


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `loong_core.references.linear.linear`: x [..., n], weight [m,n], bias [m] or None -> [..., m] in x's dtype."""
    if torch.compiler.is_compiling():  # a compiled graph has no place for writing to a buffer beside it
        return functional.linear(x, weight, bias)
    result: Tensor = _Linear.apply(x, weight, bias)
    return result


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, dropout: float = 0.0) -> Tensor:
    """As `loong_core.references.linear.linear_gelu`: x [..., n], weight [m,n], bias [m] -> [..., m] in x's dtype.

    Where nothing is trained the activation is the product's epilogue, rounded once. Backward would need the product.
    With `dropout` activation and dropout are one pass, and rounded once.
    """
    if dropout:
        product = linear(x, weight, bias)
        if product.dtype != torch.float64 and not torch.compiler.is_compiling():
            return gelu_dropout(product, dropout)
        return functional.dropout(functional.gelu(product, approximate="tanh"), dropout)
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    # On a CPU torch's fused function is the other GELU, that with the error function.
    if trained or x.device.type != "cuda" or not x.numel() or torch.compiler.is_compiling():
        return functional.gelu(linear(x, weight, bias), approximate="tanh")
    rows = x.reshape(-1, x.shape[-1])
    return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True).view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        d_x = gradient.matmul(weight) if needs_x else None
        d_out = gradient.reshape(-1, len(weight))
        d_weight = d_bias = None
        if needs_weight:
            d_weight = weight_gradient(weight, partial(outer, d_out, x.reshape(-1, x.shape[-1])))
        if needs_bias:
            d_bias = delivered(bias, column_sums(d_out))
        return d_x, d_weight, d_bias


def column_sums(rows: Tensor) -> Tensor:
    """[t,m] -> [m], at least in float32. In 16 bits on a card this is a product with ones: in a profile of Pi0.5
    torch's sums over the first dim read at about a quarter of the speed of memory."""
    if rows.device.type == "cuda" and rows.dtype in (torch.bfloat16, torch.float16) and len(rows):
        ones = _ones(1 << (len(rows) - 1).bit_length(), rows.dtype, rows.device)
        return torch.mm(ones[:, : len(rows)], rows, out_dtype=torch.float32)[0]
    return rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))


@cache
def _ones(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1,count], made once for each power of two, and kept: CUDA graphs go on to read it. The passes that run before a
    graph is captured make what it needs; made inside of it, it would hold ones only once the graph has run."""
    return torch.ones(1, count, dtype=dtype, device=device)


def outer(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    """out [m,n] (+)= left [t,m]^T @ right [t,n], in out's dtype."""
    if not len(left):
        if not add:
            out.zero_()
    elif out.dtype == left.dtype:
        torch.addmm(out, left.t(), right, beta=float(add), out=out)
    elif out.device.type == "cuda":
        torch.addmm(out, left.t(), right, out_dtype=out.dtype, beta=float(add), out=out)
    else:  # a CPU multiplies equal dtypes only
        torch.addmm(out, left.t().to(out.dtype), right.to(out.dtype), beta=float(add), out=out)
