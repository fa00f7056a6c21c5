"""All-gather and reduce-scatter among the GPUs of one host by their copy engines: no kernel takes part but a sum.

Every rank has two slots in memory that all ranks of the group can read (torch's symmetric memory). For an exchange it
copies what it has into one, writes the number of the exchange into a flag of every other rank, and for each of these
waits for its flag and copies what it wants out of its slot. All of that is on one stream, by the driver's stream memory
operations (`cuStreamWriteValue32`, `cuStreamWaitValue32`), so that neither the host nor a multiprocessor waits.

The slots are used by turns, and two are enough: a rank fills the slot of exchange i again for i + 2, once it has seen
all flags of i + 1. Who wrote one of those had, on its one stream, taken all of exchange i before. With more slots, what
is to be sent can be made where others read it (`outboxes`) instead of being copied there: a copy within one GPU takes
its multiprocessors.

All ranks of a group call the same exchanges in the same order, each of one size, so that they count alike.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from loong_core.backends.cuda import one_queue
from loong_core.parallel.transport import Cargo, SumParts

SLOTS = 2
"""For what is copied into them."""
_shared: WeakSet[_Shared] = WeakSet()
_FLAG = 4
"""Bytes of a flag."""


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


def shared_bytes() -> int:
    """Memory of this process that other ranks see. torch's allocator does not count it."""
    return sum(shared.mine.nbytes for shared in _shared)


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
    """See `loong_core.parallel.transport.Transport`. Sums are float32 for half precision, rounded once.

    An exchange of four ranks is ten calls of the driver. They are made on addresses: views of tensors and torch's own
    copies take the host several times as long.
    """

    apart = True

    def __init__(self, group: Any, sum_parts: SumParts, cargo: Cargo) -> None:
        """For the ranks of `group`, where nothing is `unavailable`; `sum_parts` is the op. Collective."""
        from cuda.bindings import driver

        self._driver, self._reached = driver, int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ)
        self._group, self._sum_parts = group, sum_parts
        self._rank, self._ranks = group.rank(), group.size()
        # Each rank begins with its neighbour, so that not all read from one.
        self._others = [(self._rank + step) % self._ranks for step in range(1, self._ranks)]
        # What all wait for goes before all else.
        self._stream = torch.cuda.Stream(priority=-1 if cargo.urgent else 0)
        # Besides an exchange of its own, each that is made ready keeps what was sent until that was added up.
        self._count = max(SLOTS, 2 * cargo.ahead)
        self._queue = self._stream.cuda_stream
        # Of each other rank: the exchange for which it has filled its slot.
        self._flags = _Shared(self._ranks * _FLAG, group)
        self._slots: _Shared | None = None
        self._capacity = self._number = 0

    def gather(self, mine: Tensor, into: Tensor | None = None) -> tuple[Tensor, _Arrival]:
        """See `Transport`."""
        mine = mine.contiguous()
        everyones = mine.new_empty((self._ranks, *mine.shape)) if into is None else into
        size, place = mine.nbytes, everyones.data_ptr()
        assert everyones.is_contiguous() and everyones.nbytes == self._ranks * size, "no room for what is gathered"
        self._make_room(size)
        self._follow(mine, everyones)
        self._offer(mine)
        self._copy(place + self._rank * size, mine.data_ptr(), size)
        for other, slot in self._offered():
            self._copy(place + other * size, slot, size)
        return everyones, _Arrival(self._stream.record_event(), None)

    def scatter(self, everyones: Tensor, mine: Tensor) -> _Arrival:
        """See `Transport`."""
        everyones = everyones.contiguous()
        parts = mine.new_empty((self._ranks - 1, *mine.shape))
        size, place = mine.nbytes, parts.data_ptr()
        assert everyones.nbytes == self._ranks * size, "as many rows for every rank"
        self._make_room(everyones.nbytes)
        self._follow(everyones, parts)
        self._offer(everyones)
        for number, (_, slot) in enumerate(self._offered()):
            self._copy(place + number * size, slot + self._rank * size, size)
        own = everyones.unflatten(0, (self._ranks, -1))[self._rank]
        return _Arrival(self._stream.record_event(), partial(self._sum_parts, parts, mine, own))

    def outboxes(self, like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """See `Transport`."""
        sizes = [tensor.numel() * dtype.itemsize for tensor in like]
        assert 2 * len(sizes) <= self._count, "more than the cargo said would be made ready"
        self._make_room(max(sizes))
        # With its last exchange done, what lies in the slots of all before that one was taken by everybody.
        self._catch_up()
        return [
            self._memory(self._number + ahead, size).view(dtype).view(tensor.shape)
            for ahead, (tensor, size) in enumerate(zip(like, sizes, strict=True), start=1)
        ]

    # ------------------------------------------------------------------------------------------------- the protocol
    def _offer(self, tensor: Tensor) -> None:
        """Begin the next exchange: `tensor` into this rank's slot, if it is not there, and word of it to the others."""
        self._number += 1
        if tensor.data_ptr() != self._slot(self._rank):
            self._copy(self._slot(self._rank), tensor.data_ptr(), tensor.nbytes)
        for other in self._others:
            where = self._flags.addresses[other] + _FLAG * self._rank
            _check(self._driver.cuStreamWriteValue32(self._queue, where, self._number & 0xFFFFFFFF, 0))

    def _offered(self) -> Iterator[tuple[int, int]]:
        """Of every other rank the slot of this exchange, once it is filled."""
        for other in self._others:
            where = self._flags.addresses[self._rank] + _FLAG * other
            _check(self._driver.cuStreamWaitValue32(self._queue, where, self._number & 0xFFFFFFFF, self._reached))
            yield other, self._slot(other)

    def _slot(self, rank: int) -> int:
        """Where the slot of this exchange begins on `rank`."""
        assert self._slots is not None
        return self._slots.addresses[rank] + self._number % self._count * self._capacity

    def _memory(self, number: int, size: int) -> Tensor:
        """So many bytes of this rank's slot of the exchange `number`."""
        assert self._slots is not None
        begin = number % self._count * self._capacity
        return self._slots.mine[begin : begin + size]

    def _copy(self, to: int, source: int, size: int) -> None:
        if size:
            _check(self._driver.cuMemcpyAsync(to, source, size, self._queue))

    # --------------------------------------------------------------------------------------------- memory, streams
    def _make_room(self, size: int) -> None:
        """Slots of at least `size` bytes; larger ones only once everything is out of the old ones."""
        if self._slots is None or self._capacity < size:
            torch.cuda.synchronize()
            dist.barrier(self._group)
            self._slots, self._capacity = None, -(-size // 512) * 512
            self._slots = _Shared(max(1, self._count * self._capacity), self._group)

    def _follow(self, *tensors: Tensor) -> None:
        """The copies' stream goes on from where the current one is; `tensors` stay until what is put on it is done."""
        self._stream.wait_stream(torch.cuda.current_stream())
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def _catch_up(self) -> None:
        """The current stream goes on once the copies' stream is through with what it was given."""
        torch.cuda.current_stream().wait_stream(self._stream)


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
    """Zeroed bytes, as many on every rank of a group, and where each rank's begin. Collective."""

    def __init__(self, size: int, group: Any) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self.mine = symmetric.empty(size, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))
        self.mine.zero_()
        self._handle = handle = symmetric.rendezvous(self.mine, group)
        _shared.add(self)
        self.addresses = [handle.get_buffer(rank, (size,), torch.uint8).data_ptr() for rank in range(group.size())]
        torch.cuda.synchronize()
        dist.barrier(group)  # nobody writes where another has not zeroed yet


def _check(result: tuple[Any, ...]) -> None:
    if int(result[0]) != 0:
        raise RuntimeError(f"CUDA refuses an operation on a stream: {result[0]!r}")
