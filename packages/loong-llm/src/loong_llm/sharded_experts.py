"""Experts that travel to the tokens: a rank holds its share of a layer's experts and computes with all of them.

It is what fully sharded data parallelism (ZeRO-3, arXiv 1910.02054) does with every weight, and Janus (SIGCOMM 2023,
"data-centric") with experts: they are gathered from the ranks that hold them before a layer is computed, and what each
rank finds of their gradients is summed where they are held. What travels does not depend on the tokens. So it is under
way while other layers are computed, no rank waits for another one's routing, and the host learns no counts.

Two layers are whole at a time, layer n in room n % 2. Forward and backward go from neighbour to neighbour, so once a
layer is computed its room is free for the one after the next.

Shape legend: t tokens of this rank, k experts chosen for each, r ranks, e experts held by each, n hidden size, f size
of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from loong_core.parallel.gradient_buffer import buffer_of, buffer_to_fill, mark_added
from loong_core.parallel.transport import Cargo, Handle, SumParts, Transport, TransportName, between
from loong_llm.inner_graph import gradients

ROOMS = 2
WEIGHTS = Cargo("experts' weights", urgent=False)
GRADIENTS = Cargo("experts' gradients", urgent=False, ahead=2)

Stacks = tuple[Tensor, Tensor]
"""`up` [e,2f,n] and `down` [e,n,f] of a layer; whole, of all r*e experts."""
Compute = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Tokens [t,n], weights [t,k], and whole `up` and `down` -> [t,n]."""


class ShardedExperts:
    """The layers with experts of a rank's pipeline chunks, in order; each has a place, counted from 0.

    `recomputes` is whether layers are computed again for backward: their backward then follows at once.
    """

    def __init__(self, group: Any, by: TransportName, sum_parts: SumParts, *, recomputes: bool) -> None:
        """For ranks of `group`, each of which holds as many experts, in order. Collective."""
        # A transport each: weights that are wanted next do not queue behind gradients.
        self._weights: Transport = between(group, by, sum_parts, WEIGHTS)
        self._gradients: Transport = between(group, by, sum_parts, GRADIENTS)
        self._ranks = int(group.size())
        self.recomputes = recomputes
        self._layers: list[Callable[[], Stacks]] = []
        self._chunks: list[int] = []
        self._rooms = [_Room() for _ in range(ROOMS)]
        self._entered: tuple[int, _Sums, Tensor] | None = None

    # ---------------------------------------------------------------------------------------------- as it is built
    def begin_chunk(self) -> None:
        """What is added from here on belongs to a next chunk."""
        self._chunks.append(len(self._layers))

    def add(self, layer: Callable[[], Stacks]) -> int:
        """A further layer, the weights of which on this rank `layer` gives. Returns its place."""
        self._layers.append(layer)
        return len(self._layers) - 1

    def _end(self, chunk: int) -> int:
        return self._chunks[chunk + 1] if chunk + 1 < len(self._chunks) else len(self._layers)

    def _neighbour(self, place: int, step: int) -> int | None:
        """The place `step` further on, if it is in the same chunk."""
        chunk = max(number for number, begin in enumerate(self._chunks) if begin <= place)
        return place + step if self._chunks[chunk] <= place + step < self._end(chunk) else None

    # ------------------------------------------------------------------------------------------------ as it is used
    def start(self, chunk: int) -> None:
        """Begin a forward pass of a chunk: weights may have changed since the last, so its first layers come anew."""
        begin, end = self._chunks[chunk], self._end(chunk)
        for place in range(begin, min(begin + ROOMS, end)):
            self._fetch(place)

    def enter(self, place: int) -> None:
        """The layer at `place` begins: the gradients of its experts are waited for when all of its backward has been
        launched, attention's too, because autograd runs what was recorded last first. Without a call: at once."""
        if torch.is_grad_enabled():
            self._entered = place, *self._landing(place)

    def forward(self, place: int, hidden: Tensor, weights: Tensor, compute: Compute) -> Tensor:
        """hidden [t,n] with `weights` [t,k] of the experts chosen for them through the layer at `place` -> [t,n]."""
        entered, self._entered = self._entered, None
        sums, landing = entered[1:] if entered is not None and entered[0] == place else self._landing(place)
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden, weights, landing))
        output: Tensor = _Visit.apply(_Step(self, place, sums, compute, keep), hidden, weights, landing)
        return output

    def whole(self, place: int) -> Stacks:
        """All experts of a layer. What they are is kept until `passed`."""
        room = self._rooms[place % ROOMS]
        if room.holds != place:
            self._fetch(place)
        room.wait()
        assert room.stacks is not None
        return room.stacks

    def passed(self, place: int, step: int) -> None:
        """A layer is computed; the next in its room comes, `step` places further on."""
        if (following := self._neighbour(place, step)) is not None:
            self._fetch(following)

    def _fetch(self, place: int) -> None:
        room = self._rooms[place % ROOMS]
        room.wait()
        shards = self._layers[place]()
        if room.stacks is None:
            up, down = (shard.new_empty((self._ranks * len(shard), *shard.shape[1:])) for shard in shards)
            room.stacks = up.detach(), down.detach()
        for shard, stack in zip(shards, room.stacks, strict=True):
            room.coming.append(self._weights.gather(shard.detach(), stack.unflatten(0, (self._ranks, -1)))[1])
        room.holds = place

    def _landing(self, place: int) -> tuple[_Sums, Tensor]:
        sums = _Sums(self._gradients, self._layers[place]())
        return sums, _Landing.apply(sums, *sums.shards)


class _Room:
    """Where a layer is whole, and the place of that layer."""

    def __init__(self) -> None:
        self.stacks: Stacks | None = None
        self.holds: int | None = None
        self.coming: list[Handle] = []

    def wait(self) -> None:
        """The current stream goes on when all is there."""
        while self.coming:
            self.coming.pop().wait()


class _Sums:
    """The gradients of one layer's experts in one micro-batch, on their way to the ranks that hold these experts."""

    def __init__(self, transport: Transport, shards: Stacks) -> None:
        self.shards = shards
        self._transport = transport
        self._coming: list[tuple[Tensor, Handle] | None] = [None, None]
        self._buffers: list[tuple[Tensor | None, bool]] = [(None, False)] * 2

    def prepare(self, stacks: Stacks) -> None:
        """Give the whole stacks that are trained a buffer for their gradients, where their shards have one."""
        buffers = [getattr(shard, "main_grad", None) for shard in self.shards]
        trained = [
            stack for stack, buffer in zip(stacks, buffers, strict=True) if stack.requires_grad and buffer is not None
        ]
        if trained:
            outboxes = self._transport.outboxes(trained, next(buffer.dtype for buffer in buffers if buffer is not None))
            for stack, outbox in zip(trained, outboxes, strict=True):
                stack.main_grad, stack.main_grad_empty = outbox, True  # type: ignore[attr-defined]

    def start(self, found: list[Tensor | None]) -> None:
        """Of every rank what it has found of the gradients of all experts; None of a stack that is not trained."""
        for index, (shard, gradient) in enumerate(zip(self.shards, found, strict=True)):
            if gradient is None:
                continue
            buffer, empty = self._buffers[index] = buffer_to_fill(shard)
            if buffer is not None:
                gradient = gradient.to(buffer.dtype)  # what is summed, is in the precision of sums
            fits = buffer is not None and empty and buffer.is_contiguous()
            part = buffer if fits and buffer is not None else gradient.new_empty(shard.shape)
            self._coming[index] = part, self._transport.scatter(gradient, part)

    def finish(self) -> list[Tensor | None]:
        """Wait for the sums: put into the buffers of shards that have one, returned for autograd otherwise."""
        returned: list[Tensor | None] = []
        for shard, coming, (buffer, empty) in zip(self.shards, self._coming, self._buffers, strict=True):
            returned.append(None)
            if coming is None:
                continue
            part, handle = coming
            handle.wait()
            if buffer is None:
                returned[-1] = part.to(shard.dtype)
                continue
            if part is not buffer:
                (buffer.copy_ if empty else buffer.add_)(part)
            mark_added(shard)
        self._coming = [None, None]
        return returned


class _Landing(torch.autograd.Function):
    """Stands for a layer's shards in the graph: their gradients land once all who were given it have run backward."""

    @staticmethod
    def forward(ctx: Any, sums: _Sums, *shards: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.sums = sums
        return shards[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        return None, *ctx.sums.finish()


class _Step(NamedTuple):
    """What a visit needs beside the tensors that autograd follows. `keep` is whether there will be a backward."""

    experts: ShardedExperts
    place: int
    sums: _Sums
    compute: Compute
    keep: bool


class _Visit(torch.autograd.Function):
    """A layer's tokens through all of its experts, which are here for forward and once more for backward."""

    @staticmethod
    def forward(ctx: Any, step: _Step, hidden: Tensor, weights: Tensor, landing: Tensor) -> Tensor:
        experts, stacks = step.experts, step.experts.whole(step.place)
        if step.keep:
            hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[1])
            weights = weights.detach().requires_grad_(ctx.needs_input_grad[2])
            # `data`, because autograd must not mind that other layers use the room until backward.
            up, down = (
                stack.data.requires_grad_(shard.requires_grad)
                for stack, shard in zip(stacks, step.sums.shards, strict=True)
            )
            stacks = up, down
        with torch.set_grad_enabled(step.keep):
            added = step.compute(hidden, weights, *stacks)
        if not (step.keep and experts.recomputes):  # else backward comes at once
            experts.passed(step.place, ROOMS)
        if step.keep:
            ctx.step, ctx.inputs, ctx.added = step, (hidden, weights, *stacks), get_gradient_edge(added)
        return added.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        step, inputs = ctx.step, ctx.inputs
        step.experts.whole(step.place)
        step.sums.prepare(inputs[2:])
        of_hidden, of_weights, *of_stacks = gradients(ctx.added, inputs, gradient)
        step.experts.passed(step.place, -ROOMS)
        step.sums.start([_whole_of(*pair) for pair in zip(inputs[2:], of_stacks, strict=True)])
        ctx.inputs = ctx.added = None
        return None, of_hidden, of_weights, None


def _whole_of(stack: Tensor, found: Tensor | None) -> Tensor | None:
    """The gradient of a whole stack: as autograd `found` it, or where an op has put it. None where it has none."""
    if found is not None or not stack.requires_grad:
        return found
    buffer = buffer_of(stack)
    return torch.zeros_like(stack) if buffer is None else buffer
