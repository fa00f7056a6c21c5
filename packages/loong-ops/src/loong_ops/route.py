"""The op `route`: softmax, top-k, weights and the statistics of balance in one pass over the logits.

Logits become integers that sort as they do, so that a choice is two integer maxima, and NaN still gives k different
experts. Shape legend: t tokens, e experts, k experts chosen for each token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loong_core.errors import Unsupported
from loong_core.references.routing import Routing

MOST_EXPERTS = 1024
"""Logits of a token that its program holds at once."""


class Config(NamedTuple):
    """How a pass is cut: tokens of a block, warps, and the most programs that share a forward pass."""

    tokens: int
    warps: int
    programs: int


def _cut(experts: int) -> Config:
    """A warp holds whole tokens, so that no maximum crosses warps: 16 bytes of float32 in each lane are 128 experts."""
    return Config(4, 4, 132 * 8) if experts <= 128 else Config(1, 1, 132 * 16)


def route(
    logits: Tensor, top_k: int, *, normalise: bool, valid: Tensor | None = None, _config: Config | None = None
) -> Routing:
    """logits [t,e] -> weights [t,k] float32, experts [t,k] int32, counts [e] int32, sums [e] float32.

    As `loong_core.references.routing.route`: of equal logits the first is chosen, `valid` [t] bool says which tokens
    are counted. Kept for backward: `logits` and the experts.

    Raises `Unsupported` where more experts are to be chosen than there are, or there are too many.
    """
    e = logits.shape[1]
    if not 1 <= top_k <= e <= MOST_EXPERTS:
        raise Unsupported(
            f"route: {top_k} of {e} experts cannot be chosen for a token. "
            f"Allowed: 1 to all of them, and at most {MOST_EXPERTS} experts (op route, implementation triton)."
        )
    return Routing(*_Route.apply(logits, top_k, normalise, valid, _config or _cut(e)))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, top_k: int, normalise: bool, valid: Tensor | None, config: Config
    ) -> tuple[Tensor, ...]:
        t, e = logits.shape
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        programs = min(triton.cdiv(t, config.tokens), config.programs)
        weights = logits.new_empty(t, top_k, dtype=torch.float32)
        experts = logits.new_empty(t, top_k, dtype=torch.int32)
        counts = logits.new_empty(programs, e, dtype=torch.int32)
        sums = logits.new_empty(programs, e, dtype=torch.float32)
        if programs:
            _forward_kernel[(programs,)](
                logits,
                valid,
                weights,
                experts,
                counts,
                sums,
                t,
                logits.stride(0),
                0 if valid is None else valid.stride(0),
                normalise,
                e,
                top_k,
                triton.next_power_of_2(e),
                config.tokens,
                num_warps=config.warps,
            )
        counts, sums = counts.sum(0, dtype=torch.int32), sums.sum(0)
        ctx.mark_non_differentiable(experts, counts, sums)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, experts)
        ctx.normalise, ctx.config = normalise, config
        return weights, experts, counts, sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, experts = ctx.saved_tensors
        d_weights = gradients[0]
        if d_weights is None:
            return None, None, None, None, None
        t, e = logits.shape
        d_logits = logits.new_empty(t, e)
        if t:
            _backward_kernel[(triton.cdiv(t, ctx.config.tokens),)](
                logits,
                experts,
                d_weights,
                d_logits,
                t,
                logits.stride(0),
                *d_weights.stride(),
                ctx.normalise,
                e,
                experts.shape[1],
                triton.next_power_of_2(e),
                ctx.config.tokens,
                num_warps=ctx.config.warps,
            )
        return d_logits, None, None, None, None


@triton.jit
def _sortable(logits):
    """int32 that sort as float32 do, NaN last: in negative numbers the bits below the sign are turned over.

    No number gives the least int32. Minus zero equals zero.
    """
    logits = tl.where(logits == 0.0, 0.0, tl.where(logits == logits, logits, float("nan")))
    bits = logits.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unsorted(keys):
    """The inverse of `_sortable`."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _powers(logits, among):
    """exp(logits) relative to the largest `among` them, zero elsewhere; their sum, [tokens,1]; and that largest."""
    peak = tl.max(tl.where(among, logits, float("-inf")), axis=1)[:, None]
    powers = tl.where(among, tl.exp(logits - peak), 0.0)
    return powers, tl.sum(powers, axis=1)[:, None], peak


@triton.jit
def _forward_kernel(
    logits,
    valid,
    weights,
    experts,
    counts,
    sums,
    t,
    stride,
    valid_stride,
    normalise: tl.constexpr,
    e: tl.constexpr,
    top_k: tl.constexpr,
    padded: tl.constexpr,
    tokens: tl.constexpr,
):
    """Every n-th block of tokens; its statistics are one row of `counts` and of `sums` [programs,e]."""
    program = tl.program_id(0)
    columns = tl.arange(0, padded)[None, :]
    count = tl.zeros([tokens, padded], tl.int32)
    total = tl.zeros([tokens, padded], tl.float32)
    for first in range(program * tokens, t, tl.num_programs(0) * tokens):
        index = tl.cast(first, tl.int64) + tl.arange(0, tokens)
        rows = index[:, None]
        inside = (rows < t) & (columns < e)
        values = tl.load(logits + rows * stride + columns, mask=inside, other=0.0).to(tl.float32)
        keys = tl.where(columns < e, _sortable(values), -0x80000000)
        best_keys, best = keys, keys
        for slot in tl.static_range(top_k):
            peak = tl.max(keys, axis=1)[:, None]
            expert = tl.min(tl.where(keys == peak, columns, padded), axis=1)[:, None]
            # The choice is collected in columns 0 to k - 1 of blocks as wide as the logits: no data changes lanes.
            best_keys = tl.where(columns == slot, peak, best_keys)
            best = tl.where(columns == slot, expert, best)
            keys = tl.where(columns == expert, -0x80000000, keys)
        powers, everything, peak = _powers(values, columns < e)
        shares = powers / everything
        taken = (rows < t) & (columns < top_k)
        if normalise:
            powers, everything, peak = _powers(_unsorted(best_keys), columns < top_k)
        else:
            powers = tl.exp(_unsorted(best_keys) - peak)
        tl.store(weights + rows * top_k + columns, powers / everything, mask=taken)
        tl.store(experts + rows * top_k + columns, best, mask=taken)
        counted = inside
        if valid is not None:
            counted = inside & (tl.load(valid + index * valid_stride, mask=index < t, other=0) != 0)[:, None]
        count += (counted & (keys == -0x80000000)).to(tl.int32)
        total += tl.where(counted, shares, 0.0)
    columns = tl.arange(0, padded)
    tl.store(counts + program * e + columns, tl.sum(count, axis=0), mask=columns < e)
    tl.store(sums + program * e + columns, tl.sum(total, axis=0), mask=columns < e)


@triton.jit
def _backward_kernel(
    logits,
    experts,
    d_weights,
    d_logits,
    t,
    stride,
    d_stride,
    d_slot_stride,
    normalise: tl.constexpr,
    e: tl.constexpr,
    top_k: tl.constexpr,
    padded: tl.constexpr,
    tokens: tl.constexpr,
):
    """One block of tokens: the softmax again, over the chosen experts or over all, and its gradient."""
    rows = tl.program_id(0).to(tl.int64) * tokens + tl.arange(0, tokens)
    columns = tl.arange(0, padded)[None, :]
    inside = (rows[:, None] < t) & (columns < e)
    values = tl.load(logits + rows[:, None] * stride + columns, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.zeros([tokens, padded], tl.float32)
    taken = tl.zeros([tokens, padded], tl.int1)
    for slot in tl.static_range(top_k):
        expert = tl.load(experts + rows * top_k + slot, mask=rows < t, other=0)
        gradient = tl.load(d_weights + rows * d_stride + slot * d_slot_stride, mask=rows < t, other=0.0)
        chosen = columns == expert[:, None]
        upstream = tl.where(chosen, gradient[:, None].to(tl.float32), upstream)
        taken = taken | chosen
    if normalise:
        powers, everything, peak = _powers(values, taken)
    else:
        powers, everything, peak = _powers(values, columns < e)
    shares = powers / everything
    mean = tl.sum(shares * upstream, axis=1)[:, None]
    result = shares * (upstream - mean)
    tl.store(d_logits + rows[:, None] * e + columns, result.to(d_logits.dtype.element_ty), mask=inside)
