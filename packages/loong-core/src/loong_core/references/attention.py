"""The reference of the op `attention`.

Shape legend: s query rows, t key rows, b batch, h query heads, g key-value heads, d and e head sizes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

PADDING = -1


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    dropout: float = 0.0,
    rows: tuple[Tensor, Tensor] | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal softmax attention: query [s,b,h,d], key [t,b,g,d], value [t,b,g,e] -> [s,b,h*e].

    Head i reads key-value head i // (h/g). `scale` multiplies the scores; `dropout` is the rate on probabilities.
    `rows` = (query rows [s], key rows [t]) are positions in the whole row under context parallelism: a query sees keys
    of rows up to its own. None: row i is position i of both. `segments` = ([b,s], [b,t]) are numbers of packed samples:
    a query sees its own sample only. -1 marks padding, whose output and gradients are exactly zero.
    """
    s, b, h, d = query.shape
    t, g = key.shape[0], key.shape[2]
    mask = _mask(s, t, rows, segments, query.device)
    # [s,b,h,d] -> [b*g, h/g, s, d]: the heads of a group share one expanded (not copied) key-value head.
    q = query.reshape(s, b, g, h // g, d).permute(1, 2, 3, 0, 4).flatten(0, 1)
    k, v = (part.permute(1, 2, 0, 3).flatten(0, 1).unsqueeze(1).expand(-1, h // g, -1, -1) for part in (key, value))
    if mask is not None and mask.shape[0] > 1:
        mask = mask.repeat_interleave(g, dim=0)
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale
    )
    out = out.unflatten(0, (b, g)).permute(3, 0, 1, 2, 4).reshape(s, b, -1)
    if segments is not None:
        out = out.masked_fill((segments[0] == PADDING).t().unsqueeze(-1), 0.0)
    return out


def _mask(
    s: int, t: int, rows: tuple[Tensor, Tensor] | None, segments: tuple[Tensor, Tensor] | None, device: torch.device
) -> Tensor | None:
    """Which scores count: bool [1 or b, 1, s, t]; None for plain causal. Padding sees padding, so no row is empty."""
    if rows is None and segments is None:
        return None
    q_rows, k_rows = (torch.arange(s), torch.arange(t)) if rows is None else rows
    mask = (k_rows.to(device)[None, :] <= q_rows.to(device)[:, None])[None]
    if segments is not None:
        mask = mask & (segments[0][:, :, None] == segments[1][:, None, :])
    return mask[:, None]
