"""Cases of the op `ragged_attention`.

Shape legend: q query rows, k key rows, h query heads, g key-value heads, d head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loong_core.testing.cases.case import OpCase, Tensors


def define_ragged_attention(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """One softmax per head and query row, over all key rows; those of other sequences weigh nothing."""
    query, key, value = tensors["query"], tensors["key"], tensors["value"]
    repeats = query.shape[1] // key.shape[1]
    keys, values = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    mine, theirs = (_owners(others[name]) for name in ("query_offsets", "key_offsets"))
    scores = torch.einsum("qhd,khd->hqk", query, keys) / query.shape[2] ** 0.5
    weights = torch.softmax(scores.masked_fill(mine[:, None] != theirs, -torch.inf), dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)


def _owners(offsets: Tensor) -> Tensor:
    """Row -> the sequence that it belongs to."""
    return torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff().long())


def ragged_case(
    name: str, queries: Sequence[int], keys: Sequence[int], h: int, g: int, d: int, slack: int = 0
) -> OpCase:
    """Sequences of so many queries and so many keys each; the bounds are `slack` above the longest."""
    offsets = [torch.tensor([0, *itertools.accumulate(part)], dtype=torch.int32) for part in (queries, keys)]
    rows, seen = sum(queries), sum(keys)
    return OpCase(
        name=name,
        tensors={"query": (rows, h, d), "key": (seen, g, d), "value": (seen, g, d)},
        others={
            "query_offsets": offsets[0],
            "key_offsets": offsets[1],
            "longest": (max(queries) + slack, max(keys) + slack),
        },
        positional=("query_offsets", "key_offsets", "longest"),
        define=define_ragged_attention,
    )


CASES = (
    ragged_case("one_row", [1], [1], 1, 1, 8),
    ragged_case("one_sequence", [7], [7], 3, 3, 16),
    ragged_case("odd", [1, 5, 2], [1, 5, 2], 2, 2, 72),
    ragged_case("grouped", [3, 4], [3, 4], 4, 2, 80),
    ragged_case("one_key_head", [5, 3], [9, 4], 8, 1, 256),
    ragged_case("more_queries_than_keys", [9, 2], [3, 1], 4, 2, 8),
    ragged_case("without_queries", [3, 0, 4, 0], [2, 1, 5, 1], 6, 2, 8),
    ragged_case("empty", [0, 3, 0, 0, 2], [0, 3, 0, 0, 2], 2, 1, 16),
    ragged_case("loose_bounds", [2, 3], [4, 1], 2, 1, 8, slack=90),
    ragged_case("no_queries_at_all", [0, 0], [3, 2], 2, 1, 8),
    ragged_case("no_rows_at_all", [0, 0], [0, 0], 2, 1, 8),
)

LARGE = (
    ragged_case("one_row_of_64", [1], [1], 2, 2, 64),
    ragged_case("heads_of_72", [1, 131, 66], [1, 131, 66], 2, 2, 72),
    ragged_case("grouped_heads_of_80", [65, 129, 2], [65, 129, 2], 4, 2, 80),
    ragged_case("heads_of_16", [131, 5], [131, 5], 2, 2, 16),
    ragged_case("grouped_heads_of_128", [161, 79, 80], [33, 200, 129], 4, 2, 128),
    ragged_case("one_key_head_of_256", [97, 1, 200], [97, 1, 200], 8, 1, 256),
    ragged_case("few_queries_of_256", [50, 50, 0, 50], [130, 81, 9, 201], 8, 1, 256),
    ragged_case("empty_of_256", [0, 97, 0, 3, 0], [0, 97, 0, 3, 0], 8, 1, 256),
    ragged_case("keys_alone_of_256", [0, 70, 0], [49, 70, 100], 8, 1, 256, slack=58),
    ragged_case("equal_heads_of_256", [70, 0, 65], [50, 7, 97], 2, 2, 256),
)
"""Sequences of several tiles, for kernels on devices."""
