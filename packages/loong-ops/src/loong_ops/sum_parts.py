"""The op `sum_parts`: one pass over what ranks have sent, where torch's reduction over a first axis is slow."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8


@torch.no_grad()
def sum_parts(parts: Tensor, out: Tensor, own: Tensor | None = None) -> None:
    """As `loong_core.references.sum_parts.sum_parts`: parts [r,...] and own [...] -> out [...], added in float32 in the
    order of the first axis, `own` last. Raises `ValueError` for tensors that are not contiguous or do not match."""
    like = [(parts, parts.shape[1:])] + ([] if own is None else [(own, own.shape)])
    if not out.is_contiguous() or any(
        shape != out.shape or tensor.dtype != out.dtype or not tensor.is_contiguous() for tensor, shape in like
    ):
        beside = "" if own is None else f" and {tuple(own.shape)} of {own.dtype}"
        raise ValueError(
            f"sum_parts: parts {tuple(parts.shape)} of {parts.dtype}{beside} into {tuple(out.shape)} of {out.dtype}: "
            "expected contiguous tensors of one dtype, [r,...] and [...]"
        )
    count = out.numel()
    if count:
        _kernel[(triton.cdiv(count, BLOCK),)](parts, own, out, count, PARTS=len(parts), BLOCK=BLOCK, num_warps=WARPS)


@triton.jit
def _kernel(parts, own, out, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = here < count
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        step = tl.full((), part, tl.int64) * count
        total += tl.load(parts + step + here, mask=inside, other=0.0).to(tl.float32)
    if own is not None:
        total += tl.load(own + here, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + here, total.to(out.dtype.element_ty), mask=inside)
