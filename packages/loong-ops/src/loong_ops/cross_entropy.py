"""Cross entropy over a large vocabulary in Triton: one program a row, its second pass back to front and in place.

A row of 151,936 logits fits no register file, so it is read twice: for its largest logit and the sum of exponentials,
then for the gradient. The second pass begins where the first one ended, with what the cache still holds.
Shape legend: t rows, v vocabulary, n ranks that share it, w columns of a row that lie in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from loong_core.references.cross_entropy import IGNORED, _check_targets

BLOCK = 16384
"""Columns that a program takes at a time. On an H200, 2816 rows of 151,936 columns with their gradient take 0.54 ms so;
0.55 ms with half the warps, 0.57 ms with half or twice the columns."""
WARPS = 32
STAGES = 1
"""Blocks on their way at once; more than one travel through shared memory."""

_LOWEST = tl.constexpr(-1e38)
"""Below any logit, and finite: a difference of two of them is no NaN."""
_IGNORED = tl.constexpr(IGNORED)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
"""Logits are taken times log2(e): a device has powers of two, and one fused step takes a logit to its exponent."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """The columns of the vocabulary that this rank holds: `held` of them, from `first` on."""

    first: int
    held: int
    group: Any

    @classmethod
    def of(cls, vocabulary: int, width: int, group: Any) -> Share:
        """Of `width` columns a rank, those from `vocabulary` on are padding. `group` None: all are here."""
        if group is None or group.size() == 1:
            return cls(first=0, held=min(vocabulary, width), group=None)
        first = group.rank() * width
        return cls(first=first, held=min(max(vocabulary - first, 0), width), group=group)


def cross_entropy(logits: Tensor, targets: Tensor, *, vocabulary: int, group: Any = None) -> Tensor:
    """`logsumexp(logits) - logits[target]`: logits [..., v/n], targets [...] -> [...] in float32.

    Rank r of the n ranks of `group` (None: one) holds columns r * v/n onwards. Columns from `vocabulary` on are padding
    and take no part. A target of -100 gives loss 0 and no gradient. Kept for backward are the logits, which the caller
    holds anyway, and two numbers a row. Sources: Milakov and Gimelshein, 2018 (maximum and sum in one pass); Shoeybi et
    al., 2019, section 3 (the sharding).

    Raises `DataError` on a CPU (elsewhere the device reports it) for other targets outside the vocabulary.
    """
    loss: Tensor = _CrossEntropy.apply(logits, targets, vocabulary, group)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocabulary: int, group: Any) -> Tensor:
        width = logits.shape[-1]
        share = Share.of(vocabulary, width, group)
        _check_targets(targets, vocabulary)
        wanted = targets.reshape(-1).contiguous()
        loss = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
        peaks, inverses = torch.empty((2, wanted.numel()), dtype=torch.float32, device=logits.device)
        write_losses(_rows(logits), wanted, share, loss.view(-1), peaks, inverses)
        ctx.save_for_backward(logits, wanted, peaks, inverses)
        ctx.share = share
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, wanted, peaks, inverses = ctx.saved_tensors
        flat = _rows(logits)
        result = torch.empty_like(flat, memory_format=torch.contiguous_format)
        write_gradients(flat, wanted, ctx.share, peaks, inverses, gradients[0].reshape(-1), result)
        return result.view(logits.shape), None, None, None


def _rows(logits: Tensor) -> Tensor:
    flat = logits.reshape(-1, logits.shape[-1]) if logits.numel() else logits.new_empty((0, logits.shape[-1]))
    return flat if flat.stride(1) == 1 else flat.contiguous()


# ------------------------------------------------------------------------------------------- launches
def write_losses(
    logits: Tensor,
    targets: Tensor,
    share: Share,
    loss: Tensor,
    peaks: Tensor,
    inverses: Tensor,
    gradient: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Fill `loss` [t] and what makes a softmax of logits, exp2(logit * log2(e) - peak) * inverse: `peaks` [t] and
    `inverses` [t].

    logits [t,w], targets [t]. `gradient` [t,w], which may be `logits`, becomes scale * (softmax - one-hot): zeros in
    the columns after those held and in rows with target -100.
    """
    count, width = logits.shape
    if count == 0:
        return
    gathered, ranks = loss, 1
    if share.group is not None:
        ranks = share.group.size()
        mine = torch.empty((3, count), dtype=torch.float32, device=logits.device)
        _statistics_kernel[(count,)](
            logits, targets, mine, share.first, share.held, width, logits.stride(0), count, **_config(logits)
        )
        gathered = torch.empty((ranks * 3, count), dtype=torch.float32, device=logits.device)
        dist.all_gather_into_tensor(gathered, mine, group=share.group)
    _loss_kernel[(count,)](
        logits,
        logits if gradient is None else gradient,
        targets,
        gathered,
        loss,
        peaks,
        inverses,
        scale,
        share.first,
        share.held,
        width,
        logits.stride(0),
        logits.stride(0) if gradient is None else gradient.stride(0),
        count,
        ranks,
        share.group is not None,
        gradient is not None,
        triton.next_power_of_2(ranks),
        **_config(logits),
    )


def write_gradients(
    logits: Tensor,
    targets: Tensor,
    share: Share,
    peaks: Tensor,
    inverses: Tensor,
    upstream: Tensor,
    gradient: Tensor,
) -> None:
    """Fill `gradient` [t,w], which may be `logits`, with upstream * (softmax - one-hot). `upstream` [t], any stride."""
    count, width = logits.shape
    if count == 0:
        return
    _gradient_kernel[(count,)](
        logits,
        gradient,
        targets,
        peaks,
        inverses,
        upstream,
        share.first,
        share.held,
        width,
        logits.stride(0),
        gradient.stride(0),
        upstream.stride(0),
        **_config(logits),
    )


def _config(logits: Tensor) -> dict[str, int]:
    """How a row is cut: columns at a time, and how many neighbouring ones a thread loads at once, 16 bytes of them."""
    block = min(BLOCK, max(triton.next_power_of_2(logits.shape[1]), 128))
    warps = max(1, min(WARPS, block // 256))
    return {"BLOCK": block, "LANES": 16 // logits.element_size(), "STAGES": STAGES, "num_warps": warps}


# ------------------------------------------------------------------------------------------- kernels
@triton.jit
def _columns(BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Numbers from 0 to BLOCK - 1 as [BLOCK / LANES, LANES]: a thread owns whole rows of it, so that the maxima and
    sums along them need no exchange."""
    return tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def _power(logits, peak):
    """exp2(logit * log2(e) - peak), where `peak` is a logit times log2(e). The product is not rounded on a device: a
    rounded `peak` is off by one factor for the whole row, which its sum of exponentials shares."""
    return tl.exp2(tl.fma(logits, _LOG2E, -peak))


@triton.jit
def _grow(peaks, totals, logits):
    """Take a block of logits into the running maxima (times log2(e)) and the sums of exponentials below them."""
    grown = tl.maximum(peaks, tl.max(logits, 1) * _LOG2E)
    totals = totals * tl.exp2(peaks - grown) + tl.sum(_power(logits, grown[:, None]), 1)
    return grown, totals


@triton.jit
def _row_statistics(row, held, width, BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr):
    """Largest of a row's first `held` logits times log2(e), and the sum of exponentials of their distances from it."""
    columns = _columns(BLOCK, LANES)
    peaks = tl.full([BLOCK // LANES], _LOWEST, tl.float32)
    totals = tl.zeros([BLOCK // LANES], tl.float32)
    whole = held // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        logits = tl.load(row + start + columns, eviction_policy="evict_last").to(tl.float32)
        peaks, totals = _grow(peaks, totals, logits)
    if whole < held:
        place = whole + columns
        logits = tl.load(row + place, mask=place < width).to(tl.float32)
        peaks, totals = _grow(peaks, totals, tl.where(place < held, logits, float("-inf")))
    peak = tl.max(peaks, 0)
    return peak, tl.sum(totals * tl.exp2(peaks - peak), 0)


@triton.jit
def _write_row(
    row,
    out,
    column,
    counted,
    peak,
    inverse,
    scale,
    held,
    width,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out = scale * (exp2(row * log2(e) - peak) * inverse - one-hot at `column`); zeros in columns from `held` on. A
    row that is not `counted` is not read: its `scale` is 0."""
    columns = _columns(BLOCK, LANES)
    factor = inverse * scale
    hot = counted & (column >= 0) & (column < held)
    at_column = _power(tl.load(row + column, mask=hot, other=float("-inf")).to(tl.float32), peak) * factor - scale
    tl.debug_barrier()  # `out` may be `row`: every thread has read the target's logit before one writes over it
    whole = held // BLOCK * BLOCK
    for start in range(whole, width, BLOCK):
        place = start + columns
        shown = (place < held) & counted
        logits = tl.load(row + place, mask=(place < width) & counted).to(tl.float32)
        value = _power(tl.where(shown, logits, float("-inf")), peak) * factor
        tl.store(out + place, value.to(out.dtype.element_ty), mask=place < width)
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        place = whole - BLOCK - start + columns
        logits = tl.load(row + place, mask=counted, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
        value = _power(logits, peak) * factor
        tl.store(out + place, value.to(out.dtype.element_ty), eviction_policy="evict_first")
    tl.debug_barrier()  # one column is put right when all are written
    tl.store(out + column, at_column.to(out.dtype.element_ty), mask=hot)


@triton.jit
def _picked(row, column, held, counted):
    return tl.load(row + column, mask=counted & (column >= 0) & (column < held), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["first"])
def _statistics_kernel(
    logits,
    targets,
    statistics,
    first,
    held,
    width,
    stride,
    count,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """statistics[3,t]: largest logit times log2(e), sum of exponentials, and the target's logit, of this rank's
    columns."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    target = tl.load(targets + index)
    counted = target != _IGNORED
    picked = _picked(row, (target - first).to(tl.int32), held, counted)
    peak, total = _row_statistics(row, tl.where(counted, held, 0), width, BLOCK, LANES, STAGES)
    tl.store(statistics + index, peak)
    tl.store(statistics + count + index, total)
    tl.store(statistics + 2 * count + index, picked)


@triton.jit(do_not_specialize=["first"])
def _loss_kernel(
    logits,
    gradient,
    targets,
    gathered,
    losses,
    peaks,
    inverses,
    scale,
    first,
    held,
    width,
    stride,
    gradient_stride,
    count,
    ranks,
    SHARDED: tl.constexpr,
    GRADIENT: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A row's loss and statistics, and its gradient where asked for. `gathered` [n,3,t] are those of all ranks."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    target = tl.load(targets + index)
    counted = target != _IGNORED
    column = (target - first).to(tl.int32)
    if SHARDED:
        rank = tl.arange(0, RANKS)
        place = gathered + rank * 3 * count + index
        highest = tl.load(place, mask=rank < ranks, other=_LOWEST)
        sums = tl.load(place + count, mask=rank < ranks, other=0.0)
        picked = tl.sum(tl.load(place + 2 * count, mask=rank < ranks, other=0.0), 0)
        peak = tl.max(highest, 0)
        total = tl.sum(sums * tl.exp2(highest - peak), 0)
    else:
        picked = _picked(row, column, held, counted)
        peak, total = _row_statistics(row, tl.where(counted, held, 0), width, BLOCK, LANES, STAGES)
    peak = tl.where(counted, peak, 0.0)
    total = tl.where(counted, total, 1.0)
    tl.store(peaks + index, peak)
    tl.store(inverses + index, 1 / total)
    # Differences of logits first: the sum of exponentials is small beside logits of any size.
    distance = tl.fma(picked, _LOG2E, -peak)
    tl.store(losses + index, tl.where(counted, (tl.log2(total) - distance) * _LN2, 0.0))
    if GRADIENT:
        out = gradient + index.to(tl.int64) * gradient_stride
        shown = tl.where(counted, scale, 0.0)
        _write_row(row, out, column, counted, peak, 1 / total, shown, held, width, BLOCK, LANES, STAGES)


@triton.jit(do_not_specialize=["first"])
def _gradient_kernel(
    logits,
    gradient,
    targets,
    peaks,
    inverses,
    upstream,
    first,
    held,
    width,
    stride,
    gradient_stride,
    upstream_stride,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    index = tl.program_id(0)
    target = tl.load(targets + index)
    counted = target != _IGNORED
    peak = tl.load(peaks + index)
    inverse = tl.load(inverses + index)
    scale = tl.load(upstream + index * upstream_stride, mask=counted, other=0.0).to(tl.float32)
    row = logits + index.to(tl.int64) * stride
    out = gradient + index.to(tl.int64) * gradient_stride
    column = (target - first).to(tl.int32)
    _write_row(row, out, column, counted, peak, inverse, scale, held, width, BLOCK, LANES, STAGES)
