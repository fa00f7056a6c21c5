"""One step under torch's profiler: where its time went, as a short table and as a trace for a browser."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loong_core.log import logger

if TYPE_CHECKING:
    from loong_core.train.run import Run

on_a_device = False
"""Whether this process has profiled a GPU: then it ends in another way (`loong_core.train.worker.end`)."""
_LONGEST = 110
"""Letters of a kernel's name that the table shows."""


class Work(NamedTuple):
    """Something a device (or, on a CPU, an operator) did: its name, when it began and ended in microseconds."""

    name: str
    begin: float
    end: float


@contextmanager
def profiled(run: Run) -> Iterator[None]:
    """Around the step after `run.step`: profile it if the recipe's `log.profile` names it.

    Leaves `logs/profile-rank-0000.txt` (`table`) and `logs/profile-rank-0000.trace.json.gz`, which chrome://tracing and
    Perfetto open. The step takes longer than others.
    """
    if run.recipe.log.profile != run.step + 1:
        yield
        return
    import torch
    from torch.profiler import ProfilerActivity, profile

    global on_a_device
    cuda = on_a_device = run.device.startswith("cuda")
    # On a GPU its kernels and the host's launches; operators would make the trace ten times as large.
    activities = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    found = [
        Work(event.name(), event.start_ns() / 1e3, event.end_ns() / 1e3)
        for event in profiler.profiler.kineto_results.events()
        if (event.device_type() != torch.autograd.DeviceType.CPU) == cuda
    ]
    path = run.folder / "logs" / f"profile-rank-{run.rank:04d}.txt"
    path.write_text(table(found, seconds) + "\n", encoding="utf-8")
    profiler.export_chrome_trace(str(_trace(path)))
    logger.info("profile of step %d: %s", run.step + 1, path)


def _trace(path: Path) -> Path:
    return path.with_suffix(".trace.json.gz")


def table(found: Iterable[Work], seconds: float) -> str:
    """Work by name, the longest first: milliseconds of the step, share of it, calls. Above, for how much of `seconds`
    anything ran at all; what runs at the same time counts once there."""
    total: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    everything = sorted(found, key=lambda work: work.begin)
    busy, until = 0.0, 0.0
    for work in everything:
        total[work.name] += work.end - work.begin
        calls[work.name] += 1
        busy += max(0.0, work.end - max(work.begin, until))
        until = max(until, work.end)
    lines = [
        f"step {seconds * 1e3:.2f} ms, of which something ran for {busy / 1e3:.2f} ms ({busy / 1e4 / seconds:.1f} %)",
        f"{'ms':>10} {'share':>7} {'calls':>7}  name",
    ]
    for name in sorted(total, key=lambda name: -total[name]):
        share = total[name] / 1e4 / seconds
        lines.append(f"{total[name] / 1e3:10.3f} {share:6.1f}% {calls[name]:7d}  {name[:_LONGEST]}")
    return "\n".join(lines)
