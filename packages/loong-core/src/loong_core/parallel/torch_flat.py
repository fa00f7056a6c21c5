"""Whole parameters in flat buffers, with their gradients in flat float32 buffers that ranks reduce bucket by bucket.

A parameter's gradient is added to its place in the buffer as soon as autograd has it, or written there by the op that
computes it (`gradient_buffer`); torch's own `.grad` lives for a moment. Buckets are filled in the order in which
backward passes reach parameters, and reduced in that order on every rank, whatever is unused on one of them, and
whether a rank runs the pass itself or replays a CUDA graph of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from loong_core.parallel import gradient_buffer
from loong_core.parallel.adamw import Shard

ALIGNMENT = 64
"""Elements: every parameter begins on a line of 128 bytes, which kernels that load tiles ask for."""


_TOGETHER = 32
"""Gradients that are brought to their buffers by one kernel: a launch for each would keep the host busy."""


class Place(NamedTuple):
    """Where a parameter lies in its bucket, and whether it has weight decay."""

    parameter: Any
    begin: int
    end: int
    decayed: bool


@dataclass
class Bucket:
    """Parameters of one dtype whose gradients are reduced together; the decayed ones come first."""

    parameters: Tensor
    gradients: Tensor
    places: list[Place]
    missing: int = 0
    """Parameters that the last backward pass has not reached yet."""
    handle: Any = None
    gathering: Any = None
    trained: list[Any] = field(default_factory=list)


class FlatStore:
    """`parameters` (trained; in the order of their gradients) in buckets of about `bucket_size` elements. Those of
    `decayed` have weight decay.

    With `sharded`, each rank updates its own equal part of every bucket: gradients are reduce-scattered, parameters
    gathered after the update. Without, gradients are all-reduced and every rank updates everything.
    """

    def __init__(
        self,
        parameters: Sequence[Any],
        *,
        decayed: set[Any],
        sharded: bool,
        gradients: torch.dtype,
        bucket_size: int,
        overlap: bool,
    ) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.sharded = sharded and self.world > 1
        self._overlap = overlap and self.world > 1
        self._gradients = gradients
        self._complete: Callable[[Bucket], None] | None = None
        self._next = 0
        self._reductions: torch.cuda.Stream | None = None
        self._ends: dict[int, Bucket] = {}
        self._waiting: list[tuple[Any, Tensor]] = []
        size = bucket_size if self.world > 1 else 2**62
        self.buckets = [self._bucket(group, decayed) for group in _groups(parameters, size)]
        self._bucket_of = {place.parameter: bucket for bucket in self.buckets for place in bucket.places}
        self._nodes = [self._watch(parameter) for parameter in self._bucket_of]

    def _bucket(self, group: Sequence[Any], decayed: set[Any]) -> Bucket:
        """Move the parameters into a buffer of their own; the tensors themselves stay the same objects."""
        places, end = [], 0
        for parameter in sorted(group, key=lambda parameter: parameter not in decayed):
            places.append(Place(parameter, end, end + parameter.numel(), parameter in decayed))
            end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        end += -end % (ALIGNMENT * self.world)
        like = places[0].parameter
        bucket = Bucket(
            parameters=torch.zeros(end, dtype=like.dtype, device=like.device),
            gradients=torch.zeros(end, dtype=self._gradients, device=like.device),
            places=places,
            trained=[place.parameter for place in places],
        )
        for parameter, begin, stop, _ in places:
            flat = bucket.parameters[begin:stop].view(parameter.shape)
            flat.copy_(parameter.detach())
            parameter.data = flat
            parameter.main_grad = bucket.gradients[begin:stop].view(parameter.shape)
            parameter.main_grad_empty = False
        return bucket

    def _watch(self, parameter: Any) -> Any:
        """Call `_arrived` whenever autograd is done with `parameter`: also where an op delivered the gradient, and none
        is left for autograd. The node has to be kept: its hooks go with it."""
        node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
        node.register_hook(lambda *_: self._arrived(parameter))
        return node

    # ------------------------------------------------------------------------------------------------ a step
    def begin(self) -> None:
        """Start a step: what the buffers hold is of no use any more."""
        self.discard()
        for parameter in self._bucket_of:
            parameter.main_grad_empty = True

    def expect_last(self) -> None:
        """The next backward pass is the step's last: buckets may be reduced as soon as they are complete."""
        if self._overlap:
            self._expect(self._reduce)

    def _expect(self, complete: Callable[[Bucket], None]) -> None:
        """Call `complete` in the next backward pass for every bucket whose parameters it is done with, in order."""
        self._complete, self._next = complete, 0
        for bucket in self.buckets:
            bucket.missing = len(bucket.places)

    @contextmanager
    def recorded(self) -> Iterator[list[torch.cuda.Event]]:
        """Around the capture of a backward pass: replays record the events that are in the list afterwards, one for
        each of the first buckets, as soon as the bucket is complete."""
        events: list[torch.cuda.Event] = []

        def record(bucket: Bucket) -> None:
            self.flush()
            gradient_buffer.settle(bucket.trained)
            event = torch.cuda.Event(external=True)
            event.record()
            events.append(event)

        if self._overlap:
            self._expect(record)
        try:
            yield events
        finally:
            self._complete, self._next = None, 0

    def reduce_as_recorded(self, events: Sequence[torch.cuda.Event]) -> None:
        """Reduce buckets beside the step's last pass, a replay that is launched already and records `events`. The
        collectives themselves are no part of a graph: those have to be captured by all ranks or by none, and each rank
        has batches of its own shapes."""
        if events and self._reductions is None:
            self._reductions = torch.cuda.Stream(self.buckets[0].gradients.device)
        for bucket, event in zip(self.buckets, events, strict=False):
            with torch.cuda.stream(self._reductions):
                event.wait()
                self._reduce(bucket)
        self._next = len(events)

    def _arrived(self, parameter: Any) -> None:
        if parameter.grad_added_to_main_grad:
            parameter.grad_added_to_main_grad = False
        elif parameter.grad is not None:
            self._waiting.append((parameter, parameter.grad))
        parameter.grad = None
        if len(self._waiting) >= _TOGETHER:
            self.flush()
        if self._complete is not None:
            bucket = self._bucket_of[parameter]
            bucket.missing -= 1
            while self._next < len(self.buckets) and self.buckets[self._next].missing == 0:
                self._complete(self.buckets[self._next])
                self._next += 1

    def flush(self) -> None:
        """Bring gradients that wait for company to their buffers. To be called once a backward pass is over."""
        first: tuple[list[Tensor], list[Tensor]] = [], []
        later: tuple[list[Tensor], list[Tensor]] = [], []
        for parameter, gradient in self._waiting:
            buffer, empty = gradient_buffer.buffer_to_fill(parameter)
            assert buffer is not None
            for collected, tensor in zip(first if empty else later, (buffer, gradient), strict=True):
                collected.append(tensor)
        self._waiting.clear()
        if first[0]:
            torch._foreach_copy_(*first)
        if later[0]:
            torch._foreach_add_(*later)

    def discard(self) -> None:
        """Forget gradients that have not come to the buffers, after a pass that was broken off."""
        self._complete, self._next = None, 0
        self._waiting.clear()
        for bucket in self.buckets:
            bucket.handle = None
        for parameter in self._bucket_of:
            parameter.grad_added_to_main_grad = False
            parameter.grad = None

    def finish(self) -> None:
        """Reduce what has not been reduced yet. Parameters that no gradient has reached have a gradient of zeros."""
        self.flush()
        for bucket in self.buckets[self._next :]:
            self._reduce(bucket)
        self._complete, self._next = None, 0
        for bucket in self.buckets:
            if bucket.handle is not None:
                bucket.handle.wait()
                bucket.handle = None

    def _reduce(self, bucket: Bucket) -> None:
        self.flush()
        gradient_buffer.settle(bucket.trained)
        if self.sharded:
            mine = self._mine(bucket.gradients)
            bucket.handle = dist.reduce_scatter_tensor(mine, bucket.gradients, async_op=True)
        elif self.world > 1:
            bucket.handle = dist.all_reduce(bucket.gradients, async_op=True)

    def filled(self) -> tuple[bool, ...]:
        """Of each parameter whether its buffer holds a gradient."""
        return tuple(not parameter.main_grad_empty for parameter in self._bucket_of)

    def mark_filled(self, filled: Sequence[bool]) -> None:
        """The reverse, after something that ran without the hooks (a graph)."""
        for parameter, full in zip(self._bucket_of, filled, strict=True):
            parameter.main_grad_empty = not full

    # ------------------------------------------------------------------------------------------------ the update
    def _mine(self, buffer: Tensor) -> Tensor:
        width = buffer.numel() // self.world
        return buffer[self.rank * width : (self.rank + 1) * width]

    def counted(self) -> list[Tensor]:
        """The gradients of which this rank adds the squares to the norm: its equal part of every bucket."""
        return [self._mine(bucket.gradients) for bucket in self.buckets]

    def shards(self, make: Callable[[Tensor, Tensor, bool], Shard]) -> tuple[dict[Tensor, Shard], list[Shard]]:
        """What this rank updates of each parameter, and the longer ranges to update at a time that hold them.

        `make` brings the state of the optimizer for a range of parameters and gradients with or without decay.
        """
        by_parameter: dict[Tensor, Shard] = {}
        updates = []
        for bucket in self.buckets:
            span = None
            for decayed, begin, end in self._spans(bucket):
                span = make(bucket.parameters[begin:end], bucket.gradients[begin:end], decayed)
                updates.append(span)
                for place in bucket.places:
                    first, last = max(place.begin, begin), min(place.end, end)
                    if place.decayed == decayed and first < last:
                        where = slice(first - begin, last - begin)
                        by_parameter[place.parameter] = _part(span, where, first - place.begin)
            self._ends[id(span)] = bucket
        return by_parameter, updates

    def _spans(self, bucket: Bucket) -> Iterator[tuple[bool, int, int]]:
        """This rank's part of a bucket, cut where weight decay ends."""
        total = bucket.parameters.numel()
        width = total // self.world if self.sharded else total
        low = self.rank * width if self.sharded else 0
        cut = min((place.begin for place in bucket.places if not place.decayed), default=total)
        for decayed, first, last in ((True, 0, cut), (False, cut, total)):
            begin, end = max(first, low), min(last, low + width)
            if begin < end:
                yield decayed, begin, end

    def gather(self) -> None:
        """Begin to bring every rank the parameters that others have updated."""
        for bucket in self.buckets:
            self._gather(bucket)

    def gather_after(self, update: Shard) -> None:
        """The same for one bucket, if `update` is the last of it: beside the updates that follow."""
        bucket = self._ends.get(id(update))
        if bucket is not None:
            self._gather(bucket)

    def _gather(self, bucket: Bucket) -> None:
        if self.sharded:
            mine = self._mine(bucket.parameters)
            bucket.gathering = dist.all_gather_into_tensor(bucket.parameters, mine, async_op=True)

    def gathered(self) -> None:
        """Wait until that is done; the device waits, not the host."""
        for bucket in self.buckets:
            if bucket.gathering is not None:
                bucket.gathering.wait()
                bucket.gathering = None


def _groups(parameters: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """The parameters, in order, as lists of one dtype and at least `size` elements; the last of a dtype may be less."""
    open_: dict[torch.dtype, list[Any]] = {}
    for parameter in parameters:
        group = open_.setdefault(parameter.dtype, [])
        group.append(parameter)
        if sum(member.numel() for member in group) >= size:
            yield open_.pop(parameter.dtype)
    yield from open_.values()


def _part(span: Shard, where: slice, start: int) -> Shard:
    """The range of `span` that belongs to one parameter: views of the same memory."""
    return Shard(
        start=start,
        parameter=span.parameter[where],
        gradient=span.gradient[where],
        exp_avg=span.exp_avg[where],
        exp_avg_sq=span.exp_avg_sq[where],
        remainder=None if span.remainder is None else span.remainder[where],
        decayed=span.decayed,
        counted=span.counted,
        ema=None if span.ema is None else span.ema[where],
    )
