"""What this package offers; the only file with hook implementations."""

from __future__ import annotations

from collections.abc import Iterable

from loong_core import Backend, OpImpl, hookimpl


@hookimpl
def loong_backends() -> Iterable[Backend]:
    """The backend example_chip."""
    from loong_example_backend.device import BACKEND

    return [BACKEND]


@hookimpl
def loong_ops() -> Iterable[OpImpl]:
    """The chip's norm, which ranks above the reference (0)."""
    return [
        OpImpl(
            op="rms_norm",
            name="example_chip",
            target="loong_example_backend.ops:rms_norm",
            backends=frozenset({"example_chip"}),
            needs=frozenset({"row_blocks"}),
            supports="loong_example_backend.ops:supports",
            rank=10,
        )
    ]
