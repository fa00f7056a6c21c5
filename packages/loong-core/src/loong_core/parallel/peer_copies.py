"""All-gather and reduce-scatter among the GPUs of one host by their copy engines: no kernel takes part but a sum.

Every rank has slots in memory that all ranks of the group can read (torch's symmetric memory). A rank copies what it
has into a slot and writes the number of the exchange into a flag of every other rank; that one's stream waits for the
flag, copies what it wants out of the slot, and writes the number into a second flag of the owner, whose stream waits
for it before it uses the slot again. Streams write and wait by the driver's stream memory operations
(`cuStreamWriteValue32`, `cuStreamWaitValue32`), so that neither the host nor a multiprocessor waits for another rank.

All ranks of a group call the same exchanges in the same order, each of one size, so that they count alike.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from loong_core.backends.cuda import one_queue

SLOTS = 2
"""Exchanges of which the second does not wait until the first was taken."""


def unavailable(group: Any) -> str | None:
    """Why the ranks of `group` cannot read each other's memory; None where they can. Collective, one answer on all."""
    reasons = (
        None,
        "torch has no symmetric memory for CUDA, or its cuda-bindings are missing",
        "CUDA_DEVICE_MAX_CONNECTIONS=1 leaves one queue, in which copies would hold up products",
        "the ranks are on several hosts",
        "a worker sees no GPU but its own",
        "the GPUs have no direct access to each other",
    )
    device = torch.cuda.current_device()
    own = 0 if _has_libraries() else 1
    if own == 0 and one_queue():
        own = 2
    host = int.from_bytes(hashlib.sha256(_host().encode()).digest()[:7], "little")
    mine = torch.tensor([own, host, device], dtype=torch.int64, device="cuda")
    everyones = mine.new_empty((group.size(), 3))
    dist.all_gather_into_tensor(everyones.flatten(), mine, group=group)
    owns, hosts, devices = everyones.t().tolist()
    if any(owns):
        return reasons[max(owns)]
    if len(set(hosts)) > 1:
        return reasons[3]
    if len(set(devices)) < len(devices):
        return reasons[4]
    reach = all(torch.cuda.can_device_access_peer(device, other) for other in devices if other != device)
    agreed = torch.tensor([int(reach)], device="cuda")
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group=group)
    return None if agreed.item() else reasons[5]


def _has_libraries() -> bool:
    try:
        import cuda.bindings.driver  # noqa: F401
        import torch.distributed._symmetric_memory  # noqa: F401
    except ImportError:
        return False
    return True


def _host() -> str:
    """What tells hosts apart, containers of one name among them."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as lines:
            return platform.node() + lines.read()
    except OSError:
        return platform.node()


class PeerCopies:
    """See `loong_core.parallel.transport.Transport`. Sums are float32 for half precision, rounded once."""

    apart = True

    def __init__(self, group: Any, sum_parts: Callable[[Tensor, Tensor], None]) -> None:
        """For the ranks of `group`, where nothing is `unavailable`; `sum_parts` is the op. Collective."""
        self._group, self._sum_parts = group, sum_parts
        self._rank, self._ranks = group.rank(), group.size()
        # Before all else: others wait for what this rank sends.
        self._stream = torch.cuda.Stream(priority=-1)
        # Of each other rank: the exchange whose slot it has filled, then that whose slot here it has taken.
        flags = _Shared(2 * self._ranks * 4, group)
        self._flags = [peer.data_ptr() for peer in flags.peers]
        self._shared = flags
        self._slots: _Shared | None = None
        self._number = 0

    def gather(self, mine: Tensor, into: Tensor | None = None) -> tuple[Tensor, _Arrival]:
        """See `Transport`."""
        mine = mine.contiguous()
        everyones = mine.new_empty((self._ranks, *mine.shape)) if into is None else into
        slots = self._room(mine)
        with self._beside(mine, everyones):
            self._offer(mine, slots)
            for other, slot in self._taken(slots):
                everyones[other].copy_(_as(slot, mine))
            done = self._stream.record_event()
        everyones[self._rank].copy_(mine)  # by the current stream, which has to wait for the others' anyway
        return everyones, _Arrival(done, None)

    def scatter(self, everyones: Tensor, mine: Tensor) -> _Arrival:
        """See `Transport`."""
        everyones = everyones.contiguous()
        parts = mine.new_empty((self._ranks, *mine.shape))
        slots = self._room(everyones)
        with self._beside(everyones, parts):
            self._offer(everyones, slots)
            parts[self._rank].copy_(everyones.view_as(parts)[self._rank])
            for other, slot in self._taken(slots):
                parts[other].copy_(_as(slot, everyones).view_as(parts)[self._rank])
            done = self._stream.record_event()
        return _Arrival(done, partial(self._sum_parts, parts, mine))

    # ------------------------------------------------------------------------------------------------- the protocol
    def _offer(self, tensor: Tensor, slots: _Shared) -> None:
        """The next exchange of this rank: `tensor` into its slot, as soon as the others have taken what was there."""
        self._number += 1
        for other in self._others():
            self._wait(self._ranks + other, self._number - SLOTS)
        _as(slots.mine[self._number % SLOTS], tensor).copy_(tensor)
        for other in self._others():
            self._write(other, self._rank)

    def _taken(self, slots: _Shared) -> Iterator[tuple[int, Tensor]]:
        """Of every other rank the slot of this exchange, to be copied from before the next is asked for."""
        for other in self._others():
            self._wait(other, self._number)
            yield other, slots.peers[other][self._number % SLOTS]
            self._write(other, self._ranks + self._rank)

    def _others(self) -> Iterator[int]:
        """All other ranks, each rank beginning with its neighbour: no two read from one at the same time."""
        return ((self._rank + step) % self._ranks for step in range(1, self._ranks))

    def _write(self, rank: int, flag: int) -> None:
        """The number of this exchange into a flag of `rank`, once all that was put on the stream before is done."""
        from cuda.bindings import driver

        where = self._flags[rank] + 4 * flag
        _check(driver.cuStreamWriteValue32(self._stream.cuda_stream, where, self._number & 0xFFFFFFFF, 0))

    def _wait(self, flag: int, number: int) -> None:
        """What follows on the stream waits until a flag of this rank is at least `number`, counted round."""
        from cuda.bindings import driver

        reached = int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ)
        where = self._flags[self._rank] + 4 * flag
        _check(driver.cuStreamWaitValue32(self._stream.cuda_stream, where, number & 0xFFFFFFFF, reached))

    # --------------------------------------------------------------------------------------------- memory, streams
    def _room(self, tensor: Tensor) -> _Shared:
        """Slots that hold `tensor`; larger ones where they do not, once everything is out of the old ones."""
        size = -(-tensor.nbytes // 512) * 512
        if self._slots is None or self._slots.mine.shape[1] < size:
            torch.cuda.synchronize()
            dist.barrier(self._group)
            self._slots = None
            self._slots = _Shared((SLOTS, size), self._group)
        return self._slots

    def _beside(self, *tensors: Tensor) -> Any:
        """The copies' stream, from where the current one is now; `tensors` stay until what is put on it is done."""
        self._stream.wait_stream(torch.cuda.current_stream())
        for tensor in tensors:
            tensor.record_stream(self._stream)
        return torch.cuda.stream(self._stream)


class _Arrival(NamedTuple):
    """What is here once `done`, and what is left to do with it."""

    done: torch.cuda.Event
    then: Callable[[], None] | None

    def wait(self) -> None:
        """The current stream waits, and does the rest."""
        torch.cuda.current_stream().wait_event(self.done)
        if self.then is not None:
            self.then()


class _Shared:
    """Zeroed bytes of one shape on every rank of a group: `mine`, and `peers`, those of each rank. Collective."""

    def __init__(self, shape: int | tuple[int, ...], group: Any) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self.mine = symmetric.empty(shape, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))
        self.mine.zero_()
        self._handle = symmetric.rendezvous(self.mine, group)
        sizes = self.mine.shape
        self.peers = [self._handle.get_buffer(rank, sizes, torch.uint8) for rank in range(group.size())]
        torch.cuda.synchronize()
        dist.barrier(group)  # nobody writes where another has not zeroed yet


def _as(slot: Tensor, tensor: Tensor) -> Tensor:
    """The first bytes of a slot as something like `tensor`."""
    return slot[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _check(result: tuple[Any, ...]) -> None:
    if int(result[0]) != 0:
        raise RuntimeError(f"CUDA refuses a stream memory operation: {result[0]!r}")
