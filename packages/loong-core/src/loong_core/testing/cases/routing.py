"""Cases of the op `route`. Shape legend: t tokens, e experts, k experts chosen for each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from loong_core.references.routing import Routing
from loong_core.testing.cases.case import OpCase, Tensors


def define_route(tensors: Tensors, others: Mapping[str, Any]) -> Routing:
    """Token by token: softmax, the k largest by a stable sort, their shares; statistics counted one by one."""
    logits, valid, top_k = tensors["logits"], others.get("valid"), others["top_k"]
    tokens, e = logits.shape
    counts, sums = torch.zeros(e, dtype=torch.int32), torch.zeros(e, dtype=torch.float64)
    weights, experts = [], []
    for token in range(tokens):
        shares = torch.exp(logits[token]) / torch.exp(logits[token]).sum()
        order = logits[token].detach().sort(descending=True, stable=True).indices[:top_k]
        chosen = shares[order]
        weights.append(chosen / chosen.sum() if others["normalise"] else chosen)
        experts.append(order.int())
        if valid is None or valid[token]:
            counts[order] += 1
            sums += shares.detach()
    if tokens == 0:
        return Routing(logits[:, :top_k], torch.zeros(0, top_k, dtype=torch.int32), counts, sums)
    return Routing(torch.stack(weights), torch.stack(experts), counts, sums)


def _route(name: str, t: int, e: int, top_k: int, normalise: bool, spread: float = 1.0, **others: Any) -> OpCase:
    return OpCase(
        name=name,
        tensors={"logits": (t, e)},
        others={"top_k": top_k, "normalise": normalise, **others},
        positional=("top_k",),
        define=define_route,
        spread=spread,
    )


CASES = (
    _route("one_token", 1, 4, 2, True),
    _route("one_expert", 5, 1, 1, True),
    _route("one_chosen", 9, 8, 1, False),
    _route("odd", 7, 13, 3, True),
    _route("plain_shares", 7, 13, 3, False),
    _route("all_chosen", 4, 5, 5, True),
    _route("many_experts", 37, 67, 8, True),
    _route("some_uncounted", 6, 12, 4, True, valid=torch.tensor([True, False, True, True, False, True])),
    _route("none_counted", 3, 6, 2, False, valid=torch.zeros(3, dtype=torch.bool)),
    _route("confident", 5, 16, 4, True, spread=8.0),
    _route("all_equal", 3, 9, 4, True, spread=0.0),
    _route("no_tokens", 0, 6, 2, True),
)
