"""What is done with a micro-batch as one CUDA graph: the host launches once what were thousands of kernels.

A graph is good for one combination of shapes, and for one progress of a step: the gradients of its first micro-batch
fill the buffers, those of later ones are added, and during the last one they are reduced. Where capturing fails, a
reason is logged once and the engine goes on without graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from loong_core.log import logger

if TYPE_CHECKING:
    from loong_core.parallel.torch_flat import FlatStore
    from loong_core.train.engine import Batch

WARM_UP = 2
"""Micro-batches of a combination that run eagerly first: libraries choose kernels and allocate on their first calls."""

Key = tuple[Any, ...]


class Captured(NamedTuple):
    """A graph with its inputs and its result, and which buffers hold gradients once it has run."""

    graph: Any
    batch: Batch
    result: Any
    progress: tuple[bool, ...]


class Graphs:
    """Runs functions of a batch, by graph where there is one. All of it happens on `stream`, whose work goes before
    that of streams of a higher `priority`.

    The graphs share memory among them, so no two may run at a time; those of two `Graphs` may.
    """

    def __init__(self, most: int, device: str, priority: int = 0) -> None:
        self.works = True
        self.idle_bytes = 0
        """What graphs use while they run, which the allocator counts as allocated only while they are captured."""
        self.stream = torch.cuda.Stream(device, priority=priority)
        self._device = device
        self._most = most
        self._pool = torch.cuda.graph_pool_handle()
        self._seen: dict[Key, int] = {}
        self._graphs: dict[Key, Captured] = {}

    def __call__(
        self, function: Callable[[Batch], Any], batch: Batch, kind: Key = (), store: FlatStore | None = None
    ) -> Any:
        """What `function(batch)` gives: a tensor or a dict of them, which no later call writes to.

        `kind` is what the function depends on beside the batch's shapes; `store` holds the gradients that it makes.
        """
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            result = self._run(function, batch, kind, store)
        # Each stream waits for the other, so memory that one of them frees is not written to before both are done.
        here.wait_stream(self.stream)
        return result

    def _run(self, function: Callable[[Batch], Any], batch: Batch, kind: Key, store: FlatStore | None) -> Any:
        shapes = sorted((name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in batch.items())
        key = (kind, *shapes)
        captured = self._graphs.get(key)
        if captured is None:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self.works and self._seen[key] > WARM_UP and len(self._graphs) < self._most:
                captured = self._capture(function, key, batch, store)
        if captured is None:
            self._make_room()
            return function(batch)
        for name, tensor in batch.items():
            captured.batch[name].copy_(tensor)
        captured.graph.replay()
        if store is not None:
            store.set_progress(captured.progress)
        if isinstance(captured.result, dict):
            return {name: tensor.clone() for name, tensor in captured.result.items()}
        return captured.result.clone()

    def _capture(
        self, function: Callable[[Batch], Any], key: Key, batch: Batch, store: FlatStore | None
    ) -> Captured | None:
        """Record one micro-batch; nothing is computed yet."""
        static = {name: tensor.clone() for name, tensor in batch.items()}
        torch.cuda.empty_cache()  # as capturing does itself: what passes before have left is no graph's
        before, idle = () if store is None else store.progress(), _idle_bytes(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads that load data may allocate pinned memory meanwhile.
            mode = "thread_local"
            with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode=mode):
                result = function(static)
        except RuntimeError as error:
            text = str(error).strip().splitlines() or ["no reason given"]
            del graph  # what was recorded holds memory that going on without graphs needs
            self._give_up(f"this model cannot be captured, training goes on without graphs. {text[0]}")
            if store is not None:
                store.discard()
                store.set_progress(before)
            return None
        self.idle_bytes += max(0, _idle_bytes(self._device) - idle)
        found = self._graphs[key] = Captured(graph, static, result, () if store is None else store.progress())
        if store is not None:
            store.set_progress(before)
        return found

    def _make_room(self) -> None:
        """Before a pass without a graph, which can use nothing of what graphs hold, and takes about as much: they share
        their memory, so it is that of the largest."""
        if not self._graphs:
            return
        free, _ = torch.cuda.mem_get_info(self._device)
        if free + _idle_bytes(self._device) - self.idle_bytes >= self.idle_bytes:
            return
        held = self.idle_bytes / 2**30
        self._give_up(
            f"a batch of another shape has no room beside the graphs, which hold {held:.1f} GiB. Training goes on "
            "without graphs; a smaller data.micro_batch has both."
        )

    def _give_up(self, reason: str) -> None:
        """Go on without graphs, and give their memory back."""
        logger.warning("parallel.options.cuda_graph: %s", reason)
        torch.cuda.synchronize()
        self.works, self.idle_bytes = False, 0
        self._graphs.clear()
        torch.cuda.empty_cache()


def _idle_bytes(device: str) -> int:
    """Memory that torch holds and nothing lives in."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
