"""The norms and gates of robot policies: Pi0.5's prefix and expert, GR00T's action head; beside plain torch."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial

from loong_ops.bench.passes import Call, backward, forward
from loong_ops.bench.row import Row

SIZES = {
    "ada_rms_norm": [(1, 8064, 2048), (1, 18432, 2048), (14, 50, 1024)],
    "layer_norm_modulate": [(16, 41, 1536), (64, 41, 1536)],
    "gated_residual": [(14, 50, 1024), (32, 50, 1024)],
}
"""Samples, rows of each, numbers of a row."""

PASSES = {"ada_rms_norm": (2, 3), "layer_norm_modulate": (2, 3), "gated_residual": (3, 3)}
"""Tensors of the size of x that each direction has to move."""

SWEEP = [(1, 4, 132 * 4), (1, 8, 132 * 6), (2, 4, 132 * 6), (2, 8, 132 * 3), (4, 8, 132 * 6)]
"""Rows, warps, programs of backward."""


def rows() -> list[Row]:
    """Both passes of ours and of torch; other cuts of ours at each size."""
    return list(_rows())


def _rows() -> Iterator[Row]:
    for op, sizes in SIZES.items():
        for size in sizes:
            for name in ("triton", "torch"):
                yield from _both(op, size, name, ())
            for cut in SWEEP:
                yield from _both(op, size, f"triton[{','.join(map(str, cut))}]", cut)


def _both(op: str, size: tuple[int, int, int], name: str, cut: tuple[int, ...]) -> Iterator[Row]:
    make = partial(_call, op, size, name, cut)
    b, s, n = size
    for direction, maker, moved in zip(("forward", "backward"), (forward, backward), PASSES[op], strict=True):
        yield Row(
            op=op,
            shape=f"b={b} s={s} n={n}",
            name=name,
            direction=direction,
            make=partial(maker, make),
            bytes=float(moved * b * s * n * 2),
            headline="[" not in name,
        )


def _call(op: str, size: tuple[int, int, int], name: str, cut: tuple[int, ...]) -> Call:
    import torch

    from loong_core.references import modulation as reference
    from loong_ops.modulation import Config

    b, s, n = size
    module = importlib.import_module(f"loong_ops.{'gated_residual' if op == 'gated_residual' else 'modulation'}")
    function = getattr(reference if name == "torch" else module, op)
    if cut:
        function = partial(function, _config=Config(*cut))
    shapes = [(b, s, n), (b, s, n), (b, n)] if op == "gated_residual" else [(b, s, n), (b, n), (b, n)]
    leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    return partial(function, *leaves, *(() if op == "gated_residual" else (1e-6,))), leaves
