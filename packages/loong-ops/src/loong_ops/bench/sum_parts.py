"""What adding up the parts of a reduce-scatter takes, beside torch's reduction."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from loong_ops.bench.row import Row, Thunk

RANKS, TOKENS, HIDDEN = 4, 32768, 2048
"""Ranks that send, tokens of one of them, and what a token is."""


def rows() -> list[Row]:
    """Ours and the reference."""
    return list(_rows())


def _rows() -> Iterator[Row]:
    for name in ("triton", "torch"):
        yield Row(
            op="sum_parts",
            shape=f"r={RANKS} t={TOKENS} n={HIDDEN}",
            name=name,
            direction="forward",
            make=partial(_make, name),
            bytes=2.0 * (RANKS + 1) * TOKENS * HIDDEN,
        )


def _make(name: str) -> Thunk:
    import torch

    from loong_core.references import sum_parts as reference
    from loong_ops import sum_parts as module

    parts = torch.randn(RANKS, TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    return partial((module if name == "triton" else reference).sum_parts, parts, torch.empty_like(parts[0]))
