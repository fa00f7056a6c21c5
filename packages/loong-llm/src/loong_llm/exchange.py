"""Every rank's experts over the tokens of all ranks of a group, in pieces: one travels while another is computed.

A piece is gathered, goes through the experts held here, and what they add is summed where its tokens live; backward
is the same the other way round. Autograd sees one step, because it would run the pieces one after the other: forward
keeps a graph of each piece, backward walks through it as soon as the piece's gradients are here. What it leaves of the
weights' gradients is computed while the tokens' travel back.

Shape legend: t tokens of this rank, r ranks, k experts chosen for each token, n hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from loong_core.parallel.fetch import Fetched
from loong_core.parallel.gradient_buffer import put_off
from loong_core.parallel.transport import Collectives, Handle, Transport
from loong_llm.inner_graph import gradients

Compute = Callable[[Tensor, Tensor, Tensor, Callable[[], int]], Tensor]
"""Tokens [m,n], weights [m,k], chosen experts [m,k] and what tells how many of those are held here, for which the host
waits -> what the experts held here add, [m,n]."""


class _Piece(NamedTuple):
    """Where backward begins and ends. `added` is an edge of the graph: the values are with their owners by then."""

    tokens: Tensor
    weights: Tensor
    added: GradientEdge


MANY = 16384
"""Tokens of a rank from which they travel in two pieces among more than two ranks. With 32,768 a step took 537 ms
instead of 552 on four H200s, by copies; on two, among which a third as many bytes travel, 485 instead of 478, by
collectives (docs/performance.md). With few tokens the host is the limit."""


def pieces_of(tokens: int, ranks: int) -> int:
    """The pieces in which so many tokens of each rank travel, where nobody says otherwise."""
    return 2 if tokens >= MANY and ranks > 2 else 1


Arriving = list[tuple[Tensor, Handle]]
"""Pieces of everyone's tokens, [r,m,n] each, once their handle was waited for."""


def start(hidden: Tensor, share: Share) -> Arriving:
    """Send hidden [t,n] on its way, before it is known which experts are chosen for it."""
    return [share.transport.gather(hidden.detach()[begin:end]) for begin, end in share.cuts(len(hidden))]


def exchange(
    hidden: Tensor,
    weights: Tensor,
    chosen: Tensor,
    parameters: Sequence[Tensor],
    share: Share,
    compute: Compute,
    arriving: Arriving | None = None,
) -> Tensor:
    """hidden [t,n] -> [t,n], the sum of what every rank's `compute` adds to a token. `weights` [t,k] are those of the
    experts chosen for it, `chosen` [t,k]; both of this rank's tokens, as `hidden`. `parameters` are what `compute`
    trains. `arriving` is what `start` gave, where it was called. All ranks have the same number of tokens."""
    small = Collectives(share.group)
    everywhere, here = small.gather(chosen.int())
    weighed = small.gather(weights.detach())  # at once, because the choice is worked on while they come
    here.wait()
    held = everywhere.div(share.experts, rounding_mode="floor") == share.group.rank()
    pairs = Fetched(held.sum((0, 2), dtype=torch.int32))
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden, weights, *parameters))
    step = _Step(share, share.cuts(len(hidden)), everywhere, weighed, pairs, compute, keep)
    output: Tensor = _Exchange.apply(step, arriving, hidden, weights, *parameters)
    return output


class Share(NamedTuple):
    """This rank's share of a layer: `experts` experts; each rank of `group` has as many, in order. Tokens go to and fro
    in `pieces`, by `transport`; what is small by collectives. Gathered `again` for backward, those of other ranks are
    not kept."""

    group: Any
    experts: int
    pieces: int
    transport: Transport
    again: bool = False

    @property
    def ranks(self) -> int:
        """Ranks of the group."""
        return int(self.group.size())

    @property
    def first(self) -> int:
        """The first expert held here."""
        return int(self.group.rank()) * self.experts

    def cuts(self, tokens: int) -> list[tuple[int, int]]:
        """The pieces of so many tokens. The first and the last are half as large as those between: nothing is computed
        while the first comes or the last leaves."""
        parts = max(1, 2 * self.pieces - 2)
        ends = [0, *(tokens * part // parts for part in range(1, parts, 2)), tokens]
        return [(begin, end) for begin, end in zip(ends[:-1], ends[1:], strict=True) if begin < end] or [(0, tokens)]


class _Step(NamedTuple):
    """What an exchange needs beside the tensors that autograd follows. `chosen` [r,t,k] are everyone's, and so are
    `weights` [r,t,k] once their handle was waited for; `pairs` [t] are how many are held here at each place of a rank's
    tokens. `keep` is whether there will be a backward."""

    share: Share
    cuts: list[tuple[int, int]]
    chosen: Tensor
    weights: tuple[Tensor, Handle]
    pairs: Fetched
    compute: Compute
    keep: bool

    def pairs_of(self, piece: int) -> int:
        """How many pairs of a piece's tokens and their experts are held here. The host waits."""
        begin, end = self.cuts[piece]
        return int(self.pairs.get()[begin:end].sum())


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, step: _Step, arriving: Arriving | None, hidden: Tensor, weights: Tensor, *parameters: Tensor
    ) -> Tensor:
        share = step.share
        everyones, weighed = step.weights
        if arriving is None:
            arriving = start(hidden, share)
        output = _room(hidden)
        pieces, leaving = [], []
        for number, ((begin, end), (tokens, here)) in enumerate(zip(step.cuts, arriving, strict=True)):
            here.wait()
            if not number:
                weighed.wait()
            own = everyones[:, begin:end].flatten(0, 1)
            chosen = step.chosen[:, begin:end].flatten(0, 1)
            tokens = tokens.flatten(0, 1)
            if step.keep:
                tokens.requires_grad_(ctx.needs_input_grad[2])
                own = own.detach().requires_grad_(ctx.needs_input_grad[3])
            with torch.set_grad_enabled(step.keep):
                added = step.compute(tokens, own, chosen, partial(step.pairs_of, number))
            leaving.append(share.transport.scatter(added.detach(), output[begin:end]))
            if step.keep:
                pieces.append(_Piece(tokens, own, get_gradient_edge(added)))
                if share.again:
                    tokens.untyped_storage().resize_(0)
        for done in leaving:
            done.wait()
        ctx.step, ctx.pieces, ctx.parameters = step, pieces, parameters
        ctx.shape = weights.shape
        if share.again:
            ctx.save_for_backward(hidden)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        step, share = ctx.step, ctx.step.share
        of_hidden = _room(gradient) if ctx.needs_input_grad[2] else None
        of_weights = None
        of_parameters: list[Tensor | None] = [None] * len(ctx.parameters)
        arriving = []
        for (begin, end), piece in zip(step.cuts, ctx.pieces, strict=True):
            arriving.append(list(share.transport.gather(gradient[begin:end])))
            if share.again:
                (hidden,) = ctx.saved_tensors
                arriving[-1].append(share.transport.gather(hidden[begin:end], _emptied(piece.tokens, share))[1])
        leaving = []
        for (begin, end), (added, *here) in zip(step.cuts, arriving, strict=True):
            tokens, own, sums = ctx.pieces.pop(0)  # their memory is free as soon as this piece is done
            for handle in here:
                handle.wait()
            with put_off() as products:
                of_tokens, of_own, *parts = gradients(sums, (tokens, own, *ctx.parameters), added.flatten(0, 1))
            if of_hidden is not None:
                leaving.append(share.transport.scatter(of_tokens, of_hidden[begin:end]))
            while products:
                products.pop(0)()
            if ctx.needs_input_grad[3]:
                own_of_all = of_own.unflatten(0, (share.ranks, -1))
                if of_weights is None:
                    of_weights = own_of_all.new_empty((share.ranks, *ctx.shape))
                of_weights[:, begin:end] = own_of_all
            of_parameters = [_sum(*pair) for pair in zip(of_parameters, parts, strict=True)]
        if of_weights is not None:
            summed = of_weights.new_empty(ctx.shape)
            leaving.append(Collectives(share.group).scatter(of_weights.flatten(0, 1), summed))
            of_weights = summed
        for done in leaving:
            done.wait()
        return None, None, of_hidden, of_weights, *of_parameters


def _room(tensor: Tensor) -> Tensor:
    """For as much; messages want rows that follow each other."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _emptied(tokens: Tensor, share: Share) -> Tensor:
    """Room [r,m,n] for the same values in the storage of `tokens` [r*m,n], which was given up. Autograd does not count
    what is written there as a change of `tokens`."""
    storage = tokens.untyped_storage()
    storage.resize_(tokens.nbytes)
    return tokens.new_empty(0).set_(storage, 0, tokens.shape, tokens.stride()).unflatten(0, (share.ranks, -1))


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other
