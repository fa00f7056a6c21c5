"""The one core attention of every layer provider: it knows megatron-core's calling convention and nothing of kernels.

megatron-core's own needs Transformer Engine for context parallelism and a mask tensor of its layout for packing. Here
the `attention_mask` argument of megatron's forward carries `segments` instead (see `CoreAttention.forward`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from loong_core.errors import Unsupported
from loong_core.parallel import context

if TYPE_CHECKING:
    from loong_core.ops import Ops

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


def core_attention(ops: Ops) -> type[CoreAttention]:
    """The core attention class that calls `ops.attention`, for a layer provider's `core_attention()`."""
    return type("CoreAttention", (CoreAttention,), {"op": staticmethod(ops.attention)})


class CoreAttention(MegatronModule):
    """Causal attention on this rank's heads and rows. Made by `core_attention(ops)`, built by megatron-core.

    Under context parallelism a rank holds the zigzag rows of `loong_core.parallel.context`; keys and values of all
    ranks are gathered (the gradient is scattered back), queries and results stay local.
    """

    op: ClassVar[Callable[..., torch.Tensor]]

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **sizes: Any,
    ) -> None:
        """Takes megatron-core's arguments; `cp_comm_type` and head sizes (`sizes`) are not needed.

        Raises `Unsupported` for settings of the config that the attention op does not compute.
        """
        super().__init__(config=config)
        _refuse(config, attention_type)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.cp_group = groups.cp
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """query [s,b,h,d], key [s,b,g,d], value [s,b,g,e], all of this rank's rows -> [s,b,h*e].

        `attention_mask` is no mask: it is `segments`, an integer tensor [b,s] that numbers the packed sample of each
        of this rank's rows (-1 = padding), or None where every row is one whole sample. Tokens attend backwards within
        their own segment.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise Unsupported(
                "CoreAttention takes segments in attention_mask; it knows no bias and no PackedSeqParams."
            )
        kind = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        if kind not in CAUSAL:
            raise Unsupported(f"CoreAttention is causal; attn_mask_type {kind.name} is not.")
        segments = None if attention_mask is None else (attention_mask, attention_mask)
        rows = None
        size = self.cp_group.size()
        if size > 1:
            local = query.shape[0]
            rows = (
                context.rows(local * size, size, self.cp_group.rank()).to(query.device),
                context.gathered_rows(local * size, size).to(query.device),
            )
            key, value = self._gathered(key, value)
            if attention_mask is not None:
                segments = (attention_mask, self._gathered_segments(attention_mask))
        dropout = self.dropout if self.training else 0.0
        with self._random_state(dropout):
            return type(self).op(
                query, key, value, scale=self.softmax_scale, dropout=dropout, rows=rows, segments=segments
            )

    def _gathered(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all ranks, [s,b,g,d] -> [s * size,b,g,d], in one collective."""
        both = torch.cat([key, value], dim=-1)
        key, value = gather_from_sequence_parallel_region(both, group=self.cp_group).split(
            [key.shape[-1], value.shape[-1]], dim=-1
        )
        return key, value

    def _gathered_segments(self, segments: torch.Tensor) -> torch.Tensor:
        """[b,s] -> [b, s * size], the ranks' parts in the order of `context.gathered_rows`."""
        parts = [torch.empty_like(segments) for _ in range(self.cp_group.size())]
        torch.distributed.all_gather(parts, segments.contiguous(), group=self.cp_group)
        return torch.cat(parts, dim=1)

    def _random_state(self, dropout: float) -> contextlib.AbstractContextManager[Any]:
        """Heads differ between tensor-parallel ranks, so must their dropout; under sequence parallelism megatron-core
        has entered this state for the whole layer already."""
        if dropout == 0.0 or self.config.sequence_parallel:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()


def _refuse(config: Any, attention_type: str) -> None:
    refused = {
        f"attention_type {attention_type!r}": attention_type != "self",
        "window_size": getattr(config, "window_size", None) is not None,
        "softmax_type": getattr(config, "softmax_type", "vanilla") != "vanilla",
        "apply_query_key_layer_scaling": getattr(config, "apply_query_key_layer_scaling", False),
        "qk_clip": getattr(config, "qk_clip", False),
        "log_max_attention_logit": getattr(config, "log_max_attention_logit", False),
    }
    if names := [name for name, wanted in refused.items() if wanted]:
        raise Unsupported(
            f"The attention op does not compute {', '.join(names)}: causal self-attention without a window."
        )
