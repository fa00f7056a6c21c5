"""Context parallelism as data: which positions of a row belong to which rank.

The layout is megatron-core's zigzag. A row is cut into `2 * size` equal chunks, and rank `r` holds chunks `r` and
`2 * size - 1 - r`, so that under a causal mask every rank has the same number of scores to compute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loong_core.errors import Unsupported

if TYPE_CHECKING:
    from loong_core.train.engine import Batch


def rows(seq_len: int, size: int, rank: int) -> torch.Tensor:
    """Positions within the whole row that `rank` of `size` holds, in the order it holds them: int64 [seq_len / size].

    `seq_len` is that of the whole row. Raises `Unsupported` where it is not divisible by `2 * size`.
    """
    if size == 1:
        return torch.arange(seq_len)
    if seq_len % (2 * size):
        raise Unsupported(
            f"data.seq_len = {seq_len} is not divisible by 2 x parallel.cp = {2 * size}: context parallelism cuts a "
            f"row into that many equal chunks. Use a multiple of {2 * size}."
        )
    chunk = seq_len // (2 * size)
    first, second = rank * chunk, (2 * size - 1 - rank) * chunk
    return torch.cat([torch.arange(first, first + chunk), torch.arange(second, second + chunk)])


def gathered_rows(seq_len: int, size: int) -> torch.Tensor:
    """Positions of all ranks' parts, one rank after the other, as an all-gather along the sequence lays them out."""
    return torch.cat([rows(seq_len, size, rank) for rank in range(size)])


def slice_batch(batch: Batch, size: int, rank: int) -> Batch:
    """The part of a micro-batch that context-parallel `rank` of `size` computes.

    Every tensor is [micro_batch, seq_len, ...], cut along dim 1 to [micro_batch, seq_len / size, ...].
    """
    if size == 1:
        return batch
    local: Batch = {}
    for name, tensor in batch.items():
        index = rows(tensor.shape[1], size, rank).to(tensor.device)
        local[name] = tensor.index_select(1, index)
    return local
