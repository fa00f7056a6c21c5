"""The GPU as a stopwatch: how long a thunk takes on it, what it adds to memory, and the card's own two ceilings."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loong_ops.bench.row import Thunk

KNOWN: tuple[tuple[str, float, float], ...] = (("H200", 790e12, 4.3e12),)
"""Name -> what dense bfloat16 products and copies reach there in practice. Other cards: what they reach now."""
SIDE = 8192
COPIED = 2 << 30
WARMUP, REPEAT = 25, 150
"""Milliseconds spent before and while a thunk is timed."""


class Ceilings(NamedTuple):
    """FLOP/s of matrix products and bytes/s of memory."""

    flops: float
    bytes: float

    def floor(self, flops: float, size: float) -> float:
        """The least seconds in which so many operations and bytes could be done."""
        return max(flops / self.flops, size / self.bytes)


class Card:
    """The current CUDA device."""

    def facts(self) -> dict[str, Any]:
        """Name, compute capability, memory in bytes, driver and CUDA version."""
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "card": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": driver_version(),
            "cuda": torch.version.cuda,
        }

    def limits(self, measured: Ceilings) -> Ceilings:
        """What shares are shares of."""
        name = torch.cuda.get_device_name()
        for known, flops, size in KNOWN:
            if known in name and "GH" not in name:
                return Ceilings(flops, size)
        return measured

    def ceilings(self) -> Ceilings:
        """The card's own, measured now: a bfloat16 product of 8192^3, and a copy of 2 GiB (read and written)."""
        flops = 2.0 * SIDE**3 / self.seconds(_product())
        size = 2.0 * COPIED / self.seconds(_copy())
        self.tidy()
        return Ceilings(flops, size)

    def seconds(self, thunk: Thunk) -> float:
        """Median time of a call between two CUDA events, with a cold L2 cache."""
        from triton.testing import do_bench

        milliseconds: float = do_bench(thunk, warmup=WARMUP, rep=REPEAT, return_mode="median")
        return milliseconds / 1e3

    def added(self, thunk: Thunk) -> int:
        """Run the thunk once; the most bytes that were allocated meanwhile beyond those before."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        thunk()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def tidy(self) -> None:
        """Give back what the last row held."""
        gc.collect()
        torch.cuda.empty_cache()

    def works(self) -> bool:
        """Whether the device still answers: an illegal access ends all work of its process."""
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device="cuda").item()
        except RuntimeError:
            return False
        return True


def _product() -> Thunk:
    left, right = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return lambda: left @ right


def _copy() -> Thunk:
    source = torch.zeros(COPIED, device="cuda", dtype=torch.uint8)
    return partial(torch.empty_like(source).copy_, source)


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The NVIDIA driver's version, as 580.159.04; None where it does not say."""
    try:
        words = file.read_text(encoding="utf-8").split()
    except OSError:
        return None
    return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()), None)
