"""Counts are compared with what `shard` really hands to every rank, on tensors without memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loong_core.parallel.layout import Degrees, Inventory, split_layers
from loong_core.testing.shapes import decoder_shape
from loong_core.types import ModelShape
from loong_core.weights import shard


def held_by_ranks(shape: ModelShape, degrees: Degrees, stages: tuple[tuple[int, ...], ...]) -> list[set[int]]:
    """For every pipeline stage the set of element counts over its ranks, each found by sharding every parameter."""
    result = []
    for stage in range(degrees.pp):
        layers = {layer for chunk in range(stage, len(stages), degrees.pp) for layer in stages[chunk]}
        first, last = stage == 0, stage == degrees.pp - 1
        ranks = set()
        for tp in range(degrees.tp):
            for etp in range(degrees.etp):
                for ep in range(degrees.ep):
                    count = 0
                    for spec in shape.parameters:
                        tied_copy = shape.tied_embeddings and spec.role == "embed" and last and not first
                        place = {"first": first, "last": last, "layer": spec.layer in layers}[spec.place]
                        if not place and not tied_copy:
                            continue
                        share = shape.fields["experts"] // degrees.ep if spec.expert is not None else 0
                        if spec.expert is not None and spec.expert // share != ep:
                            continue
                        size, rank = (degrees.etp, etp) if spec.expert is not None else (degrees.tp, tp)
                        full = torch.empty(spec.shape, device="meta")
                        count += shard(full, rank, size, spec.axis, spec.blocks, spec.padded).numel()
                    ranks.add(count)
        result.append(ranks)
    return result


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("degrees", "experts"),
    [
        (Degrees(world=1), 0),
        (Degrees(world=2, tp=2, etp=2), 0),
        (Degrees(world=4, tp=2, etp=2, pp=2), 0),
        (Degrees(world=2, pp=2, vpp=2), 0),
        (Degrees(world=3, pp=3), 0),
        (Degrees(world=4, ep=4), 8),
        (Degrees(world=4, tp=2, ep=2, etp=1), 6),
        (Degrees(world=4, tp=2, ep=2, etp=2), 6),
        (Degrees(world=8, tp=2, ep=2, etp=2, pp=2), 6),
        # An expert number that is also a layer number must not be mistaken for it.
        (Degrees(world=2, ep=2), 2),
    ],
)
def test_counts_are_what_the_ranks_hold(degrees: Degrees, experts: int, tied: bool) -> None:
    shape = decoder_shape(layers=4, experts=experts, dense_layers=1 if experts else 0, tied=tied)
    stages = split_layers(shape.layers, degrees.pp, degrees.vpp)
    counted = Inventory(shape).per_stage(degrees, stages)
    assert [{count.total} for count in counted] == held_by_ranks(shape, degrees, stages)


def test_vocabulary_padding_and_tied_copy() -> None:
    shape = decoder_shape(vocabulary=131, tied=True, layers=2)
    alone = Inventory(shape).per_stage(Degrees(world=1), split_layers(2, 1))
    assert alone[0].total == sum(spec.size for spec in shape.parameters)
    first, last = Inventory(shape).per_stage(Degrees(world=4, tp=2, etp=2, pp=2), split_layers(2, 2))
    embedding = 66 * shape.hidden  # 131 rows grow to 132, so that two ranks hold 66 each
    assert last.total - first.total == shape.hidden  # the copy equals the embedding; the final norm is on top
    layer = Inventory(shape).per_stage(Degrees(world=2, tp=2, etp=2), ((0, 1),))[0].total
    assert first.total * 2 - embedding == layer - shape.hidden


def test_frozen_parameters_are_held_but_not_trained() -> None:
    shape = decoder_shape(layers=2, experts=4)
    (whole,) = Inventory(shape).per_stage(Degrees(world=1), ((0, 1),))
    assert whole.dense_trained == whole.dense and whole.expert_trained == whole.expert > 0
    (frozen,) = Inventory(shape, ["embed", "layers.*.moe.up.*"]).per_stage(Degrees(world=1), ((0, 1),))
    assert frozen.total == whole.total
    assert whole.dense_trained - frozen.dense_trained == 131 * 48
    assert frozen.expert_trained * 3 == whole.expert_trained
    (nothing,) = Inventory(shape, ["*"]).per_stage(Degrees(world=1), ((0, 1),))
    assert nothing.dense_trained == nothing.expert_trained == 0


def test_equal_layers_are_counted_once() -> None:
    shape = decoder_shape(layers=61, experts=256, hidden=64, heads=4, ffn=16, dense_layers=3)
    inventory = Inventory(shape)
    assert len(shape.parameters) > 29_000
    assert len(inventory.kinds) == 2 and inventory.kind_of == [0] * 3 + [1] * 58
    assert inventory.experts == [256]


@settings(deadline=None)
@given(layers=st.integers(1, 97), pp=st.integers(1, 16), vpp=st.integers(1, 4))
def test_split_is_even_and_consecutive(layers: int, pp: int, vpp: int) -> None:
    stages = split_layers(layers, pp, vpp)
    assert len(stages) == pp * vpp
    assert [layer for stage in stages for layer in stage] == list(range(layers))
    lengths = [len(stage) for stage in stages]
    assert max(lengths) - min(lengths) <= 1
    # A remainder is in the middle: lengths rise, then fall.
    assert lengths == sorted(lengths[: len(lengths) // 2]) + sorted(lengths[len(lengths) // 2 :], reverse=True)


def test_split_examples() -> None:
    assert [len(stage) for stage in split_layers(10, 4)] == [2, 3, 3, 2]
    assert [len(stage) for stage in split_layers(7, 3)] == [2, 3, 2]
    assert split_layers(5, 2, layout=[1, 4]) == ((0,), (1, 2, 3, 4))
    assert split_layers(4, 2, 2) == ((0,), (1,), (2,), (3,))
