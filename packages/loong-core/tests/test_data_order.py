"""Sample order and the held-out split depend on seed and epoch alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loong_core.data.order import keys, permutation, split_held_out


@given(count=st.integers(0, 300), seed=st.integers(0, 2**40), epoch=st.integers(0, 2**40))
@settings(deadline=None)
def test_a_permutation_holds_everything_once(count: int, seed: int, epoch: int) -> None:
    order = permutation(count, seed, epoch)
    assert sorted(order.tolist()) == list(range(count))
    assert order.tolist() == permutation(count, seed, epoch).tolist()


def test_order_changes_with_seed_and_with_epoch() -> None:
    orders = {tuple(permutation(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_stream_of_bits_is_the_recorded_one() -> None:
    """A change here would reorder the data of every run that is resumed with a newer version."""
    assert keys(2, 7, 3).tolist() == [8893702929424106994, 13357943582879616415]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=60), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 99)
)
@settings(deadline=None)
def test_held_out_and_training_samples_are_disjoint_and_complete(sizes: list[int], fraction: float, seed: int) -> None:
    documents = np.repeat(np.arange(len(sizes)), sizes)
    if len(documents) < 2:
        return
    train, held = split_held_out(documents, fraction, seed)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(len(documents)))
    assert len(train) > 0
    assert len(held) > 0
    if len(sizes) >= 20:
        assert not set(documents[train].tolist()) & set(documents[held].tolist())


def test_whole_documents_are_held_out_where_there_are_enough_of_them() -> None:
    documents = np.repeat(np.arange(25), 4)
    train, held = split_held_out(documents, 0.1, 0)
    assert len(held) == 12
    assert not set(documents[train].tolist()) & set(documents[held].tolist())
    few = np.repeat(np.arange(2), 50)
    assert len(split_held_out(few, 0.1, 0)[1]) == 10


def test_the_held_out_share_is_about_what_was_asked_for() -> None:
    documents = np.arange(10_000)
    assert len(split_held_out(documents, 0.01, 0)[1]) == 100
    assert split_held_out(documents, 0.01, 0)[1].tolist() != split_held_out(documents, 0.01, 1)[1].tolist()


def test_one_sample_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="one sample"):
        split_held_out(np.zeros(1, dtype=np.int64), 0.5, 0)
