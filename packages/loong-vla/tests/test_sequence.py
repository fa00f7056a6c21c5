"""Positions, samples and their random numbers."""

from __future__ import annotations

import numpy as np
import pytest

from loong_core.errors import DataError
from loong_vla.processing import beta_time
from loong_vla.sequence import Draws, Order, Samples, held_out


def test_places_and_what_remains() -> None:
    samples = Samples([3, 5, 9, 11], [4, 2, 3, 5], tail=2)
    assert len(samples) == 2 + 0 + 1 + 3
    assert [samples.place(number) for number in range(6)] == [(3, 0), (3, 1), (9, 0), (11, 0), (11, 1), (11, 2)]
    assert samples.remaining(range(6)).tolist() == [4, 3, 3, 5, 4, 3]
    assert len(Samples([], [])) == 0
    assert samples.fingerprint() != Samples([3, 5, 9, 11], [4, 2, 3, 5]).fingerprint()


def test_every_epoch_holds_every_sample_once_in_its_own_order() -> None:
    order = Order(7, seed=3)
    epochs = [[order.sample(7 * epoch + at) for at in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [order.sample(position) for position in (20, 1, 8)] == [epochs[2][6], epochs[0][1], epochs[1][1]]
    fixed = Order(7, seed=3, epoch=5)
    assert [fixed.sample(at) for at in range(7)] == [fixed.sample(7 + at) for at in range(7)]
    assert [Order(3, 0, shuffle=False).sample(at) for at in range(5)] == [0, 1, 2, 0, 1]


def test_draws_belong_to_position_and_purpose() -> None:
    draws = Draws(1, "train")
    first = draws.uniform(4, 6, "time")
    np.testing.assert_array_equal(first, Draws(1, "train").uniform(4, 6, "time"))
    np.testing.assert_array_equal(first[:3], draws.uniform(4, 3, "time"))
    others = [draws.uniform(5, 6, "time"), draws.uniform(4, 6, "noise"), Draws(2, "train").uniform(4, 6, "time")]
    assert not any((first == other).any() for other in (*others, Draws(1, "held out").uniform(4, 6, "time")))
    assert ((first > 0) & (first < 1)).all()


def test_the_first_draws_stay_what_they_are() -> None:
    """Resumed runs depend on it."""
    np.testing.assert_allclose(
        Draws(0, "train").uniform(1, 2, "time"), [0.4993118743800938, 0.2586888246122729], rtol=1e-15
    )
    found = Draws(7, "train").normal(3, 3, "noise")
    np.testing.assert_allclose(found, [1.1437817811965942, -2.623770236968994, 0.14461223781108856], rtol=1e-6)
    assert found.dtype == np.float32


def test_normal_and_beta_numbers_have_their_moments() -> None:
    draws = Draws(0, "x")
    normal = np.concatenate([draws.normal(position, 101, "n") for position in range(400)])
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02 and abs((normal**4).mean() - 3) < 0.15
    time = beta_time(1.5, 1.0)
    beta = np.array([time(value) for value in draws.uniform(0, 20000, "t")])
    assert abs(beta.mean() - 0.6) < 0.01 and abs(beta.var() - 1.5 / (2.5**2 * 3.5)) < 0.005
    other = beta_time(1.0, 2.0)
    assert abs(np.mean([other(value) for value in draws.uniform(0, 20000, "t")]) - 1 / 3) < 0.01


def test_whole_episodes_are_held_out() -> None:
    numbers, lengths = list(range(10, 30)), [10] * 19 + [200]
    kept, left = held_out(numbers, lengths, 0.1, seed=0)
    assert kept | left == set(numbers) and not kept & left and kept and left
    assert held_out(numbers, lengths, 0.1, seed=0) == (kept, left)
    assert any(held_out(numbers, lengths, 0.1, seed=seed) != (kept, left) for seed in range(1, 4))
    assert len(held_out([4, 8], [5, 5], 0.99, seed=0)[0]) == 1
    with pytest.raises(DataError, match="one episode cannot be split"):
        held_out([4], [5], 0.5, seed=0)
