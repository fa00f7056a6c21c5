"""What the towers and the action head of GR00T share: attention over whole sequences, norms and MLPs with biases.

Parameters are registered from outside, by role (`loong_vla.groot.build`); the annotations say which ones a block has.
Heads stay where products put them, behind the rows: attention kernels read them there, and write likewise, so nothing
is copied. Shape legend: b batch, s rows, k keys, n width, h heads, d head size.
"""

from __future__ import annotations

import torch.nn.functional as functional
from torch import Tensor, nn

from loong_core.ops import Ops


class Block(nn.Module):
    """A pre-norm block with self-attention in which every row sees every key: x [b,s,n] -> [b,s,n].

    `angles` [1,s,1,d] in radians rotate queries and keys; `keys` [b,s] says which rows may be seen (None: all). With
    `dropout`, both branches are dropped as in diffusers' blocks: attention's output twice, the MLP inside and at its
    end.
    """

    norm1: Tensor
    norm1_bias: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    out_bias: Tensor
    norm2: Tensor
    norm2_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor

    def __init__(self, ops: Ops, heads: int, epsilon: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.epsilon, self.dropout, self.ops = heads, epsilon, dropout, ops

    def forward(self, x: Tensor, angles: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        linear, rate = self.ops.linear, self.dropout if self.training else 0.0
        normal, x = self.ops.residual_layer_norm(x, self.norm1, self.norm1_bias, self.epsilon)
        mixed = linear(normal, self.qkv, self.qkv_bias)
        parts = split(mixed, 3, self.heads)
        if angles is None:
            query, key, value = parts.unbind(2)
        else:  # the op's rows are our samples: each head is a group of one query, key and value
            query, key, value = self.ops.rotary_qkv(parts.transpose(2, 3), angles, None, None, 0.0)
        seen = attend(query, key, value, keys)
        x = self.ops.dropout_add(linear(seen, self.out, self.out_bias), x, twice(rate))
        normal, x = self.ops.residual_layer_norm(x, self.norm2, self.norm2_bias, self.epsilon)
        inner = self.ops.linear_gelu(normal, self.up, self.up_bias, dropout=rate)
        return self.ops.dropout_add(linear(inner, self.down, self.down_bias), x, rate)


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """Layer norm over the last dim."""
    return functional.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


def split(mixed: Tensor, parts: int, heads: int) -> Tensor:
    """[b,s,parts*h*d] -> a view [b,s,parts,h,d]."""
    b, s, _ = mixed.shape
    return mixed.view(b, s, parts, heads, -1)


def attend(query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None) -> Tensor:
    """query [b,s,h,d], key and value [b,k,h,d], keys [b,k] bool (None: all are seen) -> [b,s,h*d]."""
    mask = None if keys is None else keys[:, None, None, :]
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def twice(rate: float) -> float:
    """The rate of one dropout that does what two of `rate` in a row do."""
    return 1.0 - (1.0 - rate) ** 2
