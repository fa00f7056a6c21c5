"""GPUs that copy from each other bring what collectives bring, whichever is late: on GPUs, and played by threads."""

from __future__ import annotations

import ctypes
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loong_core.backends import cuda
from loong_core.parallel.peer_copies import PeerCopies
from loong_core.references.sum_parts import sum_parts

WORKER = Path(__file__).with_name("peer_copies_worker.py")
ROUNDS, ROOM = 25, 4096


@pytest.mark.gpu
@pytest.mark.skipif(cuda.probe().devices < 2, reason="needs two CUDA devices")
def test_copies_bring_what_collectives_bring() -> None:
    devices = cuda.probe().devices
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={devices}", "--rdzv-backend=c10d"]
    command = [*launcher, "--rdzv-endpoint=127.0.0.1:0", str(WORKER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("rounds equal") == devices


# ------------------------------------------------------------------------------------------- ranks that are threads
class Stream:
    """A device's queue: a thread that does what it is given, in order, each thing after a moment of its own."""

    def __init__(self, seed: int) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._random = random.Random(seed)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None]) -> tuple[int]:
        self._work.put(work)
        return (0,)

    def record_event(self) -> threading.Event:
        event = threading.Event()
        self.put(event.set)
        return event

    def end(self) -> None:
        self._work.put(None)
        self._thread.join(10)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if self._random.random() < 0.2:
                time.sleep(self._random.random() * 2e-3)
            work()


class Driver:
    """The three calls of CUDA's driver, on memory of the host."""

    @staticmethod
    def cuMemcpyAsync(to: int, source: int, size: int, stream: Stream) -> tuple[int]:
        return stream.put(lambda: ctypes.memmove(to, source, size) and None)

    @staticmethod
    def cuStreamWriteValue32(stream: Stream, where: int, value: int, flags: int) -> tuple[int]:
        assert flags == 0
        return stream.put(lambda: setattr(ctypes.c_uint32.from_address(where), "value", value))

    @staticmethod
    def cuStreamWaitValue32(stream: Stream, where: int, value: int, flags: int) -> tuple[int]:
        def wait() -> None:
            end = time.monotonic() + 20
            # As CUDA defines it: the difference, as a signed number, is not negative.
            while (ctypes.c_uint32.from_address(where).value - value) % 2**32 >= 2**31:
                assert time.monotonic() < end, "a flag was never written"
                time.sleep(0)

        assert flags == 0
        return stream.put(wait)


class Shared:
    """Memory of every rank; `mine` is that of one."""

    def __init__(self, memory: list[Tensor], rank: int = 0) -> None:
        self.mine, self._kept = memory[rank], memory
        self.addresses = [part.data_ptr() for part in memory]


def zeroed(ranks: int, size: int) -> list[Tensor]:
    return [torch.zeros(size, dtype=torch.uint8) for _ in range(ranks)]


class Played(PeerCopies):
    """One of several ranks that are threads."""

    def __init__(self, rank: int, ranks: int, flags: Shared, slots: Shared, begin: int, count: int) -> None:
        self._driver, self._reached = Driver, 0
        self._sum_parts, self._rank, self._ranks = sum_parts, rank, ranks
        self._others = [(rank + step) % ranks for step in range(1, ranks)]
        self._stream: Any = Stream(rank)
        self._queue = self._stream
        self._flags: Any = flags
        self._slots: Any = slots
        self._capacity, self._number, self._count = ROOM, begin, count
        self._kept: list[Tensor] = []

    def _make_room(self, size: int) -> None:
        assert size <= ROOM

    def _follow(self, *tensors: Tensor) -> None:
        self._kept += tensors  # as the allocator keeps what a stream works on

    def _catch_up(self) -> None:
        assert self._stream.record_event().wait(30)

    def close(self) -> None:
        self._stream.end()


def arrive(handle: Any) -> None:
    """What `wait` does on a GPU; there the current stream waits."""
    assert handle.done.wait(30)
    if handle.then is not None:
        handle.then()


def drawn(rank: int, number: int, rows: int) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(1000 * rank + number))


def exchanges(played: Played, rank: int, ranks: int) -> Iterator[str]:
    """What is wrong with what this rank gets."""
    common, own = random.Random(3), random.Random(rank)
    for number in range(ROUNDS):
        rows, pieces = common.choice([0, 1, 5, 40]), common.randint(1, 4)
        arriving = [played.gather(drawn(rank, number + 100 * piece, rows)) for piece in range(pieces)]
        leaving = []
        for piece, (everyones, handle) in enumerate(arriving):
            arrive(handle)
            exact = torch.stack([drawn(other, number + 100 * piece, rows) for other in range(ranks)])
            if not torch.equal(everyones, exact):
                yield f"rank {rank}, round {number}, piece {piece}: gathered wrong"
            found = torch.empty(rows, 3)
            leaving.append((found, (rank + 1) * exact, played.scatter((rank + 1) * exact.flatten(0, 1), found)))
            if own.random() < 0.3:
                time.sleep(own.random() * 3e-3)
        for found, everyones, handle in leaving:
            arrive(handle)
            exact = everyones[rank] / (rank + 1) * sum(range(1, ranks + 1))
            if not torch.allclose(found, exact, rtol=1e-5, atol=1e-5):
                yield f"rank {rank}, round {number}: summed wrong"


def turns(played: Played, rank: int, ranks: int) -> Iterator[str]:
    """What is wrong with sums of what was put together where others read it, each pair added up after the next was
    sent, as gradients of one layer are while those of the next are computed."""
    common, own = random.Random(5), random.Random(rank)
    before: list[tuple[int, Tensor, Tensor, Any]] = []
    for number in range(ROUNDS + 1):
        leaving = []
        if number < ROUNDS:
            sizes = [common.choice([1, 5, 40]) for _ in range(common.randint(1, 2))]
            filled = [drawn(rank, 7 * number + part, ranks * rows) for part, rows in enumerate(sizes)]
            outboxes = played.outboxes(filled, torch.float32)
            for outbox, values in zip(outboxes, filled, strict=True):
                outbox.copy_(values)
            for part, (outbox, rows) in enumerate(zip(outboxes, sizes, strict=True)):
                found = torch.empty(rows, 3)
                everyones = [drawn(other, 7 * number + part, ranks * rows) for other in range(ranks)]
                exact = torch.stack(everyones).sum(0).unflatten(0, (ranks, rows))[rank]
                leaving.append((number, found, exact, played.scatter(outbox, found)))
        for turn, found, exact, handle in before:
            arrive(handle)
            if not torch.allclose(found, exact, rtol=1e-5, atol=1e-5):
                yield f"rank {rank}, turn {turn}: summed wrong"
        before = leaving
        if own.random() < 0.3:
            time.sleep(own.random() * 3e-3)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("begin", [0, 2**32 - 20])  # numbers begin anew after four billion
@pytest.mark.parametrize(("way", "count"), [(exchanges, 2), (exchanges, 4), (turns, 4)])
def test_ranks_that_are_threads_exchange_the_same(ranks: int, begin: int, way: Any, count: int) -> None:
    flags, memory = Shared(zeroed(ranks, ranks * 4)), zeroed(ranks, count * ROOM)
    for address in flags.addresses:
        for flag in range(ranks):
            ctypes.c_uint32.from_address(address + 4 * flag).value = begin
    played = [Played(rank, ranks, flags, Shared(memory, rank), begin, count) for rank in range(ranks)]
    wrong: list[str] = []

    def run(rank: int) -> None:
        try:
            wrong.extend(way(played[rank], rank, ranks))
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for one in played:
        one.close()
    assert wrong == []
    assert len({one._number for one in played}) == 1
