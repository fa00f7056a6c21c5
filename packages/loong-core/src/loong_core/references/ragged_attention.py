"""The reference of the op `ragged_attention`: attention without masks over sequences of different lengths that lie one
after the other in a tensor.

Shape legend: q query rows, k key rows, of all sequences; s sequences; h query heads, g key-value heads, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor


def ragged_attention(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor, longest: tuple[int, int]
) -> Tensor:
    """Every row of a sequence sees every row of it: query [q,h,d], key and value [k,g,d] -> [q,h*d].

    Sequence i holds query rows `query_offsets[i]` to `query_offsets[i+1]` and key rows likewise (int32 [s+1]). Every
    row belongs to one; a sequence may have no queries, or no rows at all. Head i reads key-value head i // (h/g).
    `longest` are bounds on the lengths, of queries and of keys. Scores are scaled by d^-0.5, the softmax is float32
    (float64 stays).

    Sequences are computed one after the other, which on a device waits for the offsets.
    """
    if len(query) == 0:
        return _sequence(query, key, value)
    parts = []
    ends = zip(query_offsets.tolist(), key_offsets.tolist(), strict=True)
    begin = next(ends)
    for end in ends:
        assert end[0] - begin[0] <= longest[0] and end[1] - begin[1] <= longest[1], "a sequence longer than its bound"
        if end[0] > begin[0]:
            rows, keys = slice(begin[0], end[0]), slice(begin[1], end[1])
            parts.append(_sequence(query[rows], key[keys], value[keys]))
        begin = end
    assert begin == (len(query), len(key)), "rows that belong to no sequence"
    return torch.cat(parts)


def _sequence(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One sequence. Without a mask the heads of a group are just more rows of queries: nothing is repeated."""
    rows, heads, size = query.shape
    groups = key.shape[1]
    folded = query.reshape(rows, groups, heads // groups, size).permute(1, 0, 2, 3).reshape(groups, -1, size)
    keys, values = (x.transpose(0, 1)[None] for x in (key, value))
    out = functional.scaled_dot_product_attention(folded[None], keys, values)[0]
    return out.reshape(groups, rows, heads // groups, size).permute(1, 0, 2, 3).reshape(rows, heads * size)
