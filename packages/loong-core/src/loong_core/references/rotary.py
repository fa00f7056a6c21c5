"""The reference of the op `rotary_qkv`.

Shape legend: s rows, b batch, h query heads, g key-value heads, d head size, r rotated part of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loong_core.references.norm import rms_norm


def rotary_qkv(
    mixed: Tensor, angles: Tensor, query_norm: Tensor | None, key_norm: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values out of one projection: heads normed where asked for, then rotated.

    mixed [s,b,g,h/g+2,d]: of every key-value head its queries, then its key, then its value. angles [s,b,1,r] float32
    in radians, both halves equal. query_norm, key_norm [d] are weights of an RMS norm over each head, or None.
    Returns query [s,b,h,d], key [s,b,g,d], value [s,b,g,d]. Of each head the first r elements turn, in pairs
    (i, i + r/2). Source: RoFormer (arXiv 2104.09864), in the layout of GPT-NeoX.
    """
    s, b, g, width, d = mixed.shape
    query = mixed[:, :, :, :-2].reshape(s, b, g * (width - 2), d)
    key, value = mixed[:, :, :, -2], mixed[:, :, :, -1]
    if query_norm is not None:
        query = rms_norm(query, query_norm, epsilon)
    if key_norm is not None:
        key = rms_norm(key, key_norm, epsilon)
    return _rotated(query, angles), _rotated(key, angles), value.contiguous()


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Every head of x [s,b,n,d] turned by angles [s,b,1,r], in float32 (float64 stays), rounded once."""
    size = angles.shape[-1]
    wide = x.double() if x.dtype == torch.float64 else x.float()
    turned, rest = wide[..., :size], wide[..., size:]
    first, second = turned.chunk(2, dim=-1)
    opposite = torch.cat((-second, first), dim=-1)
    return torch.cat((turned * angles.cos() + opposite * angles.sin(), rest), dim=-1).to(x.dtype)
