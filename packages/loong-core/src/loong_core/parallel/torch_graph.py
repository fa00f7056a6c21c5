"""What is done with a micro-batch as one CUDA graph: the host launches once what were thousands of kernels.

A graph is good for one combination of shapes, and for the buffers that hold gradients already: those of a step's first
micro-batch fill them, those of a later one are added. Collectives stay outside; a graph records events by which they
run beside its replay (`FlatStore.recorded`). Where capturing fails, a reason
is logged once and the engine goes on without graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from loong_core.log import logger

if TYPE_CHECKING:
    from loong_core.parallel.torch_flat import FlatStore
    from loong_core.train.engine import Batch

WARM_UP = 2
"""Steps in which a combination runs eagerly first: libraries choose kernels and allocate on their first calls. Steps,
not micro-batches: all that a step's micro-batches have in common is captured in the same one, so that hardly a pass
needs memory beside that of graphs."""

Key = tuple[Any, ...]
Events = AbstractContextManager[list[torch.cuda.Event]]


class Captured(NamedTuple):
    """A graph with its inputs and its result, which buffers hold gradients once it has run, and the events of buckets
    that are complete."""

    graph: Any
    batch: Batch
    result: Any
    filled: tuple[bool, ...]
    events: list[torch.cuda.Event]


class Graphs:
    """Runs `function(batch)`, by graph where there is one. All of it happens on `stream`, whose work goes before that
    of streams of a higher `priority`. `what` names the function in the log.

    The graphs share memory among them, so no two may run at a time; those of two `Graphs` may. `held` gives what all
    graphs of the process hold, where these are not all.
    """

    def __init__(
        self,
        function: Callable[[Batch], Any],
        what: str,
        most: int,
        device: str,
        priority: int = 0,
        held: Callable[[], int] | None = None,
    ) -> None:
        self.works = True
        self.idle_bytes = 0
        """What graphs use while they run, which the allocator counts as allocated only while they are captured."""
        self.stream = torch.cuda.Stream(device, priority=priority)
        self._function, self._what, self._device = function, what, device
        self._held = held or (lambda: self.idle_bytes)
        self._most = most
        self._pool = torch.cuda.graph_pool_handle()
        self._kinds: dict[tuple[bool, ...], int] = {}
        self._seen: dict[Key, set[int]] = {}
        self._graphs: dict[Key, Captured] = {}

    def __call__(self, batch: Batch, step: int, store: FlatStore | None = None, last: bool = False) -> Any:
        """What the function gives for a micro-batch of a step: a tensor or a dict of them, which no later call writes
        to. `store` holds the gradients that it makes, and reduces them meanwhile if this is the step's `last`."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            result = self._run(batch, step, store, last)
        # Each stream waits for the other, so memory that one of them frees is not written to before both are done.
        here.wait_stream(self.stream)
        return result

    def _run(self, batch: Batch, step: int, store: FlatStore | None, last: bool) -> Any:
        shapes = sorted((name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in batch.items())
        filled = () if store is None else store.filled()
        key = (self._kinds.setdefault(filled, len(self._kinds)), *shapes)
        captured = self._graphs.get(key)
        if captured is None and self.works and len(self._graphs) < self._most:
            seen = self._seen.setdefault(key, set())
            if len(seen - {step}) >= WARM_UP:
                captured = self._capture(key, batch, filled, store)
            elif len(seen) < WARM_UP:
                seen.add(step)
        if captured is None:
            self._make_room()
            if store is not None and last:
                store.expect_last()
            return self._function(batch)
        for name, tensor in batch.items():
            captured.batch[name].copy_(tensor)
        captured.graph.replay()
        if store is not None:
            store.mark_filled(captured.filled)
            if last:
                store.reduce_as_recorded(captured.events)
        if isinstance(captured.result, dict):
            return {name: tensor.clone() for name, tensor in captured.result.items()}
        return captured.result.clone()

    def _capture(self, key: Key, batch: Batch, filled: tuple[bool, ...], store: FlatStore | None) -> Captured | None:
        """Record one micro-batch; nothing is computed yet, and the buffers are as `filled` as before."""
        static = {name: tensor.clone() for name, tensor in batch.items()}
        torch.cuda.empty_cache()  # as capturing does itself: what passes before have left is no graph's
        idle = _idle_bytes(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads that load data may allocate pinned memory meanwhile.
            mode = "thread_local"
            recorded: Events = nullcontext([]) if store is None else store.recorded()
            with (
                recorded as events,
                torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode=mode),
            ):
                result = self._function(static)
        except RuntimeError as error:
            text = str(error).strip().splitlines() or ["no reason given"]
            del graph  # what was recorded holds memory that going on without graphs needs
            self._give_up(f"this model cannot be captured, training goes on without graphs. {text[0]}")
            if store is not None:
                store.discard()
                store.mark_filled(filled)
            return None
        self.idle_bytes += max(0, _idle_bytes(self._device) - idle)
        then = () if store is None else store.filled()
        found = self._graphs[key] = Captured(graph, static, result, then, events)
        if store is not None:
            store.mark_filled(filled)
        return found

    def _make_room(self) -> None:
        """Before a pass without a graph, which can use nothing of what graphs hold, and takes about as much: they share
        their memory, so it is that of the largest."""
        if not self._graphs:
            return
        free, _ = torch.cuda.mem_get_info(self._device)
        if free + _idle_bytes(self._device) - self._held() >= self.idle_bytes:
            return
        held = self.idle_bytes / 2**30
        self._give_up(
            f"a batch of another shape has no room beside the graphs, which hold {held:.1f} GiB. Training goes on "
            "without graphs; a smaller data.micro_batch has both."
        )

    def _give_up(self, reason: str) -> None:
        """Go on without graphs, and give their memory back."""
        logger.warning("parallel.options.cuda_graph, %s: %s", self._what, reason)
        torch.cuda.synchronize()
        self.works, self.idle_bytes = False, 0
        self._graphs.clear()
        torch.cuda.empty_cache()


def _idle_bytes(device: str) -> int:
    """Memory that torch holds and nothing lives in."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
