"""Cases of the op `experts`.

Shape legend: t tokens, k experts chosen for each token, e experts held here, n hidden size, f size of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loong_core.testing.cases.case import OpCase, Tensors


def define_experts(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """For every token the sum over its choices of weight * down @ (silu(gate @ x) * (value @ x)), if held here."""
    hidden, up, down, weights = (tensors[name] for name in ("hidden", "up", "down", "weights"))
    f = down.shape[-1]
    rows = []
    for token, choices in enumerate(others["chosen"].tolist()):
        row = 0 * hidden[token]
        for slot, expert in enumerate(choices):
            held = expert - others["first"]
            if 0 <= held < len(up):
                both = up[held] @ hidden[token]
                row = row + weights[token, slot] * (down[held] @ (_silu(both[:f]) * both[f:]))
        rows.append(row)
    # A weight that no token uses has the gradient zero.
    return (torch.stack(rows) if rows else 0 * hidden) + 0 * (up.sum() + down.sum() + weights.sum())


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _experts(name: str, chosen: Any, e: int, n: int, f: int, first: int = 0, pairs: int | None = None) -> OpCase:
    wanted = torch.as_tensor(chosen)
    t, k = wanted.shape
    return OpCase(
        name=name,
        tensors={"hidden": (t, n), "up": (e, 2 * f, n), "down": (e, n, f), "weights": (t, k)},
        others={"chosen": wanted, "first": first, "pairs": pairs},
        define=define_experts,
        spread=0.5,
    )


def _spread_over(t: int, k: int, experts: list[int]) -> Tensor:
    """For t tokens k different ones of `experts`, in a fixed disorder."""
    places = torch.arange(t)[:, None] * 5 + torch.arange(k) * (1 + torch.arange(t)[:, None] % 2)
    return torch.tensor(experts)[places % len(experts)]


CASES = (
    _experts("one_token", [[1]], 2, 8, 8),
    _experts("one_expert", [[0]] * 5, 1, 16, 8),
    _experts("one_expert_takes_all", [[2, 0]] * 7, 3, 16, 8),
    _experts("even", _spread_over(12, 2, [0, 1, 2, 3]), 4, 32, 16),
    _experts("odd", _spread_over(7, 3, [0, 1, 2, 3, 4]), 5, 19, 7),
    _experts("empty_experts", _spread_over(9, 2, [1, 4, 6]), 8, 16, 24),
    _experts("one_choice", _spread_over(37, 1, [0, 1, 2]), 3, 24, 8),
    _experts("held_elsewhere", _spread_over(11, 3, [0, 2, 3, 4, 5, 7]), 2, 16, 8, first=3),
    _experts("held_elsewhere_counted", [[3, 0], [7, 4], [4, 3]], 2, 16, 8, first=3, pairs=4),
    _experts("none_held_here", [[0, 1], [1, 0], [0, 5]], 2, 16, 8, first=2),
    _experts("none_held_here_counted", [[0, 1], [1, 0]], 2, 16, 8, first=2, pairs=0),
    _experts("wide", _spread_over(5, 2, [0, 1]), 2, 70, 35),
)
