"""What a step's micro-batches become before anything trained sees them, computed beside the step before.

The frozen part of a model (GR00T's backbone) depends on no update. Its large products run on a stream of lower
priority, where the trained part, many small kernels and an optimizer that waits for memory, leaves the device room.
What is computed is the same as without, so a run may be resumed, evaluated or compared as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from loong_core.parallel.torch_graph import Graphs

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.train.engine import Batch

FIRST = -1
"""Priority of a stream whose work goes before what runs ahead (CUDA's smaller numbers go first)."""


class Ahead:
    """Micro-batches of a step: on the device, with what `frozen(batch)` gives.

    `place` copies a micro-batch to the device; `graphs` is the number of CUDA graphs, 0 for none, and `held` what all
    graphs of the process hold.
    """

    def __init__(
        self,
        frozen: Callable[[Batch], dict[str, Tensor]],
        place: Callable[[Batch], Batch],
        graphs: int,
        device: str,
        held: Callable[[], int],
    ) -> None:
        self._frozen, self._place = frozen, place
        self._step: int | None = None
        self._ready: list[Batch] = []
        self._done: torch.cuda.Event | None = None
        self._after: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None
        self._graphs: Graphs | None = None
        if torch.device(device).type == "cuda":
            self._graphs = Graphs(frozen, "frozen part", graphs, device, held=held) if graphs else None
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
                found = self._frozen(placed) if self._graphs is None else self._graphs(placed, step)
                self._ready.append({**placed, **found})
            self._step = step
            if self._stream is not None:
                self._done = self._stream.record_event()

    def forget(self) -> None:
        """Drop what was begun: the frozen weights are others now."""
        self._ready = []

    def take(self, batches: Sequence[Batch], step: int) -> list[Batch]:
        """The micro-batches of a step, for the current stream: those that were begun, or begun now."""
        here = None if self._stream is None else torch.cuda.current_stream()
        if self._step != step or not self._ready:
            # Nothing is known of what came before, loading of weights for one: it has to be over.
            self._after = None if here is None else here.record_event()
            self.begin(batches, step)
        ready, self._ready = self._ready, []
        assert len(ready) == len(batches), "the data gave other batches ahead of the step than in it"
        if here is not None and self._done is not None:
            here.wait_event(self._done)
            for batch in ready:
                for tensor in batch.values():
                    tensor.record_stream(here)
        return ready
