"""How large tensors travel among the ranks of a group beside computing: by NCCL's kernels, or by copy engines.

A collective's kernels take streaming multiprocessors (SMs) from the products that run beside them; a product whose
programs were meant to fill the device all at once then takes up to twice its time. Copy engines take none
(`peer_copies`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from loong_core.errors import Unsupported

TransportName = Literal["auto", "collectives", "copies"]
SumParts = Callable[[Tensor, Tensor, Tensor | None], None]


class Cargo(NamedTuple):
    """What travels: its name, whether all wait for it (it goes first then), and how many scatters are made ready before
    those of an earlier turn have been waited for (see `Transport.outboxes`)."""

    name: str
    urgent: bool = True
    ahead: int = 0


TOKENS = Cargo("tokens")

log = logging.getLogger(__name__)


class Handle(Protocol):
    """Something under way."""

    def wait(self) -> Any:
        """The current stream goes on when it is there; the host does not wait on a GPU."""


class Transport(Protocol):
    """Both calls are collective, in one order on all ranks, with one size. Every tensor that is passed in must stay as
    it is until the handle was waited for. `apart` is whether a collective of the same group, called later, may overtake
    what was begun."""

    apart: bool

    def gather(self, mine: Tensor, into: Tensor | None = None) -> tuple[Tensor, Handle]:
        """mine [m,...] -> that of all ranks, [r,m,...], once the handle was waited for; in `into` if that is given."""

    def scatter(self, everyones: Tensor, mine: Tensor) -> Handle:
        """The sum over ranks of their everyones [r*m,...], this rank's rows of it into `mine` [m,...]."""

    def outboxes(self, like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Where what the next calls of `scatter` send, one of these each and in this order, is best put together:
        empty, shaped as `like`. From elsewhere a copy of it may have to be made first."""


class Collectives:
    """By the group's own backend: NCCL, or gloo."""

    apart = False

    def __init__(self, group: Any) -> None:
        self._group = group

    def gather(self, mine: Tensor, into: Tensor | None = None) -> tuple[Tensor, Handle]:
        """See `Transport`."""
        everyones = mine.new_empty((self._group.size(), *mine.shape)) if into is None else into
        rows = everyones.flatten(0, 1)
        return everyones, dist.all_gather_into_tensor(rows, mine.contiguous(), group=self._group, async_op=True)

    def scatter(self, everyones: Tensor, mine: Tensor) -> Handle:
        """See `Transport`."""
        return dist.reduce_scatter_tensor(mine, everyones.contiguous(), group=self._group, async_op=True)

    def outboxes(self, like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """See `Transport`."""
        return [torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format) for tensor in like]


@cache
def between(group: Any, name: TransportName, sum_parts: SumParts, cargo: Cargo = TOKENS) -> Transport:
    """The transport of a `cargo` in a group, one for all who ask. Collective. `sum_parts` is the op.

    `auto` takes copies where all ranks of the group can read each other's GPU memory, and says once why not. Raises
    `Unsupported` where copies were asked for and cannot be.
    """
    if name == "collectives":
        return Collectives(group)
    if dist.get_backend(group) != "nccl":
        return _instead(group, name, cargo, "the group is not one of CUDA devices")
    from loong_core.parallel import peer_copies

    if reason := peer_copies.unavailable(group):
        return _instead(group, name, cargo, reason)
    log.info("%s travel by copy engines", cargo.name)
    return peer_copies.PeerCopies(group, sum_parts, cargo)


def _instead(group: Any, name: TransportName, cargo: Cargo, reason: str) -> Collectives:
    if name == "copies":
        raise Unsupported(f"parallel.options.exchange: copies is not possible here: {reason}. Use auto or collectives.")
    log.info("%s travel by collectives: %s", cargo.name, reason)
    return Collectives(group)
