"""The reference of the op `linear_cross_entropy`. Shape legend: t tokens, h hidden size, v vocabulary, n ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from loong_core.references.cross_entropy import cross_entropy


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocabulary: int, group: Any = None
) -> Tensor:
    """Cross entropy of `hidden @ weight.T`: hidden [t,h], weight [v/n,h], targets [t] -> loss [t] in float32.

    Rank r of the n ranks of `group` (None: one) holds rows r * v/n onwards of the weight; rows from `vocabulary` on are
    padding and take no part. A target of -100 gives loss 0 and no gradient. The gradient of `hidden` is the part that
    comes from this rank's rows: who cut the vocabulary adds the ranks' parts up (megatron-core's mappings do).

    Raises `DataError` on a CPU (elsewhere the device reports it) for other targets outside the vocabulary.
    """
    return cross_entropy(hidden @ weight.t(), targets, vocabulary=vocabulary, group=group)
