"""The attention op by Transformer Engine's DotProductAttention: cuDNN or FlashAttention, packed rows as `thd`.

Importing this loads no tensor library: `supports` also answers in the parent process.

Shape legend: s query rows, t key rows, b batch, h query heads, g key-value heads, d and e head sizes.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from loong_core.types import OpRequest

if TYPE_CHECKING:
    from torch import Tensor

PADDING = -1


def supports(request: OpRequest) -> str | None:
    """None, or why Transformer Engine's attention cannot serve the request."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    if request.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 or float16, not in {request.dtype}"
    if request.degrees.get("cp", 1) > 1:
        return "context-parallel rows in zigzag order need a mask that it does not take"
    return None


class _Packing(NamedTuple):
    """Where sequences begin in the flattened [b*s] tokens: int32 [n+1], a bound of the longest, what is padding."""

    offsets: Tensor
    longest: int
    padding: Tensor


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
    """As `loong_core.references.attention.attention`, without `rows`: query [s,b,h,d], key [s,b,g,d], value [s,b,g,e] ->
    [s,b,h*e]. Tokens of a segment must follow one another, as packing lays them out."""
    assert rows is None, "supports() refuses context parallelism"
    s, b, h, d = query.shape
    g, e = value.shape[2:]
    packed = segments is not None
    module = _module(h, g, d, e, scale, dropout, packed, _deterministic())
    if segments is None:
        return module(query, key, value).reshape(s, b, h * e)
    packing = _packing(segments[0])
    flat = [part.transpose(0, 1).reshape(b * s, *part.shape[2:]) for part in (query, key, value)]
    out = module(
        *flat,
        cu_seqlens_q=packing.offsets,
        cu_seqlens_kv=packing.offsets,
        max_seqlen_q=packing.longest,
        max_seqlen_kv=packing.longest,
    )
    out = out.reshape(b, s, h * e).transpose(0, 1)
    return out.masked_fill(packing.padding, 0.0)


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


_LAST: list[tuple[Any, int, _Packing]] = []


def _packing(segments: Tensor) -> _Packing:
    """The sequences of `segments` [b,s]. Every layer of a micro-batch asks with the same tensor, and the answer needs
    a copy from the device, so the last one is kept."""
    import weakref

    if _LAST:
        known, version, packing = _LAST[0]
        if known() is segments and version == segments._version:
            return packing
    packing = packing_of(segments)
    _LAST[:] = [(weakref.ref(segments), segments._version, packing)]
    return packing


def packing_of(segments: Tensor) -> _Packing:
    """Offsets of the runs of equal numbers in each row of `segments` [b,s]; a padded tail is a sequence of its own."""
    import torch

    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    begin = starts.flatten().nonzero().squeeze(-1)
    offsets = torch.cat([begin, begin.new_tensor([segments.numel()])]).to(torch.int32)
    longest = int((offsets[1:] - offsets[:-1]).max())
    # An upper bound will do, and kernels are planned per value: rounded up, few values occur.
    longest = min(max(1 << (longest - 1).bit_length(), 64), segments.shape[1])
    return _Packing(offsets, longest, (segments == PADDING).t().unsqueeze(-1))
