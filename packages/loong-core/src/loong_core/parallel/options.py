"""Settings of the megatron planner, decoded from `parallel.options`."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt, StrictBool

from loong_core.recipe import Section

WIDEST_GATHER = 8
"""Largest expert-parallel group among whose ranks `dispatch: auto` exchanges all tokens: about one node."""


Way = Literal["local", "gather", "weights", "alltoall"]
"""How tokens and experts meet; local: all experts are here."""


def way(dispatch: str, ep: int, etp: int) -> Way:
    """What `MegatronOptions.dispatch` comes to in groups of `ep` ranks that cut each expert in `etp` parts."""
    if dispatch == "alltoall" or etp > 1:
        return "alltoall"
    if ep == 1:
        return "local"
    if dispatch == "weights":
        return "weights"
    return "gather" if dispatch == "gather" or ep <= WIDEST_GATHER else "alltoall"


class MegatronOptions(Section):
    overlap: StrictBool | Literal["parameters"] = True
    """Where there is data parallelism: reduce gradients beside the backward pass, and gather updated parameters beside
    other updates and the next forward pass. parameters: only the latter. Gradients are then reduced after the backward
    pass, when NCCL's kernels take no multiprocessors from products: better within a node where a small part of the
    model is replicated, as beside experts."""
    dispatch: Literal["auto", "gather", "weights", "alltoall"] = "auto"
    """How tokens meet experts of other ranks: gather (all ranks of the group see all tokens; the experts are not cut),
    weights (tokens stay; a layer's experts are gathered while other layers are computed) or alltoall (each token is
    sent per expert). auto: gather in groups of up to 8 ranks where experts are not cut."""
    exchange: Literal["auto", "collectives", "copies"] = "collectives"
    """With gather and weights: what carries them. collectives: NCCL's kernels, which take multiprocessors from what
    runs beside them; copies: the copy engines of GPUs that see each other's memory. On two H200s copies took 6 % less
    of a step where a rank had 8,192 tokens and as much where it had 32,768. auto: copies where they can be."""
    exchange_pieces: PositiveInt | None = None
    """With gather: the pieces in which tokens go to the experts and back. While one is computed another travels; more
    pieces are smaller products. null: 2 where more than two ranks have 16,384 tokens or more each, else 1."""
    bucket_size: PositiveInt | None = None
    """Parameters per gradient bucket; null takes megatron-core's own rule."""
