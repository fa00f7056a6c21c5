"""The op `ragged_attention` by torch's own FlashAttention-2 (`torch.nn.attention.varlen`).

Importing this loads no tensor library: `supports` also answers in the parent process.

Shape legend: q query rows, k key rows, s sequences, h query heads, g key-value heads, d head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loong_core.backends.cuda import compute_capability
from loong_core.types import OpRequest

if TYPE_CHECKING:
    from torch import Tensor

WIDEST = 256
"""Elements of the largest head that it has a kernel for."""


def supports(request: OpRequest) -> str | None:
    """None, or why torch's attention over sequences of different lengths cannot serve the request."""
    if request.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 or float16, not in {request.dtype}"
    width = request.fields.get("head_dim")
    if width is not None and (width % 8 or width > WIDEST):
        return f"it has no kernel for heads of {width} elements"
    capability = compute_capability()
    if capability is not None and capability < (8, 0):
        return f"it wants compute capability 8.0, not {capability[0]}.{capability[1]}"
    return None


def ragged_attention(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor, longest: tuple[int, int]
) -> Tensor:
    """As `loong_core.references.ragged_attention`, in one call that never asks the device for a length: query [q,h,d],
    key and value [k,g,d], offsets int32 [s+1] -> [q,h*d]."""
    from torch.nn.attention.varlen import varlen_attn

    from loong_core.references import ragged_attention as reference

    if len(query) == 0:
        return reference.ragged_attention(query, key, value, query_offsets, key_offsets, longest)
    # The kernels want the elements of a head side by side.
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    out = varlen_attn(query, key, value, query_offsets, key_offsets, *longest)
    assert not isinstance(out, tuple), "only a call that asks for more has several results"
    return out.flatten(1)
