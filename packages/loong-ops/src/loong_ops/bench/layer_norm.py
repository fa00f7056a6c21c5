"""The norms of SigLIP and of GR00T's tower, and norms that hand x through; beside plain torch.

A norm that hands x through stands beside `apart`: our norm alone, and autograd's addition of the two gradients.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from loong_ops.bench.passes import Call, backward, forward
from loong_ops.bench.row import Row

SIZES = {
    "layer_norm": [(32768, 1024), (32768, 1152), (32768, 1536), (32768, 2048)],
    "residual_layer_norm": [(32768, 1024), (32768, 1152)],
    "residual_rms_norm": [(32768, 2048), (32768, 4096)],
}
"""Rows, numbers of a row."""

SWEEP = [
    (2, 4, 2, 4, 132 * 4, 1),
    (1, 4, 1, 4, 132 * 5, 1),
    (1, 4, 1, 4, 132 * 4, 2),
    (1, 4, 1, 4, 132 * 8, 1),
    (1, 8, 1, 8, 132 * 3, 1),
    (1, 8, 1, 8, 132 * 4, 1),
    (1, 2, 1, 2, 132 * 8, 1),
]
"""Rows and warps forward; rows, warps, programs and stages backward."""


def rows() -> list[Row]:
    """Both passes of ours and of the others; other cuts of ours at each size."""
    return list(_rows())


def _rows() -> Iterator[Row]:
    for op, sizes in SIZES.items():
        for size in sizes:
            for name in ("triton", "torch", *(["apart"] if op.startswith("residual") else [])):
                yield from _both(op, size, name, ())
            for cut in SWEEP:
                yield from _both(op, size, f"triton[{','.join(map(str, cut))}]", cut)


def _both(op: str, size: tuple[int, int], name: str, cut: tuple[int, ...]) -> Iterator[Row]:
    make = partial(_call, op, size, name, cut)
    # Forward x -> y; backward x, dy and what came past the norm -> dx.
    passes = (("forward", forward, 2), ("backward", backward, 4 if op.startswith("residual") else 3))
    for direction, maker, moved in passes:
        yield Row(
            op=op,
            shape=f"t={size[0]} n={size[1]}",
            name=name,
            direction=direction,
            make=partial(maker, make),
            bytes=float(moved * size[0] * size[1] * 2),
            headline="[" not in name,
        )


def _call(op: str, size: tuple[int, int], name: str, cut: tuple[int, ...]) -> Call:
    import torch

    from loong_ops.norm_rows import Config

    plain = op.removeprefix("residual_")
    shapes = [size, *[size[1:]] * (2 if plain == "layer_norm" else 1)]
    leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    ours = importlib.import_module(f"loong_ops.{plain}")
    function: Callable[..., Any] = getattr(ours, op)
    if cut:
        function = partial(function, _config=Config(*cut))
    elif name != "triton":
        norm = getattr(ours, plain) if name == "apart" else partial(_torch, plain)
        function = partial(_beside, norm) if op != plain else norm
    return partial(function, *leaves, 1e-6), leaves


def _torch(op: str, x: Any, *others: Any) -> Any:
    from torch.nn import functional

    return getattr(functional, op)(x, x.shape[-1:], *others)


def _beside(norm: Callable[..., Any], x: Any, *others: Any) -> Any:
    return norm(x, *others), x
