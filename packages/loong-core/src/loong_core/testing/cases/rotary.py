"""Cases of the op `rotary_qkv`.

Shape legend: s rows, b batch, h query heads, g key-value heads, d head size, r rotated part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loong_core.testing.cases.case import OpCase, Tensors


def define_rotary_qkv(tensors: Tensors, others: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Each head over its root mean square, times its weights, as complex numbers turned by exp(i * angle)."""
    both = {**others, **tensors}
    mixed, angles = both["mixed"], both["angles"].double()
    s, b, g, width, d = mixed.shape
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    for group in range(g):
        for index in range(width - 1):
            head = mixed[:, :, group, index]
            weight = both["query_norm"] if index < width - 2 else both["key_norm"]
            if weight is not None:
                head = head / torch.sqrt((head * head).sum(-1, keepdim=True) / d + others["epsilon"]) * weight
            (queries if index < width - 2 else keys).append(_turned(head, angles[:, :, 0]))
    return torch.stack(queries, 2), torch.stack(keys, 2), mixed[:, :, :, -1]


def _turned(head: Tensor, angles: Tensor) -> Tensor:
    """Elements (i, i + r/2) of head [s,b,d] as one complex number, times exp(i * angles [s,b,r])."""
    half = angles.shape[-1] // 2
    number = torch.complex(head[..., :half], head[..., half : 2 * half]) * torch.exp(1j * angles[..., :half])
    return torch.cat((number.real, number.imag, head[..., 2 * half :]), dim=-1)


def _rotary(
    name: str, s: int, b: int, h: int, g: int, d: int, r: int | None = None, norms: str = "", spread: float = 1.0
) -> OpCase:
    """`norms` names whose heads are normed: "query", "key", or both."""
    half = (r or d) // 2
    frequencies = 1000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    positions = torch.arange(s * b).reshape(s, b, 1, 1) * 37 % 4099
    angles = (positions * frequencies).float().repeat(1, 1, 1, 2)
    weights = {"query_norm": "query" in norms, "key_norm": "key" in norms}
    return OpCase(
        name=name,
        tensors={"mixed": (s, b, g, h // g + 2, d), **{name: (d,) for name, used in weights.items() if used}},
        others={"angles": angles, "epsilon": 1e-6, **{name: None for name, used in weights.items() if not used}},
        positional=("angles", "query_norm", "key_norm", "epsilon"),
        define=define_rotary_qkv,
        spread=spread,
    )


CASES = (
    _rotary("one_row", 1, 1, 1, 1, 2, norms="query key"),
    _rotary("plain", 2, 2, 4, 2, 8),
    _rotary("normed", 2, 2, 4, 2, 16, norms="query key"),
    _rotary("only_queries_normed", 2, 1, 6, 2, 8, norms="query"),
    _rotary("only_keys_normed", 2, 1, 6, 2, 8, norms="key"),
    _rotary("odd_head", 3, 1, 3, 1, 10, norms="query key"),
    _rotary("equal_heads", 3, 2, 5, 5, 12),
    _rotary("equal_heads_normed", 2, 2, 3, 3, 8, norms="query key"),
    _rotary("equal_heads_partly_rotated", 3, 1, 2, 2, 20, 6),
    _rotary("partly_rotated", 2, 1, 6, 3, 20, 6, norms="query key"),
    _rotary("head_of_96", 3, 1, 5, 1, 96, 48, norms="query key"),
    _rotary("many_rows", 7, 1, 1, 1, 4, norms="query key"),
    _rotary("tiny_values", 2, 1, 4, 2, 12, norms="query key", spread=1e-3),
    _rotary("no_rows", 0, 2, 4, 2, 8, norms="query key"),
)
