"""Memory a step used, on any device: the allocator's peak where there is one, the process's resident size on a CPU."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

_PAGES = Path("/proc/self/statm")


def used(device: str) -> int:
    """Bytes in use by this process: on an accelerator the peak since the last call, on a CPU now. 0 = unknown."""
    kind = torch.device(device)
    if kind.type == "cpu":
        if not _PAGES.exists():
            return 0
        return int(_PAGES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    module = torch.get_device_module(kind)
    if not hasattr(module, "max_memory_allocated"):
        return 0
    peak = int(module.max_memory_allocated(kind))
    module.reset_peak_memory_stats(kind)
    return peak


def fullest_rank(device: str, stop: bool = False, more: int = 0) -> tuple[int, bool]:
    """The largest `used` of all ranks, `more` bytes of this one added, and in the same message whether `stop` holds on
    any. Collective."""
    size = used(device) + more
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return size, stop
    largest = torch.tensor([size, stop], dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    found = largest.tolist()
    return int(found[0]), bool(found[1])
