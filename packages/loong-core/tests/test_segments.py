"""Where packed samples begin: worked out once per micro-batch, on the host where the host has the batch."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from loong_core.parallel import segments as module
from loong_core.parallel.segments import packing, packing_of, prepare

SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2], [4, 4, -1, -1, -1, -1], [9, 9, 9, 9, 9, 9]])


@pytest.fixture
def derived(monkeypatch):
    """The tensors whose packing was derived, in order."""
    calls = []
    true = module.packing_of

    def recorded(host, device):
        calls.append(host)
        return true(host, device)

    monkeypatch.setattr(module, "packing_of", recorded)
    monkeypatch.setattr(module, "_KNOWN", {})
    return calls


def test_offsets_of_packed_rows():
    found = packing_of(SEGMENTS, SEGMENTS)
    assert found.offsets.tolist() == [0, 3, 5, 6, 8, 12, 18] and found.offsets.dtype == torch.int32
    assert found.longest == 6 and found.tokens == 18 and found.inner
    assert torch.equal(found.padding[:, :, 0].t(), SEGMENTS == -1)
    assert found.without_tail is found.offsets


def test_padding_at_the_end_is_a_tail():
    segments = torch.tensor([[0, 0, 1, 1, 1, -1, -1]])
    found = packing_of(segments, segments)
    assert found.offsets.tolist() == [0, 2, 5, 7] and found.without_tail.tolist() == [0, 2, 5]
    assert found.tokens == 5 and not found.inner
    assert found.without_tail.is_contiguous() and found.without_tail.data_ptr() == found.offsets.data_ptr()
    both = packing_of(torch.tensor([[0, -1], [1, -1]]), segments)
    assert both.tokens == 3 and both.inner


def test_rows_without_padding_have_no_mask():
    segments = torch.tensor([[0, 0, 1], [0, 1, 2]])
    found = packing_of(segments, segments)
    assert found.padding is None and not found.inner and found.tokens == 6


def test_nothing_but_padding():
    found = packing_of(torch.full((1, 4), -1), torch.full((1, 4), -1))
    assert found.tokens == 0 and found.without_tail.tolist() == [0] and not found.inner


def test_the_bound_is_rounded_up():
    long = torch.zeros(1, 1000, dtype=torch.int64)
    long[0, 130:] = torch.arange(870)
    assert packing_of(long, long).longest == 256


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(-1, 3), min_size=5, max_size=5), min_size=1, max_size=3))
def test_every_sequence_is_one_run_of_one_number(rows):
    segments = torch.tensor(rows)
    found = packing_of(segments, segments)
    offsets, flat = found.offsets.tolist(), segments.flatten()
    assert offsets[0] == 0 and offsets[-1] == segments.numel()
    for start, end in zip(offsets, offsets[1:], strict=False):
        assert end > start and end - start <= found.longest and len(set(flat[start:end].tolist())) == 1
        assert start // 5 == (end - 1) // 5  # within a row
    assert found.without_tail.tolist()[-1] == found.tokens
    assert bool((flat[found.tokens :] == -1).all())
    assert found.inner == bool((flat[: found.tokens] == -1).any())


def test_what_was_prepared_is_found_without_asking_the_device(derived):
    host = SEGMENTS.clone()
    device = host.clone()
    prepare(host, device)
    assert len(derived) == 1
    for _ in range(3):
        assert packing(device).offsets.tolist() == packing_of(SEGMENTS, SEGMENTS).offsets.tolist()
    assert len(derived) == 1 and derived[0] is host


def test_several_micro_batches_are_in_flight(derived):
    held = [torch.full((1, 6), number) for number in range(4)]
    held[2][0, 3:] = -1
    for tensor in held:
        prepare(tensor.clone(), tensor)
    for tensor in reversed(held):
        assert packing(tensor).tokens == int((tensor >= 0).sum())
    assert len(derived) == 4


def test_it_is_derived_anew_when_the_numbers_change(derived):
    segments = SEGMENTS.clone()
    assert packing(segments).offsets.tolist() == packing(segments).offsets.tolist() and len(derived) == 1
    segments[0] = 5
    assert packing(segments).offsets.tolist()[:2] == [0, 6] and len(derived) == 2


def test_nothing_outlives_its_tensor(monkeypatch):
    monkeypatch.setattr(module, "_KNOWN", {})
    segments = SEGMENTS.clone()
    packing(segments)
    key = module._key(segments)
    other = torch.zeros(1, 3, dtype=torch.int64)
    del segments
    gc.collect()
    packing(other)
    assert key not in module._KNOWN and len(module._KNOWN) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_finds_what_forward_found(derived, reentrant):
    """Checkpointing hands the recomputed layer other tensor objects for the same memory."""
    segments = SEGMENTS.clone()
    prepare(SEGMENTS, segments)
    seen = []

    def layer(hidden, numbers):
        seen.append(packing(numbers.detach()).tokens)
        return hidden.exp()

    hidden = torch.ones(3, requires_grad=True)
    checkpoint(layer, hidden, segments, use_reentrant=reentrant).sum().backward()
    assert seen == [18, 18] and len(derived) == 1
