"""The op `sum_of_squares`: what a norm of gradients needs, in one launch for each range of memory and one for all.

Ranges that follow each other in the list and in memory are one. Each program leaves the sum of a fixed part of a range,
and nothing is added atomically: the same tensors in the same places of a buffer give the same bits on cards of a kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIG: dict[str, int] = {"BLOCK": 4096, "STEPS": 16, "num_warps": 8}
"""Elements that a program reads at a time, how often it does, and its warps: sixteen elements a thread, so that enough
is on its way from memory."""


@torch.no_grad()
def sum_of_squares(tensors: Sequence[Tensor], device: str, *, _config: dict[str, int] | None = None) -> Tensor:
    """As `loong_core.references.sum_of_squares.sum_of_squares`, added in float32: tensors of any shapes -> [].

    A tensor that is not contiguous is copied.
    """
    config = _config or CONFIG
    part = config["BLOCK"] * config["STEPS"]
    ranges = [(first, count, triton.cdiv(count, part)) for first, count in _ranges(tensors)]
    sums = torch.empty(sum(programs for _, _, programs in ranges), dtype=torch.float32, device=device)
    begin = 0
    for first, count, programs in ranges:
        _kernel[(programs,)](first, sums, begin, count, **config)
        begin += programs
    return sums.sum()


def _ranges(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, int]]:
    """The tensors as ranges of memory: the first tensor of a range, and how many elements it has.

    Only what lies in the same storage is one range: where storages lie is the allocator's choice, and how sums are cut
    shall not depend on it.
    """
    first: Tensor | None = None
    count = 0
    for tensor in tensors:
        if not tensor.numel():
            continue
        tensor = tensor.contiguous()
        if first is not None and _follows(tensor, first, count):
            count += tensor.numel()
            continue
        if first is not None:
            yield first, count
        first, count = tensor, tensor.numel()
    if first is not None:
        yield first, count


def _follows(tensor: Tensor, first: Tensor, count: int) -> bool:
    """Whether `tensor` begins where a range of `count` elements from the beginning of `first` ends."""
    return (
        tensor.dtype == first.dtype
        and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and tensor.storage_offset() == first.storage_offset() + count
    )


@triton.jit(do_not_specialize=["begin"])
def _kernel(x, sums, begin, count, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Part i of a range goes to sums[begin + i]."""
    program = tl.program_id(0)
    offsets = program.to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for step in tl.static_range(STEPS):
        here = offsets + step * BLOCK
        values = tl.load(x + here, mask=here < count, other=0.0).to(tl.float32)
        squares += values * values
    tl.store(sums + begin + program, tl.sum(squares, axis=0))
