"""Batches in memory that two processes share: where their tensors lie, as JSON, and tensors over that memory.

The memory is a file without a name (`memfd_create`), which is gone when the last process that holds it is, however that
ends; no size of /dev/shm limits it.
"""

from __future__ import annotations

import logging
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from loong_core import log

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.train.engine import Batch

logger = logging.getLogger(__name__)

ALIGN = 64
"""Tensors begin at a multiple of it: any dtype, and the caches' lines."""
GRAIN = 2**16
"""Slots are of a multiple of it, so that each can be mapped by itself."""
Entry = tuple[str, str, list[int], int]
"""A tensor in a slot: name, dtype, shape, and the byte it begins at."""


class Slot(NamedTuple):
    """A part of the memory that holds one step: its number, the byte it begins at, its bytes."""

    number: int
    begin: int
    size: int


def entries_of(batches: Sequence[Batch]) -> tuple[list[list[Entry]], int]:
    """Where the tensors of some batches go in a slot, and how many bytes of it they take."""
    at, result = 0, []
    for batch in batches:
        entries: list[Entry] = []
        for name, tensor in batch.items():
            entries.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), at))
            at += -(-tensor.numel() * tensor.element_size() // ALIGN) * ALIGN
        result.append(entries)
    return result, at


def views(memory: Any, entries: Sequence[Sequence[Any]]) -> Batch:
    """The tensors of a batch over a buffer, which they keep alive."""
    found: Batch = {}
    for name, kind, shape, begin in entries:
        dtype, count = getattr(torch, kind), torch.Size(shape).numel()
        if count:
            found[name] = torch.frombuffer(memory, dtype=dtype, count=count, offset=begin).view(shape)
        else:
            found[name] = torch.empty(shape, dtype=dtype)
    return found


class Pool:
    """The writer's side: slots of a file, reused when the reader says that they are free, added where none is."""

    def __init__(self, file: int) -> None:
        self._file, self._end = file, 0
        self._slots: dict[int, tuple[Slot, mmap.mmap]] = {}
        self._free: set[int] = set()

    def free(self, numbers: Sequence[int]) -> None:
        """Nobody looks at these slots any more."""
        self._free.update(numbers)

    def write(self, batches: Sequence[Batch]) -> tuple[Slot, list[list[Entry]]]:
        """Copy batches to a slot; returns it, and where they lie in it."""
        entries, size = entries_of(batches)
        able = [self._slots[number][0] for number in self._free if self._slots[number][0].size >= size]
        slot = min(able, key=lambda item: item.size) if able else self._add(size)
        self._free.discard(slot.number)
        memory = self._slots[slot.number][1]
        for batch, places in zip(batches, entries, strict=True):
            for name, view in views(memory, places).items():
                view.copy_(batch[name])
        return slot, entries

    def _add(self, size: int) -> Slot:
        # An eighth more than asked for: lengths of prompts differ a little from step to step, and slots stay for good.
        size = -(-max(size + size // 8, 1) // GRAIN) * GRAIN
        slot = Slot(len(self._slots), self._end, size)
        os.posix_fallocate(self._file, slot.begin, slot.size)  # an error here, where a write later would be a SIGBUS
        self._slots[slot.number] = (slot, mmap.mmap(self._file, slot.size, offset=slot.begin))
        self._end += slot.size
        return slot


class Mapped:
    """The reader's side: batches in the slots of a file, without a copy, pinned where a `device` is named."""

    def __init__(self, file: int, device: str | None = None) -> None:
        self._file, self._device = file, device
        self._slots: dict[int, mmap.mmap] = {}
        self._pinned: set[int] = set()

    def read(self, slot: Slot, entries: Sequence[Sequence[Sequence[Any]]], free: Callable[[int], Any]) -> list[Batch]:
        """The batches of a slot; `free` is called with its number, in whichever thread, when the last of their tensors
        is gone."""
        if slot.number not in self._slots:
            self._slots[slot.number] = mmap.mmap(self._file, slot.size, offset=slot.begin)
            if self._device is not None and pin(self._slots[slot.number], self._device):
                self._pinned.add(slot.number)
        memory = memoryview(self._slots[slot.number])
        weakref.finalize(memory, free, slot.number).atexit = False
        batches = [views(memory, places) for places in entries]
        if self._device is None or slot.number in self._pinned:
            return batches
        return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]

    def close(self) -> None:
        """Forget all slots, which tensors may go on to use."""
        for number in self._pinned:
            assert self._device is not None
            unpin(self._slots[number], self._device)
        self._pinned.clear()
        self._slots.clear()


def _first(memory: mmap.mmap) -> Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8, count=1)


def pin(memory: mmap.mmap, device: str) -> bool:
    """Tell the driver to keep memory where it is, so that the device fetches from it by itself: once a slot, where
    torch's `pin_memory` would copy every batch. False where it does not; tensors are copied then."""
    try:
        with torch.cuda.device(device):  # a thread begins with device 0, where another rank computes
            code = int(torch.cuda.cudart().cudaHostRegister(_first(memory).data_ptr(), len(memory), 0))
    except (RuntimeError, AttributeError, AssertionError) as error:
        log.once(f"The memory of batches cannot be pinned where it is, so they are copied: {error}")
        return False
    pinned = not code and _first(memory).is_pinned()
    if not pinned:
        log.once(f"The memory of batches cannot be pinned where it is (CUDA error {code}), so they are copied.")
    return pinned


def unpin(memory: mmap.mmap, device: str) -> None:
    """Undo `pin`, after all that the device still fetches."""
    try:
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(_first(memory).data_ptr())
    except (RuntimeError, AttributeError, AssertionError) as error:  # as after any error of CUDA
        logger.debug("memory of batches cannot be released: %s", error)
