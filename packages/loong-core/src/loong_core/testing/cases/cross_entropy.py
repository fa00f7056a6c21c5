"""Cases of the op `cross_entropy`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loong_core.testing.cases.case import OpCase, Tensors


def define_cross_entropy(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """log(sum(exp(logits))) - logits[target] over the true vocabulary; zero where the target is -100."""
    logits, targets = tensors["logits"][..., : others["vocabulary"]], others["targets"]
    counted = targets != -100
    picked = logits.gather(-1, torch.where(counted, targets, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(counted, torch.log(torch.exp(logits).sum(-1)) - picked, 0.0)


def _cross_entropy(name: str, targets: list[Any], width: int, vocabulary: int, spread: float = 1.0) -> OpCase:
    wanted = torch.tensor(targets)
    return OpCase(
        name=name,
        tensors={"logits": (*wanted.shape, width)},
        others={"targets": wanted, "vocabulary": vocabulary, "group": None},
        positional=("targets",),
        define=define_cross_entropy,
        spread=spread,
    )


CASES = (
    _cross_entropy("one_token", [0], 3, 3),
    _cross_entropy("odd", [[0, 6, 2], [3, 1, 5]], 7, 7),
    _cross_entropy("uncounted", [[-100, 6, -100, 2], [0, -100, -100, -100]], 7, 7),
    _cross_entropy("padded_vocabulary", [[0, 4, 3], [-100, 1, 2]], 8, 5),
    _cross_entropy("confident", [[0, 4, 3]], 16, 13, spread=4.0),
)
