"""Forward and backward of a micro-batch as one CUDA graph: the host launches once what were thousands of kernels.

A graph is good for one combination of shapes, and for either the first micro-batch of a step (whose gradients fill the
buffers) or a later one (whose gradients are added). Gradients are reduced after the last replay, not during it. Where
capturing fails, a reason is logged once and the engine goes on without graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from loong_core.log import logger

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.parallel.torch_flat import FlatStore
    from loong_core.train.engine import Batch

WARM_UP = 2
"""Micro-batches of a combination that run eagerly first: libraries choose kernels and allocate on their first calls."""

Key = tuple[Any, ...]


class Captured(NamedTuple):
    """A graph with its inputs and its result, and which buffers hold gradients once it has run."""

    graph: Any
    batch: Batch
    report: Tensor
    filled: list[bool]


class Graphs:
    """Runs `function(batch) -> report`, by graph where there is one. All of it happens on `stream`."""

    def __init__(self, function: Callable[[Batch], Tensor], most: int, device: str) -> None:
        self.works = True
        self.idle_bytes = 0
        """What graphs use while they run, which the allocator counts as allocated only while they are captured."""
        self.stream = torch.cuda.Stream(device)
        self._function, self._device = function, device
        self._most = most
        self._pool = torch.cuda.graph_pool_handle()
        self._seen: dict[Key, int] = {}
        self._graphs: dict[Key, Captured] = {}

    def __call__(self, batch: Batch, first: bool, store: FlatStore) -> Tensor:
        """The report of one micro-batch, a tensor of its own."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            report = self._run(batch, first, store)
        # Each stream waits for the other, so memory that one of them frees is not written to before both are done.
        here.wait_stream(self.stream)
        return report

    def _run(self, batch: Batch, first: bool, store: FlatStore) -> Tensor:
        shapes = sorted((name, tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items())
        key = (first, *((name, shape, str(dtype)) for name, shape, dtype in shapes))
        captured = self._graphs.get(key)
        if captured is None:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= WARM_UP or len(self._graphs) >= self._most:
                return self._function(batch)
            captured = self._capture(key, batch, store)
            if captured is None:
                return self._function(batch)
        for name, tensor in batch.items():
            captured.batch[name].copy_(tensor)
        captured.graph.replay()
        store.mark_filled(captured.filled)
        return captured.report.clone()

    def _capture(self, key: Key, batch: Batch, store: FlatStore) -> Captured | None:
        """Record one micro-batch; nothing is computed yet."""
        static = {name: tensor.clone() for name, tensor in batch.items()}
        torch.cuda.empty_cache()  # as capturing does itself: what passes before have left is no graph's
        before, idle = store.filled(), _idle_bytes(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads that load data may allocate pinned memory meanwhile.
            mode = "thread_local"
            with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode=mode):
                report = self._function(static)
        except RuntimeError as error:
            self.works = False
            self._graphs.clear()
            text = str(error).strip().splitlines() or ["no reason given"]
            logger.warning(
                "parallel.options.cuda_graph: this model cannot be captured, training goes on without graphs. %s",
                text[0],
            )
            torch.cuda.synchronize()
            del graph  # what was recorded holds memory that going on without graphs needs
            torch.cuda.empty_cache()
            store.discard()
            store.mark_filled(before)
            return None
        self.idle_bytes += max(0, _idle_bytes(self._device) - idle)
        found = self._graphs[key] = Captured(graph, static, report, store.filled())
        store.mark_filled(before)
        return found


def _idle_bytes(device: str) -> int:
    """Memory that torch holds and nothing lives in."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
