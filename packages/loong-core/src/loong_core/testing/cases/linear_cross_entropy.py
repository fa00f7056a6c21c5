"""Cases of the op `linear_cross_entropy`. Shape legend: t tokens, h hidden size, w rows of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loong_core.testing.cases.case import OpCase, Tensors
from loong_core.testing.cases.cross_entropy import define_cross_entropy


def define_linear_cross_entropy(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """The cross entropy of hidden @ weight.T over the true vocabulary."""
    return define_cross_entropy({"logits": tensors["hidden"] @ tensors["weight"].t()}, others)


def _linear(name: str, targets: list[int], w: int, h: int, vocabulary: int, spread: float = 0.6) -> OpCase:
    return OpCase(
        name=name,
        tensors={"hidden": (len(targets), h), "weight": (w, h)},
        others={"targets": torch.tensor(targets), "vocabulary": vocabulary, "group": None},
        positional=("targets",),
        define=define_linear_cross_entropy,
        spread=spread,
    )


CASES = (
    _linear("one_token", [2], 3, 5, 3),
    _linear("one_of_one", [0], 1, 4, 1),
    _linear("odd", [0, 6, 2, 3, 1, 5, 6], 7, 9, 7),
    _linear("uncounted", [-100, 6, -100, 2, 0, -100], 7, 8, 7),
    _linear("nothing_counts", [-100, -100], 7, 8, 7),
    _linear("padded_vocabulary", [0, 4, 3, -100, 130, 2], 200, 12, 131),
    _linear("confident", [0, 4, 3], 16, 8, 13, spread=1.2),
)
