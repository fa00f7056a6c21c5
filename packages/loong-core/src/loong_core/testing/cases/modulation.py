"""Cases of the ops `ada_rms_norm`, `residual_ada_rms_norm`, `layer_norm_modulate` and `gated_residual`.

Shape legend: b, s, n as there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loong_core.testing.cases.case import OpCase, Result, Tensors, handing_through

Define = Callable[[Tensors, Mapping[str, Any]], Result]


def define_ada_rms_norm(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * (1 + scale) + shift over the last dim."""
    return _normed(tensors["x"], tensors, others)


def define_layer_norm_modulate(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """As `define_ada_rms_norm`, of x less its mean."""
    x = tensors["x"]
    return _normed(x - x.sum(-1, keepdim=True) / x.shape[-1], tensors, others)


def _normed(x: Tensor, tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    mean = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    normal = x / torch.sqrt(mean + others["epsilon"]) * (1 + tensors["scale"].unsqueeze(1))
    return normal + tensors["shift"].unsqueeze(1) if "shift" in tensors else normal


def define_gated_residual(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """residual + gate * x."""
    return tensors["residual"] + tensors["gate"].unsqueeze(1) * tensors["x"]


def _norm(define: Define, name: str, b: int, s: int, n: int, spread: float = 1.0, shifted: bool = True) -> OpCase:
    tensors: dict[str, tuple[int, ...]] = {"x": (b, s, n), "scale": (b, n)}
    if shifted:
        tensors["shift"] = (b, n)
    others: dict[str, Any] = {"epsilon": 1e-6, **({} if shifted else {"shift": None})}
    positional = ("epsilon",) if shifted else ("shift", "epsilon")
    return OpCase(name=name, tensors=tensors, others=others, positional=positional, define=define, spread=spread)


def _norms(define: Define) -> tuple[OpCase, ...]:
    return (
        _norm(define, "one_row", 1, 1, 7),
        _norm(define, "odd", 3, 5, 33),
        _norm(define, "wide", 2, 3, 257),
        _norm(define, "narrow", 2, 7, 5),
        _norm(define, "many_rows", 2, 37, 16),
        _norm(define, "many_samples", 19, 2, 12),
        _norm(define, "small_values", 2, 3, 12, spread=1e-2),
        _norm(define, "large_values", 2, 3, 12, spread=30.0),
        _norm(define, "without_shift", 2, 9, 24, shifted=False),
        _norm(define, "no_rows", 2, 0, 8),
        _norm(define, "no_samples", 0, 3, 8),
    )


def _gated(name: str, b: int, s: int, n: int) -> OpCase:
    tensors = {"residual": (b, s, n), "x": (b, s, n), "gate": (b, n)}
    return OpCase(name=name, tensors=tensors, define=define_gated_residual)


ADA_RMS_NORM = _norms(define_ada_rms_norm)
RESIDUAL_ADA_RMS_NORM = _norms(handing_through(define_ada_rms_norm))
LAYER_NORM_MODULATE = _norms(define_layer_norm_modulate)
GATED_RESIDUAL = (
    _gated("one_element", 1, 1, 1),
    _gated("odd", 3, 5, 33),
    _gated("wide", 2, 3, 257),
    _gated("many_rows", 2, 37, 16),
    _gated("many_samples", 19, 2, 12),
    _gated("no_rows", 2, 0, 8),
    _gated("no_samples", 0, 3, 8),
)
