"""Self-attention whose heads are normed and rotated in one op, straight from the projection.

Shape legend: s rows, b batch, h query heads, g key-value heads, d head size, all of this rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

if TYPE_CHECKING:
    from loong_core.ops import Ops


class HeadNorm(nn.Module):
    """Holds the weight of a norm over heads, which the op applies. Calling it returns the weight: the hooks by which
    megatron-core finishes a parameter's gathering run on calls."""

    def __init__(self, hidden_size: int, config: Any, **_: Any) -> None:
        super().__init__()
        where = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = nn.Parameter(torch.ones(hidden_size, **where))
        # Each tensor-parallel rank sees its own heads: megatron-core sums such gradients over the ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self) -> Tensor:
        """[hidden_size]."""
        return self.weight


class RotaryAttention(SelfAttention):
    """megatron-core's self-attention around the op `rotary_qkv`. Made by `rotary_attention(ops)`."""

    ops: ClassVar[Ops]
    _angles: Tensor

    def forward(self, hidden_states: Tensor, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [s,b,n] -> ([s,b,n], bias); `rotary_pos_emb` are the angles of `loong_llm.rope`."""
        self._angles = kwargs.pop("rotary_pos_emb")
        return super().forward(hidden_states, attention_mask, *args, **kwargs)

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """query [s,b,h,d], key and value [s,b,g,d]: normed where the model norms heads, and rotated."""
        mixed, _ = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
        mixed = mixed.unflatten(-1, (-1, self.hidden_size_per_attention_head))
        norms = [norm() if isinstance(norm, HeadNorm) else None for norm in (self.q_layernorm, self.k_layernorm)]
        return type(self).ops.rotary_qkv(mixed, self._angles, *norms, self.config.layernorm_epsilon)


def rotary_attention(ops: Ops) -> type[RotaryAttention]:
    """The attention class that calls this run's ops."""
    return type("RotaryAttention", (RotaryAttention,), {"ops": ops})
