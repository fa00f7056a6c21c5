"""What loong-ops offers; the only file of the package with hook implementations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from loong_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from loong_core.types import OpImpl


@hookimpl
def loong_ops() -> Iterable[OpImpl]:
    """Triton kernels for every op that has one, on CUDA devices (and under Triton's interpreter, for tests)."""
    from loong_core.types import OpImpl

    return [
        OpImpl(
            op=op,
            name="triton",
            target=f"loong_ops.{module}:{op}",
            backends=frozenset({"cuda", "cpu"}),
            supports="loong_ops.support:triton",
            rank=20,
        )
        for op, module in TRITON.items()
    ]


TRITON: dict[str, str] = {}
"""Op -> the module of its Triton implementation; the function is named after the op."""
