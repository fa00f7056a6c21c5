"""Every verb is undone by its inverse, and every cut by its reunion, for any sizes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from loong_core.weights import VERBS, padded_extent, shard, unshard

SMALL = some.integers(1, 5)


@settings(max_examples=60, deadline=None)
@given(groups=SMALL, ratio=SMALL, width=SMALL, columns=some.integers(0, 3))
def test_qkv(groups: int, ratio: int, width: int, columns: int) -> None:
    rest = [columns] if columns else []
    fields = {"kv_heads": groups, "head_dim": width}
    rows = [groups * ratio * width, groups * width, groups * width]
    parts = [torch.randn(count, *rest) for count in rows]
    packed = VERBS["qkv"].pack(parts, fields)
    assert packed.shape == (sum(rows), *rest)
    for one, other in zip(parts, VERBS["qkv"].unpack(packed, fields), strict=True):
        assert torch.equal(one, other)
    # A group's queries come right before its key and its value.
    assert torch.equal(packed[: ratio * width], parts[0][: ratio * width])
    assert torch.equal(packed[ratio * width : (ratio + 1) * width], parts[1][:width])


@settings(max_examples=40, deadline=None)
@given(rows=SMALL, columns=SMALL)
def test_gate_up_copy_stack(rows: int, columns: int) -> None:
    gate, up = torch.randn(rows, columns), torch.randn(rows, columns)
    packed = VERBS["gate_up"].pack([gate, up], {})
    assert all(torch.equal(a, b) for a, b in zip(VERBS["gate_up"].unpack(packed, {}), (gate, up), strict=True))
    for verb in ("copy", "stack"):
        assert torch.equal(VERBS[verb].unpack(VERBS[verb].pack([gate], {}), {})[0], gate)


@settings(max_examples=80, deadline=None)
@given(size=some.integers(1, 4), unit=SMALL, other=SMALL, axis=some.sampled_from([0, 1]), blocks=some.integers(1, 3))
def test_shard_and_unshard(size: int, unit: int, other: int, axis: int, blocks: int) -> None:
    shape = [other, other]
    shape[axis] = size * unit * blocks
    full = torch.randn(shape)
    parts = [shard(full, rank, size, axis, blocks) for rank in range(size)]
    assert {tuple(part.shape) for part in parts} == {tuple(parts[0].shape)}
    assert torch.equal(unshard(parts, axis, blocks), full)


@settings(max_examples=40, deadline=None)
@given(size=some.integers(1, 5), extent=some.integers(1, 23))
def test_padding_is_zero_and_comes_off(size: int, extent: int) -> None:
    full = torch.randn(extent, 2)
    parts = [shard(full, rank, size, 0, padded=True) for rank in range(size)]
    joined = torch.cat(parts)
    assert joined.shape[0] == padded_extent(extent, size)
    assert not joined[extent:].any()
    assert torch.equal(unshard(parts, 0, extent=extent), full)
