"""Cases of the op `attention`.

Shape legend: s query rows, t key rows, b batch, h query heads, g key-value heads, d and e head sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loong_core.testing.cases.case import OpCase, Tensors


def define_attention(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """One softmax per sample, head and query row over exactly the keys that row may see; padding rows give zeros."""
    query, key, value = tensors["query"], tensors["key"], tensors["value"]
    (s, batch, heads, _), (t, _, groups, _) = query.shape, key.shape
    query_rows, key_rows = others.get("rows") or (torch.arange(s), torch.arange(t))
    query_samples, key_samples = others.get("segments") or (torch.zeros(batch, s), torch.zeros(batch, t))
    rows = []
    for i in range(s):
        parts = []
        for j in range(batch):
            seen = (key_rows <= query_rows[i]) & (key_samples[j] == query_samples[j, i])
            for head in range(heads):
                group = head // (heads // groups)
                scores = key[seen, j, group] @ query[i, j, head] * others["scale"]
                part = torch.softmax(scores, 0) @ value[seen, j, group]
                parts.append(part * 0 if query_samples[j, i] == -1 else part)
        rows.append(torch.stack(parts).reshape(batch, -1))
    return torch.stack(rows)


def _attention(name: str, s: int, b: int, h: int, g: int, d: int, e: int | None = None, **others: Any) -> OpCase:
    t = len(others["rows"][1]) if "rows" in others else s
    return OpCase(
        name=name,
        tensors={"query": (s, b, h, d), "key": (t, b, g, d), "value": (t, b, g, e or d)},
        others={"scale": 1 / math.sqrt(d), **others},
        define=define_attention,
    )


_PACKED = torch.tensor([[0, 0, 1, 1, 1, 2, -1], [4, 4, 4, 4, 4, -1, -1]])
_ZIGZAG = (torch.tensor([2, 3, 4, 5]), torch.tensor([0, 1, 6, 7, 2, 3, 4, 5]))
_ROW = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1]])

CASES = (
    _attention("one_row", 1, 1, 1, 1, 8),
    _attention("odd", 7, 2, 3, 3, 10),
    _attention("grouped", 5, 2, 6, 2, 8),
    _attention("one_key_head", 9, 1, 3, 1, 16),
    _attention("narrow_values", 6, 1, 4, 2, 8, 4),
    _attention("packed", 7, 2, 4, 2, 8, segments=(_PACKED, _PACKED)),
    _attention("context_parallel", 4, 2, 4, 2, 8, rows=_ZIGZAG),
    _attention(
        "packed_context_parallel",
        4,
        1,
        2,
        1,
        8,
        rows=_ZIGZAG,
        segments=(_ROW[:, _ZIGZAG[0]], _ROW[:, _ZIGZAG[1]]),
    ),
)
