"""Ops of the example chip: a norm whose gradient is written out, as a kernel's would be."""

from __future__ import annotations

from typing import Any

from loong_core import OpRequest


def supports(request: OpRequest) -> str | None:
    """The chip knows two formats. Called in the parent process too, so no tensor library is imported here."""
    if request.dtype not in ("float32", "bfloat16"):
        return f"the chip computes in float32 and bfloat16, not in {request.dtype}"
    return None


def rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    """[..., n], [n] -> [..., n] in x's dtype; statistics in float32. Source: Zhang and Sennrich, 2019."""
    from loong_example_backend.kernels import RmsNorm

    return RmsNorm.apply(x, weight, epsilon)
