"""The norms between the layers of Qwen3-30B-A3B and Qwen3-8B."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from loong_ops.bench.passes import Call, backward, forward
from loong_ops.bench.row import Missing, Row, Thunk

SIZES = [(32768, 2048), (32768, 4096), (8192, 2048)]
"""Rows, numbers of a row."""

SWEEP = [
    (2, 4, 2, 4, 132 * 6, 1),
    (4, 4, 1, 4, 132 * 6, 2),
    (1, 2, 1, 4, 132 * 6, 3),
    (2, 8, 1, 8, 132 * 3, 1),
    (1, 8, 1, 8, 132 * 3, 2),
    (4, 8, 1, 4, 132 * 12, 1),
    (1, 1, 1, 2, 132 * 8, 1),
]
"""Rows and warps forward; rows, warps, programs and stages backward."""


def rows() -> list[Row]:
    """Both passes of ours and of the others; other cuts of ours at the first two sizes."""
    return list(_rows())


def _rows() -> Iterator[Row]:
    for size in SIZES:
        for name in ("triton", "torch", "transformer_engine"):
            yield from _both(size, name, ())
    for size in SIZES[:2]:
        for cut in SWEEP:
            yield from _both(size, f"triton[{','.join(map(str, cut))}]", cut)


def _both(size: tuple[int, int], name: str, cut: tuple[int, ...]) -> Iterator[Row]:
    if name == "transformer_engine":
        makers = [partial(_transformer_engine, direction, *size) for direction in ("forward", "backward")]
    else:
        make = partial(_call, name, *size, cut)
        makers = [partial(forward, make), partial(backward, make)]
    # Forward x -> y; backward x, dy -> dx.
    for direction, maker, tensors in zip(("forward", "backward"), makers, (2, 3), strict=True):
        yield _row(size, name, direction, maker, tensors * size[0] * size[1] * 2)


def _row(size: tuple[int, int], name: str, direction: str, make: Callable[[], Thunk], moved: int) -> Row:
    return Row(
        op="rms_norm",
        shape=f"t={size[0]} n={size[1]}",
        name=name,
        direction=direction,
        make=make,
        bytes=float(moved),
        headline="[" not in name,
    )


def _call(name: str, t: int, n: int, cut: tuple[int, ...]) -> Call:
    import torch

    from loong_core.references import norm
    from loong_ops.rms_norm import Config, rms_norm

    x = torch.randn(t, n, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(n, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ours: Callable[..., Any] = partial(rms_norm, _config=Config(*cut) if cut else None)
    return partial(norm.rms_norm if name == "torch" else ours, x, weight, 1e-6), [x, weight]


def _transformer_engine(direction: str, t: int, n: int) -> Thunk:
    """Its kernels without its autograd, whose backward frees what a second one would need."""
    import torch

    try:
        dtypes = importlib.import_module("transformer_engine.pytorch.constants").TE_DType
        kernels = importlib.import_module("transformer_engine_torch")
    except ImportError as error:
        raise Missing(f"Transformer Engine: {error}") from error
    x, upstream = (torch.randn(t, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.ones(n, device="cuda", dtype=torch.bfloat16)
    norm = partial(kernels.rmsnorm_fwd, x, weight, 1e-6, None, None, dtypes[torch.bfloat16], 0, False)
    return norm if direction == "forward" else partial(kernels.rmsnorm_bwd, upstream, x, norm()[2], weight, 0, False)
