"""Cases of the op `gated_mlp`. Shape legend: n inputs, f inner size, m outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loong_core.testing.cases.case import OpCase, Tensors


def define_gated_mlp(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """down @ (gate / (1 + exp(-gate)) * value), where up @ x holds the f gates before the f values; with `gelu` down @
    (gate / 2 * (1 + tanh(sqrt(2 / pi) (gate + 0.044715 gate^3))) * value)."""
    f = tensors["down"].shape[1]
    both = tensors["x"] @ tensors["up"].t()
    gate, value = both[..., :f], both[..., f:]
    if others.get("activation") == "gelu":
        active = gate / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    else:
        active = gate / (1 + torch.exp(-gate))
    return (active * value) @ tensors["down"].t()


def _mlp(
    name: str, leading: tuple[int, ...], n: int, f: int, m: int, spread: float = 0.5, activation: str | None = None
) -> OpCase:
    tensors = {"x": (*leading, n), "up": (2 * f, n), "down": (m, f)}
    others = {} if activation is None else {"activation": activation}
    return OpCase(name=name, tensors=tensors, others=others, define=define_gated_mlp, spread=spread)


CASES = (
    _mlp("one_element", (1,), 1, 1, 1),
    _mlp("odd", (7,), 19, 13, 19),
    _mlp("even", (12,), 16, 24, 16),
    _mlp("even_but_inside", (6,), 16, 12, 16),
    _mlp("other_outputs", (9,), 32, 8, 24),
    _mlp("many_dims", (3, 2, 5), 16, 24, 16),
    _mlp("one_dim", (), 16, 8, 16),
    _mlp("saturated", (5,), 16, 16, 8, spread=2.0),
    _mlp("several_tiles", (140,), 40, 136, 40),
    _mlp("gelu_odd", (7,), 19, 13, 19, activation="gelu"),
    _mlp("gelu_even", (12,), 16, 24, 16, activation="gelu"),
    _mlp("gelu_saturated", (5,), 16, 16, 8, spread=2.0, activation="gelu"),
    _mlp("gelu_several_tiles", (140,), 40, 136, 40, activation="gelu"),
    _mlp("named_silu", (9,), 16, 24, 16, activation="silu"),
    _mlp("no_rows", (0, 3), 16, 24, 16),
)
