"""What a step's micro-batches become before anything trained sees them, computed beside the step before.

The frozen part of a model (GR00T's backbone) depends on no update. Its large products run on a stream of lower
priority, where the trained part, many small kernels and an optimizer that waits for memory, leaves the device room.
What is computed is the same as without, so a run may be resumed, evaluated or compared as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from loong_core.parallel.torch_graph import Graphs

if TYPE_CHECKING:
    from loong_core.train.engine import Batch

FIRST = -1
"""Priority of a stream whose work goes before what runs ahead (CUDA's smaller numbers go first)."""


class Ahead:
    """Micro-batches of the next step: on the device, with what `module.frozen(batch)` gives.

    `place` copies a micro-batch to the device; `graphs` is the number of CUDA graphs, 0 for none.
    """

    def __init__(self, module: Any, place: Callable[[Batch], Batch], graphs: int, device: str) -> None:
        self._frozen: Callable[[Batch], dict[str, torch.Tensor]] = module.frozen
        self._place = place
        self._step: int | None = None
        self._ready: list[Batch] = []
        self._done: torch.cuda.Event | None = None
        self._after: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None
        self._graphs: Graphs | None = None
        if torch.device(device).type == "cuda":
            self._graphs = Graphs(graphs, device) if graphs else None
            self._stream = torch.cuda.Stream(device) if self._graphs is None else self._graphs.stream

    @property
    def idle_bytes(self) -> int:
        """What CUDA graphs use while they run."""
        return 0 if self._graphs is None else self._graphs.idle_bytes

    def begin(self, batches: Sequence[Batch], step: int) -> None:
        """Work on the micro-batches of a 0-based step; the host does not wait."""
        with torch.no_grad(), nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if self._stream is not None and self._after is not None:
                self._stream.wait_event(self._after)
                self._after = None
            self._ready = []
            for batch in batches:
                placed = self._place(batch)
                found = self._frozen(placed) if self._graphs is None else self._graphs(self._frozen, placed)
                self._ready.append({**placed, **found})
            self._step = step
            if self._stream is not None:
                self._done = self._stream.record_event()

    def forget(self) -> None:
        """Drop what was begun: the frozen weights are others now."""
        self._ready = []

    def take(self, step: int) -> list[Batch] | None:
        """The micro-batches of a step, for the current stream; None where `begin` was not called for it."""
        ready, self._ready = self._ready, []
        here = None if self._stream is None else torch.cuda.current_stream()
        if self._step != step or not ready:
            # Nothing is known of what came before, loading of weights for one: what is next begun waits for it.
            self._after = None if here is None else here.record_event()
            return None
        if here is not None and self._done is not None:
            here.wait_event(self._done)
            for batch in ready:
                for tensor in batch.values():
                    tensor.record_stream(here)
        return ready
