"""Cases of the ops `swiglu` and `geglu`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loong_core.testing.cases.case import OpCase, Tensors


def define_swiglu(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """gate / (1 + exp(-gate)) * value, gate the first half of the last dim and value the second."""
    half = tensors["x"].shape[-1] // 2
    gate, value = tensors["x"][..., :half], tensors["x"][..., half:]
    return gate / (1 + torch.exp(-gate)) * value


def define_geglu(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """0.5 gate (1 + tanh(sqrt(2/pi) (gate + 0.044715 gate^3))) * value, gate the first half of the last dim."""
    half = tensors["x"].shape[-1] // 2
    gate, value = tensors["x"][..., :half], tensors["x"][..., half:]
    return 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * value


def _cases(define: Callable[[Tensors, Mapping[str, Any]], Tensor]) -> tuple[OpCase, ...]:
    def case(name: str, shape: tuple[int, ...], spread: float = 1.0) -> OpCase:
        return OpCase(name=name, tensors={"x": shape}, define=define, spread=spread)

    return (
        case("one_element", (1, 2)),
        case("odd", (3, 2, 66)),
        case("wide", (2, 514)),
        case("narrow", (37, 6)),
        case("saturated", (4, 24), spread=30.0),
        case("one_dim", (14,)),
        case("no_rows", (0, 8)),
    )


CASES = _cases(define_swiglu)
GEGLU = _cases(define_geglu)
