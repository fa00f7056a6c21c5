"""The reference of the op `route`. Shape legend: t tokens, e experts, k experts chosen for each token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Which experts serve each token, and the statistics that a load-balancing loss needs.

    `weights` [t,k] float32 carry gradients to the logits; `experts` [t,k] int32, of falling weight. Over the counted
    tokens: `counts` [e] int32 are the assignments, `sums` [e] float32 the softmax probabilities, without gradient.
    """

    weights: Tensor
    experts: Tensor
    counts: Tensor
    sums: Tensor


def route(logits: Tensor, top_k: int, *, normalise: bool, valid: Tensor | None = None) -> Routing:
    """The `top_k` likeliest experts of every token, of equal ones the first: logits [t,e] -> see `Routing`.

    Weights are softmax probabilities over all experts; with `normalise` they are divided by their sum over the chosen
    ones. Computed in float32 (float64 stays). `valid` [t] bool says which tokens the statistics count; None: all.
    Source: Shazeer et al., 2017 (arXiv 1701.06538); Fedus et al., 2021 (arXiv 2101.03961) for the statistics.
    """
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    probabilities = torch.softmax(wide, dim=-1)
    # A stable sort, not torch.topk: equal logits are common in bfloat16, and topk may return either.
    chosen = wide.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = torch.softmax(wide.gather(-1, chosen), dim=-1) if normalise else probabilities.gather(-1, chosen)
    ones = torch.ones_like(chosen, dtype=torch.int32) if valid is None else valid[:, None].expand_as(chosen).int()
    counts = ones.new_zeros(logits.shape[-1]).scatter_add_(0, chosen.reshape(-1), ones.reshape(-1))
    counted = probabilities.detach() if valid is None else probabilities.detach() * valid[:, None]
    return Routing(weights, chosen.int(), counts, counted.sum(0))
