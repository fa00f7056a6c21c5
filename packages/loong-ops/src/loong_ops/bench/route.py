"""The router of Qwen3-30B-A3B after its product, on float32 logits as the model has them and on bfloat16 ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from loong_ops.bench.passes import Call, backward, forward
from loong_ops.bench.row import Row, Thunk

SIZES = [(32768, 128, 8, "float32"), (8192, 128, 8, "float32"), (32768, 128, 8, "bfloat16"), (32768, 512, 8, "float32")]
"""Tokens, experts, experts of a token, dtype of the logits."""

SWEEP = [
    (4, 4, 132 * 4),
    (4, 4, 132 * 12),
    (4, 4, 132 * 16),
    (8, 4, 132 * 6),
    (2, 2, 132 * 16),
    (1, 1, 132 * 32),
    (8, 8, 132 * 4),
]
"""Tokens, warps, programs."""


def rows() -> list[Row]:
    """Both passes of ours and of plain torch; other cuts of ours at the first size."""
    return list(_rows())


def _rows() -> Iterator[Row]:
    for size in SIZES:
        for name in ("triton", "torch"):
            yield from _both(size, name, ())
    for cut in SWEEP:
        yield from _both(SIZES[0], f"triton[t{cut[0]},w{cut[1]},p{cut[2]}]", cut)


def _both(size: tuple[int, int, int, str], name: str, cut: tuple[int, ...]) -> Iterator[Row]:
    t, e, k, dtype = size
    make = partial(_call, name, size, cut)
    logits, chosen = t * e * (4 if dtype == "float32" else 2), t * k * 4
    yield _row(size, name, "forward", partial(forward, make), logits + 2 * chosen)
    yield _row(size, name, "backward", partial(backward, make), 2 * logits + 2 * chosen)


def _row(size: tuple[int, int, int, str], name: str, direction: str, make: Callable[[], Thunk], moved: int) -> Row:
    t, e, k, dtype = size
    shape = f"t={t} e={e} k={k} {dtype}"
    headline = "[" not in name
    return Row(
        op="route", shape=shape, name=name, direction=direction, make=make, bytes=float(moved), headline=headline
    )


def _call(name: str, size: tuple[int, int, int, str], cut: tuple[int, ...]) -> Call:
    import torch

    from loong_core.references import routing
    from loong_ops.route import Config, route

    t, e, k, dtype = size
    logits = torch.randn(t, e, device="cuda", dtype=getattr(torch, dtype), requires_grad=True)
    ours: Callable[..., Any] = partial(route, _config=Config(*cut)) if cut else route
    function: Callable[..., Any] = routing.route if name == "torch" else ours
    return partial(function, logits, k, normalise=True), [logits]
