"""Cases of the op `swiglu`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loong_core.testing.cases.case import OpCase, Tensors


def define_swiglu(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """gate / (1 + exp(-gate)) * value, gate the first half of the last dim and value the second."""
    half = tensors["x"].shape[-1] // 2
    gate, value = tensors["x"][..., :half], tensors["x"][..., half:]
    return gate / (1 + torch.exp(-gate)) * value


def _swiglu(name: str, shape: tuple[int, ...], spread: float = 1.0) -> OpCase:
    return OpCase(name=name, tensors={"x": shape}, define=define_swiglu, spread=spread)


CASES = (
    _swiglu("one_element", (1, 2)),
    _swiglu("odd", (3, 2, 66)),
    _swiglu("wide", (2, 514)),
    _swiglu("narrow", (37, 6)),
    _swiglu("saturated", (4, 24), spread=30.0),
    _swiglu("one_dim", (14,)),
    _swiglu("no_rows", (0, 8)),
)
