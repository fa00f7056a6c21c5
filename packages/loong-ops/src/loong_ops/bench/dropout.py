"""Dropout as GR00T's blocks have it, added to the residual and behind GELU; beside plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from loong_ops.bench.passes import Call, backward, forward
from loong_ops.bench.row import Row

RATE = 0.2
SIZES = {"dropout_add": [(64, 41, 1536), (64, 300, 2048)], "gelu_dropout": [(64, 41, 6144), (64, 300, 8192)]}
"""Samples, rows of each, numbers of a row: the action head and the refiner."""

PASSES = {"dropout_add": (3, 2), "gelu_dropout": (2, 3)}
"""Tensors of the size of x that each direction has to move."""


def rows() -> list[Row]:
    """Both passes of ours and of torch."""
    return list(_rows())


def _rows() -> Iterator[Row]:
    for part, sizes in SIZES.items():
        for size in sizes:
            for name in ("triton", "torch"):
                make = partial(_call, part, size, name)
                b, s, n = size
                makers = zip(("forward", "backward"), (forward, backward), PASSES[part], strict=True)
                for direction, maker, moved in makers:
                    yield Row(
                        op="dropout_add" if part == "dropout_add" else "linear_gelu",
                        shape=f"b={b} s={s} n={n}{'' if part == 'dropout_add' else ', behind the product'}",
                        name=name,
                        direction=direction,
                        make=partial(maker, make),
                        bytes=float(moved * b * s * n * 2),
                    )


def _call(part: str, size: tuple[int, int, int], name: str) -> Call:
    import torch
    import torch.nn.functional as functional

    from loong_ops.dropout import dropout_add
    from loong_ops.gelu_dropout import gelu_dropout

    x, residual = (torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    if part == "dropout_add":
        leaves, ours = [x, residual], partial(dropout_add, x, residual, RATE)
        plain = lambda: residual + functional.dropout(x, RATE)  # noqa: E731
    else:
        leaves, ours = [x], partial(gelu_dropout, x, RATE)
        plain = lambda: functional.dropout(functional.gelu(x, approximate="tanh"), RATE)  # noqa: E731
    return plain if name == "torch" else ours, leaves
