"""The attention op by Transformer Engine's DotProductAttention: cuDNN or FlashAttention, packed rows as `thd`.

Importing this loads no tensor library: `supports` also answers in the parent process.

Shape legend: s query rows, t key rows, b batch, h query heads, g key-value heads, d and e head sizes.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from loong_core.types import OpRequest

if TYPE_CHECKING:
    from torch import Tensor


def supports(request: OpRequest) -> str | None:
    """None, or why Transformer Engine's attention cannot serve the request."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    if request.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 or float16, not in {request.dtype}"
    if request.degrees.get("cp", 1) > 1:
        return "context-parallel rows in zigzag order need a mask that it does not take"
    return None


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
    """As `loong_core.references.attention`, without `rows`: query [s,b,h,d], key [s,b,g,d], value [s,b,g,e] ->
    [s,b,h*e]. Tokens of a segment must follow one another, as packing lays them out."""
    from loong_core.parallel.segments import packing

    assert rows is None, "supports() refuses context parallelism"
    s, b, h, d = query.shape
    g, e = value.shape[2:]
    packed = segments is not None
    module = _module(h, g, d, e, scale, dropout, packed, _deterministic())
    if segments is None:
        return module(query, key, value).reshape(s, b, h * e)
    found = packing(segments[0])
    # For b = 1 this is a view: a row's tokens lie one after the other already.
    flat = [part.transpose(0, 1).reshape(b * s, *part.shape[2:]) for part in (query, key, value)]
    out = module(
        *flat,
        cu_seqlens_q=found.offsets,
        cu_seqlens_kv=found.offsets,
        max_seqlen_q=found.longest,
        max_seqlen_kv=found.longest,
    )
    out = out.reshape(b, s, h * e).transpose(0, 1)
    return out if found.padding is None else out.masked_fill(found.padding, 0.0)


def _deterministic() -> bool:
    import torch

    return torch.are_deterministic_algorithms_enabled()


@lru_cache(maxsize=64)
def _module(
    heads: int, groups: int, size: int, value_size: int, scale: float, dropout: float, packed: bool, deterministic: bool
) -> Any:
    """One module per configuration: it holds no parameters, and chooses its kernel when it is first called.

    `deterministic` is part of the key because the module asks torch for it once, when it is made.
    """
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads,
        size if size == value_size else (size, value_size),
        num_gqa_groups=groups,
        attention_dropout=dropout,
        qkv_format="thd" if packed else "sbhd",
        attn_mask_type="padding_causal" if packed else "causal",
        softmax_scale=scale,
    )
