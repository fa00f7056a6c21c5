"""What the norm of gradients takes, of one range of memory, beside what other libraries have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from loong_ops.bench.row import Missing, Row, Thunk

COUNT = 128 * 2 * 768 * 2048
"""Elements: a layer's 128 up-projections."""

SWEEP = [(2048, 8, 4), (2048, 32, 8), (4096, 8, 8), (4096, 32, 8), (8192, 8, 8)]
"""Elements that a program reads at a time, how often, and its warps."""


def rows() -> list[Row]:
    """Ours, the reference and Transformer Engine; then our cuts."""
    return list(_rows())


def _rows() -> Iterator[Row]:
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        for name in ("triton", "torch"):
            yield _row(dtype, name, partial(_ours, name, dtype, ()), size)
        for cut in SWEEP:
            yield _row(dtype, f"triton[{cut[0]}x{cut[1]},w{cut[2]}]", partial(_ours, "triton", dtype, cut), size, False)
    yield _row("float32", "transformer_engine", _transformer_engine, 4)


def _row(dtype: str, name: str, make: Callable[[], Thunk], size: int, headline: bool = True) -> Row:
    return Row(
        op="sum_of_squares",
        shape=f"n={COUNT} {dtype}",
        name=name,
        direction="forward",
        make=make,
        bytes=float(size * COUNT),
        headline=headline,
    )


def _ours(name: str, dtype: str, cut: tuple[int, ...]) -> Thunk:
    import torch

    from loong_core.references import sum_of_squares as reference
    from loong_ops import sum_of_squares as module

    gradient = torch.randn(COUNT, device="cuda", dtype=getattr(torch, dtype))
    if name == "torch":
        return partial(reference.sum_of_squares, [gradient], "cuda")
    config = dict(zip(("BLOCK", "STEPS", "num_warps"), cut, strict=True)) if cut else None
    return partial(module.sum_of_squares, [gradient], "cuda", _config=config)


def _transformer_engine() -> Thunk:
    import torch

    try:
        from transformer_engine.pytorch.optimizers import multi_tensor_applier, multi_tensor_l2norm
    except ImportError as error:
        raise Missing(f"Transformer Engine: {error}") from error
    gradient = torch.randn(COUNT, device="cuda")
    overflow = torch.zeros(1, device="cuda", dtype=torch.int)
    return partial(multi_tensor_applier, multi_tensor_l2norm, overflow, [[gradient]], False)
