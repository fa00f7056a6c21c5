"""How the norms' kernels take rows: one in a program's registers, backward's programs many each."""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor

from loong_core.errors import Unsupported

WIDEST = 16384
"""Numbers of a row that one program holds."""


class Config(NamedTuple):
    """Rows of a block and warps, forward and backward; the most programs of backward, and the blocks it loads ahead."""

    forward_rows: int
    forward_warps: int
    rows: int
    warps: int
    programs: int
    stages: int


def block_of(op: str, n: int) -> tuple[int, int]:
    """Rows and warps of a program: 16 numbers a thread, as long as there are 4 to 16 warps to take them.

    Raises `Unsupported` for more than 16384 numbers a row.
    """
    if n > WIDEST:
        raise Unsupported(
            f"{op}: rows of {n} numbers are too wide for one program. Allowed: up to {WIDEST} (op {op}, implementation "
            "triton). Choose another implementation in the recipe's `ops`."
        )
    width = triton.next_power_of_2(n)
    return max(1, 2048 // width), max(4, min(16, width // 512))


def cut(op: str, n: int, at_once: int) -> Config:
    """As `block_of` says, each way.

    `at_once`: warps that share a multiprocessor in backward, by the registers that a thread takes then: as many get
    programs, which are one wave.

    Raises `Unsupported` for more than 16384 numbers a row.
    """
    rows, warps = block_of(op, n)
    return Config(rows, warps, rows, warps, 132 * max(1, at_once // warps), 1)


def as_rows(tensor: Tensor) -> Tensor:
    """`tensor` as [rows, last dim], without a copy where rows are evenly apart and whole."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
