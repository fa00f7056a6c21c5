"""SwiGLU at the widths of Qwen3-8B's and of Qwen3-30B-A3B's experts, beside plain torch and Transformer Engine."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from loong_ops.bench.passes import Call, backward, forward
from loong_ops.bench.row import Missing, Row, Thunk

SIZES = [(32768, 12288), (8192, 12288), (262144, 768)]
"""Rows, results of a row."""

SWEEP = [(1, 1024, 8), (1, 2048, 4), (1, 2048, 8), (2, 512, 4), (4, 256, 4), (8, 256, 8), (1, 4096, 8)]
"""Rows, columns, warps."""


def rows() -> list[Row]:
    """Both passes of ours and of the others; other cuts of ours at each size."""
    return list(_rows())


def _rows() -> Iterator[Row]:
    for t, f in SIZES:
        for name in ("triton", "torch", "transformer_engine"):
            yield from _both(t, f, name, ())
        for cut in SWEEP:
            yield from _both(t, f, f"triton[{cut[0]}x{cut[1]},w{cut[2]}]", cut)


def _both(t: int, f: int, name: str, cut: tuple[int, ...]) -> Iterator[Row]:
    if name == "transformer_engine":
        makers = [partial(_transformer_engine, direction, t, f) for direction in ("forward", "backward")]
    else:
        make = partial(_call, name, t, f, cut)
        makers = [partial(forward, make), partial(backward, make)]
    yield _row(t, f, name, "forward", makers[0], 3 * t * f * 2)
    yield _row(t, f, name, "backward", makers[1], 5 * t * f * 2)


def _row(t: int, f: int, name: str, direction: str, make: Callable[[], Thunk], moved: int) -> Row:
    headline = "[" not in name
    return Row(
        op="swiglu",
        shape=f"t={t} f={f}",
        name=name,
        direction=direction,
        make=make,
        bytes=float(moved),
        headline=headline,
    )


def _call(name: str, t: int, f: int, cut: tuple[int, ...]) -> Call:
    import torch

    from loong_core.references import activation
    from loong_ops.swiglu import Config, swiglu

    ours: Callable[..., Any] = partial(swiglu, _config=Config(*cut)) if cut else swiglu
    x = torch.randn(t, 2 * f, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return partial(activation.swiglu if name == "torch" else ours, x), [x]


def _transformer_engine(direction: str, t: int, f: int) -> Thunk:
    """Its kernels without its autograd, whose backward frees what a second one would need."""
    import torch

    try:
        importlib.import_module("transformer_engine.pytorch")  # loads the library that the next one needs
        kernels = importlib.import_module("transformer_engine_torch")
    except ImportError as error:
        raise Missing(f"Transformer Engine: {error}") from error
    x = torch.randn(t, 2 * f, device="cuda", dtype=torch.bfloat16)
    if direction == "forward":
        return partial(kernels.swiglu, x, None)
    return partial(kernels.dswiglu, torch.randn(t, f, device="cuda", dtype=torch.bfloat16), x, None)
