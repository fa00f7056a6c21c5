"""The head of a language model: logits, or the loss of each token without ever holding the logits.

Shape legend: s rows and b batch of this rank, n hidden size, v vocabulary of this rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

if TYPE_CHECKING:
    from loong_core.ops import Ops


class Head(nn.Module):
    """Takes the place of megatron-core's output layer and shares its weight, [v,n] (None where it is tied)."""

    def __init__(self, column: Any, ops: Ops, vocabulary: int, group: Any) -> None:
        """`column` is megatron-core's output layer; `vocabulary` the true one, without padding."""
        super().__init__()
        self.weight = column.weight
        self._column = (column,)  # not a submodule: its weight is ours
        self._ops, self._vocabulary = ops, vocabulary
        self._group = group if group.size() > 1 else None

    def forward(self, hidden: Tensor, targets: Tensor | None = None, tied: Tensor | None = None) -> Tensor:
        """hidden [s,b,n] -> logits [b,s,v]; with targets [b,s] their cross entropy [b,s] in float32.

        `tied` is the embedding's weight where the head has none of its own.
        """
        weight = self.weight if tied is None else tied
        if targets is None:
            return self._column[0](hidden, weight=weight)[0].transpose(0, 1)
        if self._group is not None and self._column[0].sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self._group)
        elif self._group is not None:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self._group)
        if tied is not None:
            weight = weight.view_as(weight)  # its gradient joins that of the embedding, see gradient_buffer
        losses: Tensor = self._ops.linear_cross_entropy(
            hidden.flatten(0, 1), weight, targets.t().reshape(-1), vocabulary=self._vocabulary, group=self._group
        )
        return losses.view(hidden.shape[:2]).t()
