"""The gated GELU of Pi0.5's prefix and of its action expert, beside plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from loong_ops.bench.passes import Call, backward, forward
from loong_ops.bench.row import Row

SIZES = [(8064, 16384), (18432, 16384), (700, 4096)]
"""Rows, results of a row: batch 14 and 32 without padding, and the expert."""

SWEEP = [(1, 1024, 8), (1, 2048, 4), (1, 2048, 8), (2, 512, 4)]
"""Rows, columns, warps."""


def rows() -> list[Row]:
    """Both passes of ours and of torch; other cuts of ours at each size."""
    return list(_rows())


def _rows() -> Iterator[Row]:
    for t, f in SIZES:
        for name in ("triton", "torch"):
            yield from _both(t, f, name, ())
        for cut in SWEEP:
            yield from _both(t, f, f"triton[{cut[0]}x{cut[1]},w{cut[2]}]", cut)


def _both(t: int, f: int, name: str, cut: tuple[int, ...]) -> Iterator[Row]:
    make = partial(_call, name, t, f, cut)
    for direction, maker, moved in (("forward", forward, 3), ("backward", backward, 5)):
        yield Row(
            op="geglu",
            shape=f"t={t} f={f}",
            name=name,
            direction=direction,
            make=partial(maker, make),
            bytes=float(moved * t * f * 2),
            headline="[" not in name,
        )


def _call(name: str, t: int, f: int, cut: tuple[int, ...]) -> Call:
    import torch

    from loong_core.references import activation
    from loong_ops.geglu import geglu
    from loong_ops.swiglu import Config

    ours: Callable[..., Any] = partial(geglu, _config=Config(*cut)) if cut else geglu
    x = torch.randn(t, 2 * f, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return partial(activation.geglu if name == "torch" else ours, x), [x]
