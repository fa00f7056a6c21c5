"""What the attention ops share of FlashAttention-4 (CuTe DSL): its two functions, and what head sizes they are for.

The two functions are those that torch's own binding (`torch.nn.attention._fa4`) calls: unlike the package's front door
they take the memory to write to, so results and gradients arrive in the layers' order of dims.

Source: Dao et al., 2022 (arXiv 2205.14135), and the package `flash-attn-4`.
Shape legend: h query heads, g key-value heads, d and e head sizes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as functional
from torch import Tensor

# The DSL tells its own authors how to annotate an argument of these kernels, once per kernel compiled.
warnings.filterwarnings("ignore", message=".*cannot be converted to a JitArgument", category=UserWarning)


def at_kernel_width(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """`function` of query [...,h,d], key [...,g,d] and value [...,g,e] -> [...,h,e], called with heads that the kernels
    have right gradients for: columns of zeros change no product."""
    d, e = query.shape[-1], value.shape[-1]
    wide, wide_value = _kernel_width(d), _kernel_width(e)
    if wide != wide_value and query.shape[-2] != key.shape[-2]:  # grouped heads have a backward for equal widths only
        wide = wide_value = max(wide, wide_value)
    if (d, e) == (wide, wide_value):
        return function(query, key, value)
    query, key = (functional.pad(part, (0, wide - d)) for part in (query, key))
    return function(query, key, functional.pad(value, (0, wide_value - e)))[..., :e]


def _kernel_width(width: int) -> int:
    """The least head size from `width` on whose gradients are right.

    In flash-attn-4 4.0.0b36 the backward kernel for Hopper sums dQ (and, with grouped heads, dK and dV) in tiles whose
    width is a multiple of 16, up to heads of 128; the kernel that converts these sums takes their width for a multiple
    of 32. Of tiles with 80 columns it reads 96. Above 128 both take multiples of 64.
    """
    return -(-width // 32) * 32 if width <= 128 and -(-width // 16) % 2 else width


def forward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, *, scale: float, causal: bool, **lengths: Any
) -> Tensor:
    """Write the result to `out`; returns the logarithm of what the softmax divides by, for `backward`."""
    from flash_attn.cute.interface import _flash_attn_fwd

    _, normaliser, *_ = _flash_attn_fwd(
        query, key, value, out=out, softmax_scale=scale, causal=causal, return_lse=True, **lengths
    )
    return normaliser  # type: ignore[no-any-return]


def backward(
    inputs: Sequence[Tensor],
    normaliser: Tensor,
    gradients: Sequence[Tensor],
    *,
    scale: float,
    causal: bool,
    deterministic: bool,
    **lengths: Any,
) -> None:
    """From query, key, value, result and its gradient: write the gradients of the first three to `gradients`."""
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv = gradients
    _flash_attn_bwd(
        *inputs,
        normaliser,
        softmax_scale=scale,
        causal=causal,
        deterministic=deterministic,
        dq=dq,
        dk=dk,
        dv=dv,
        **lengths,
    )
