"""Cases of the op `rms_norm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loong_core.testing.cases.case import OpCase, Tensors


def define_rms_norm(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dim."""
    x, weight = tensors["x"], tensors["weight"]
    mean = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return x / torch.sqrt(mean + others["epsilon"]) * weight


def _rms_norm(name: str, shape: tuple[int, ...], spread: float = 1.0) -> OpCase:
    return OpCase(
        name=name,
        tensors={"x": shape, "weight": shape[-1:]},
        others={"epsilon": 1e-6},
        positional=("epsilon",),
        define=define_rms_norm,
        spread=spread,
    )


CASES = (
    _rms_norm("one_row", (1, 7)),
    _rms_norm("odd", (3, 2, 33)),
    _rms_norm("wide", (2, 257)),
    _rms_norm("narrow", (5, 3, 2)),
    _rms_norm("tiny_values", (4, 12), spread=1e-3),
    _rms_norm("large_values", (4, 12), spread=1e3),
    _rms_norm("heads", (3, 2, 5, 16)),
)
