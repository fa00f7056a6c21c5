"""Degrees, stages and exact parameter counts of a parallel layout, as integer arithmetic on `ParameterSpec`s.

Specs are grouped by what decides their local size, and equal layers are counted once, so a plan of a model with tens
of thousands of specs costs as much as one with a handful of layers.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from loong_core.types import ModelShape, ParameterSpec
from loong_core.weights import padded_extent


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Resolved degrees of one layout. `dp` and `expert_dp` mean something only where the degrees divide the world."""

    world: int
    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def model_parallel(self) -> int:
        """Ranks that share one replica of the dense part of the model."""
        return self.tp * self.pp * self.cp

    @property
    def dp(self) -> int:
        """Data-parallel replicas of the dense part."""
        return self.world // self.model_parallel

    @property
    def expert_dp(self) -> int:
        """Replicas of the experts: what remains of a pipeline stage's ranks after `etp` and `ep`."""
        return self.world // (self.etp * self.ep * self.pp)


class Group(NamedTuple):
    """`number` parameters that are cut alike; `role` is the first of them, for messages."""

    shape: tuple[int, ...]
    axis: int | None
    blocks: int
    padded: bool
    expert: bool
    trainable: bool
    number: int
    role: str

    def degree(self, degrees: Degrees) -> int:
        """The tensor-parallel degree that cuts this group."""
        return degrees.etp if self.expert else degrees.tp

    def local(self, degrees: Degrees) -> int:
        """Elements of the whole group that one rank holds, padding included."""
        extents = list(self.shape)
        if self.axis is not None:
            degree = self.degree(degrees)
            extent = extents[self.axis]
            extents[self.axis] = (padded_extent(extent, degree, self.blocks) if self.padded else extent) // degree
        number = self.number // degrees.ep if self.expert else self.number
        return prod(extents) * number


class Count(NamedTuple):
    """Elements a rank holds: of the dense part and of experts, and how many of each are trained."""

    dense: int = 0
    expert: int = 0
    dense_trained: int = 0
    expert_trained: int = 0

    def plus(self, other: Count) -> Count:
        """Element-wise sum."""
        return Count(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    @property
    def total(self) -> int:
        """All elements."""
        return self.dense + self.expert


class Inventory:
    """The parameters of a model, grouped: outside the layers, and by kind of layer.

    `freeze` are fnmatch patterns of roles that are not trained, besides those that the family itself freezes.
    """

    def __init__(self, shape: ModelShape, freeze: Sequence[str] = ()) -> None:
        frozen = re.compile("|".join(fnmatch.translate(pattern) for pattern in freeze)) if freeze else None
        buckets: dict[int | str, list[tuple[ParameterSpec, bool]]] = {"first": [], "last": []}
        experts: dict[int | str, set[int]] = {}
        for spec in shape.parameters:
            trainable = not spec.frozen and (frozen is None or frozen.match(spec.role) is None)
            place = spec.layer if spec.place == "layer" and spec.layer is not None else spec.place
            buckets.setdefault(place, []).append((spec, trainable))
            if spec.expert is not None:
                experts.setdefault(place, set()).add(spec.expert)
        self.total = sum(spec.size for spec in shape.parameters)
        self.experts = sorted({len(numbers) for numbers in experts.values()})
        """The numbers of experts that occur in layers; empty for a dense model."""
        self.first = _groups(buckets["first"])
        self.last = _groups(buckets["last"])
        # With pipeline stages the head needs the embedding where the embedding is not: it holds a copy of its own.
        self.tied = tuple(group for group in self.first if group.padded) if shape.tied_embeddings else ()
        kinds: dict[tuple[tuple[object, ...], ...], int] = {}
        self.kinds: list[tuple[Group, ...]] = []
        self.kind_of: list[int] = []
        for layer in range(shape.layers):
            groups = _groups(buckets.get(layer, []))
            signature = tuple(group[:-1] for group in groups)
            if signature not in kinds:
                kinds[signature] = len(self.kinds)
                self.kinds.append(groups)
            self.kind_of.append(kinds[signature])

    @property
    def sparse_share(self) -> float:
        """The share of layers that have experts."""
        sparse = [any(group.expert for group in kind) for kind in self.kinds]
        return sum(sparse[kind] for kind in self.kind_of) / max(len(self.kind_of), 1)

    @property
    def experts_of_a_layer(self) -> Count:
        """The experts of the layer that has most of them, whole."""
        whole = Degrees(world=1)
        kinds = (_count([group for group in kind if group.expert], whole) for kind in self.kinds)
        return max(kinds, key=lambda count: count.total, default=Count())

    @property
    def groups(self) -> tuple[Group, ...]:
        """Every distinct group of the model."""
        return (*self.first, *(group for kind in self.kinds for group in kind), *self.last)

    def per_stage(self, degrees: Degrees, stages: Sequence[Sequence[int]]) -> list[Count]:
        """What each pipeline stage's ranks hold. Ranks of one stage hold equally much: experts divide evenly."""
        kinds = [_count(groups, degrees) for groups in self.kinds]
        result = [Count() for _ in range(degrees.pp)]
        for index, layers in enumerate(stages):
            stage = index % degrees.pp
            for layer in layers:
                result[stage] = result[stage].plus(kinds[self.kind_of[layer]])
        result[0] = result[0].plus(_count(self.first, degrees))
        result[-1] = result[-1].plus(_count(self.last, degrees))
        if degrees.pp > 1:
            result[-1] = result[-1].plus(_count(self.tied, degrees))
        return result


def _groups(specs: Sequence[tuple[ParameterSpec, bool]]) -> tuple[Group, ...]:
    counts: Counter[tuple[object, ...]] = Counter()
    examples: dict[tuple[object, ...], tuple[ParameterSpec, bool]] = {}
    for spec, trainable in specs:
        key = (spec.shape, spec.axis, spec.blocks, spec.padded, spec.expert is not None, trainable)
        counts[key] += 1
        examples.setdefault(key, (spec, trainable))
    return tuple(
        Group(
            shape=spec.shape,
            axis=spec.axis,
            blocks=spec.blocks,
            padded=spec.padded,
            expert=spec.expert is not None,
            trainable=trainable,
            number=counts[key],
            role=spec.role,
        )
        for key, (spec, trainable) in examples.items()
    )


def _count(groups: Sequence[Group], degrees: Degrees) -> Count:
    sums = {(expert, trained): 0 for expert in (False, True) for trained in (False, True)}
    for group in groups:
        sums[group.expert, group.trainable] += group.local(degrees)
    return Count(
        dense=sums[False, False] + sums[False, True],
        expert=sums[True, False] + sums[True, True],
        dense_trained=sums[False, True],
        expert_trained=sums[True, True],
    )


def split_layers(
    layers: int, pp: int, vpp: int = 1, layout: Sequence[int] | None = None
) -> tuple[tuple[int, ...], ...]:
    """Consecutive layer indices of every chunk, chunk `i` on pipeline stage `i % pp`.

    `layout` gives the length of each chunk. Without it chunks are as even as possible; a remainder goes to the chunks
    nearest the middle, because the first also has the embedding and the last the head.
    """
    chunks = pp * vpp
    if layout is None:
        base, remainder = divmod(layers, chunks)
        middle_first = sorted(range(chunks), key=lambda index: (abs(2 * index - (chunks - 1)), index))
        longer = set(middle_first[:remainder])
        layout = [base + (index in longer) for index in range(chunks)]
    result, start = [], 0
    for length in layout:
        result.append(tuple(range(start, start + length)))
        start += length
    return tuple(result)
