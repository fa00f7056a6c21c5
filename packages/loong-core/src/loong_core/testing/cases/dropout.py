"""Cases of the op `dropout_add` that draw nothing: at rate 0. `loong_core.testing.dropout` has the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loong_core.testing.cases.case import OpCase, Tensors


def define_dropout_add(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """residual + x."""
    return tensors["residual"] + tensors["x"]


def _case(name: str, *shape: int) -> OpCase:
    return OpCase(
        name=name,
        tensors={"x": shape, "residual": shape},
        others={"rate": 0.0},
        positional=("rate",),
        define=define_dropout_add,
    )


CASES = (_case("one_element", 1), _case("odd", 3, 5, 33), _case("scalar"), _case("no_rows", 2, 0, 8))
