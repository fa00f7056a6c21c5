"""Cases of the ops `rms_norm` and `layer_norm`, and of those that hand x through beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loong_core.testing.cases.case import OpCase, Result, Tensors, handing_through

Define = Callable[[Tensors, Mapping[str, Any]], Result]


def define_rms_norm(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dim."""
    x, weight = tensors["x"], tensors["weight"]
    mean = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return x / torch.sqrt(mean + others["epsilon"]) * weight


def define_layer_norm(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last dim."""
    centred = tensors["x"] - tensors["x"].sum(-1, keepdim=True) / tensors["x"].shape[-1]
    variance = (centred * centred).sum(-1, keepdim=True) / centred.shape[-1]
    normal = centred / torch.sqrt(variance + others["epsilon"])
    return normal * tensors.get("weight", 1.0) + tensors.get("bias", 0.0)


def _norm(define: Define, given: str, name: str, shape: tuple[int, ...], spread: float = 1.0) -> OpCase:
    """`given`: which of the op's weights there are, `weight`, `bias` or both; `-bias` is one that is None."""
    words = given.split()
    missing = [word[1:] for word in words if word[0] == "-"]
    return OpCase(
        name=name,
        tensors={"x": shape, **{word: shape[-1:] for word in words if word[0] != "-"}},
        others={"epsilon": 1e-6, **dict.fromkeys(missing)},
        positional=(*(word.lstrip("-") for word in words), "epsilon"),
        define=define,
        spread=spread,
    )


def _norms(define: Define, given: str) -> tuple[OpCase, ...]:
    return (
        _norm(define, given, "one_row", (1, 7)),
        _norm(define, given, "odd", (3, 2, 33)),
        _norm(define, given, "wide", (2, 257)),
        _norm(define, given, "wider", (4, 1152)),
        _norm(define, given, "many_rows", (37, 88)),
        _norm(define, given, "tiny_values", (4, 12), spread=1e-3),
        _norm(define, given, "large_values", (4, 12), spread=1e3),
        _norm(define, given, "heads", (3, 2, 5, 16)),
        _norm(define, given, "no_rows", (2, 0, 8)),
    )


def _rms_norms(define: Define) -> tuple[OpCase, ...]:
    return (*_norms(define, "weight"), _norm(define, "weight", "narrow", (5, 3, 2)))


def _layer_norms(define: Define) -> tuple[OpCase, ...]:
    return (
        *_norms(define, "weight bias"),
        _norm(define, "weight -bias", "without_bias", (5, 24)),
        _norm(define, "-weight bias", "without_weight", (5, 24)),
        _norm(define, "-weight -bias", "bare", (5, 24)),
    )


RMS_NORM = _rms_norms(define_rms_norm)
RESIDUAL_RMS_NORM = _rms_norms(handing_through(define_rms_norm))
LAYER_NORM = _layer_norms(define_layer_norm)
RESIDUAL_LAYER_NORM = _layer_norms(handing_through(define_layer_norm))
