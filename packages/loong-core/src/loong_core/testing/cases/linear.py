"""Cases of the ops `linear` and `linear_gelu`. Shape legend: n inputs, m outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loong_core.testing.cases.case import OpCase, Tensors


def define_linear(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """For every output the sum of inputs times its row of the weight, plus its bias where there are biases."""
    product = (tensors["x"].unsqueeze(-2) * tensors["weight"]).sum(-1)
    return product + tensors["bias"] if "bias" in tensors else product


def define_linear_gelu(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """`x / 2 * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))` of that."""
    x = define_linear(tensors, others)
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _linear(name: str, leading: tuple[int, ...], n: int, m: int, *, bias: bool = False) -> OpCase:
    tensors: dict[str, tuple[int, ...]] = {"x": (*leading, n), "weight": (m, n)}
    return OpCase(
        name=name,
        tensors=tensors | {"bias": (m,)} if bias else tensors,
        others={} if bias else {"bias": None},
        positional=("bias",),
        define=define_linear,
        spread=0.5,
    )


CASES = (
    _linear("one_element", (1,), 1, 1),
    _linear("odd", (7,), 19, 13),
    _linear("odd_biases", (5,), 9, 11, bias=True),
    _linear("even", (16,), 32, 24),
    _linear("biases", (10,), 24, 40, bias=True),
    _linear("even_inputs_only", (6,), 16, 7),
    _linear("even_outputs_only", (6,), 7, 16, bias=True),
    _linear("many_dims", (3, 2, 5), 16, 8, bias=True),
    _linear("one_dim", (), 16, 24),
    _linear("several_tiles", (140,), 72, 264, bias=True),
    _linear("no_rows", (0, 3), 16, 8, bias=True),
)

GELU = tuple(replace(case, define=define_linear_gelu) for case in CASES if "bias" in case.tensors)
