"""What is zeroed at the start of a step, what is only declared empty, and what an op finds then."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loong_core.parallel import gradient_buffer


def bucket(sizes: list[int], gap: int = 3) -> Any:
    """Weights of `sizes` elements in a buffer full of NaN, `gap` elements apart."""
    weights: list[Any] = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    data = torch.full((sum(sizes) + gap * len(sizes),), math.nan)
    index, begin = {}, 0
    for weight in weights:
        index[weight] = (begin, begin + weight.numel())
        weight.main_grad = data[slice(*index[weight])]
        begin = index[weight][1] + gap
    # megatron-core lists parameters in the order of backward passes, which is not that of the buffer
    return SimpleNamespace(params_list=weights[::-1], param_to_index=index, grad_data=data)


def weights_of(bucket: Any) -> list[Any]:
    return list(bucket.param_to_index)


@pytest.mark.parametrize("delivered", [(), (0,), (1, 2), (0, 3), (0, 1, 2, 3)])
def test_only_what_ops_deliver_is_left_as_it_is(delivered: tuple[int, ...]) -> None:
    filled = bucket([4, 5, 1, 7])
    weights = weights_of(filled)
    for place in delivered:
        gradient_buffer.mark_added(weights[place])
    gradient_buffer.clear([filled])
    for place, weight in enumerate(weights):
        assert weight.main_grad_empty == (place in delivered)
        if place in delivered:
            assert bool(weight.main_grad.isnan().all())
        else:
            assert not bool(weight.main_grad.any())


def test_an_op_that_adds_finds_zeros() -> None:
    filled = bucket([4, 5])
    first, second = weights_of(filled)
    gradient_buffer.mark_added(first)
    gradient_buffer.clear([filled])
    for times in (1, 2):
        buffer = gradient_buffer.buffer_of(first)
        assert buffer is not None
        buffer += 2.0
        assert buffer.tolist() == [2.0 * times] * 4
    assert not bool(second.main_grad.any())


def test_an_op_that_writes_is_told_once() -> None:
    filled = bucket([4])
    (weight,) = weights_of(filled)
    assert gradient_buffer.buffer_to_fill(weight)[1] is False
    gradient_buffer.mark_added(weight)
    gradient_buffer.clear([filled])
    buffer, empty = gradient_buffer.buffer_to_fill(weight)
    assert buffer is weight.main_grad and empty
    assert gradient_buffer.buffer_to_fill(weight)[1] is False


def test_a_weight_that_no_gradient_reached_ends_with_zeros() -> None:
    filled = bucket([4, 5])
    reached, missed = weights_of(filled)
    for weight in (reached, missed):
        gradient_buffer.mark_added(weight)
    gradient_buffer.clear([filled])
    gradient_buffer.buffer_to_fill(reached)[0].fill_(3.0)  # type: ignore[union-attr]
    gradient_buffer.settle([reached, missed])
    assert reached.main_grad.tolist() == [3.0] * 4
    assert missed.main_grad.tolist() == [0.0] * 5


def test_weights_without_a_buffer_of_their_own_have_none() -> None:
    (weight,) = weights_of(bucket([4]))
    assert gradient_buffer.buffer_to_fill(weight * 1)[0] is None
    assert gradient_buffer.buffer_to_fill(torch.nn.Parameter(torch.zeros(2)))[0] is None
    weight.requires_grad_(False)
    assert gradient_buffer.buffer_of(weight) is None


def test_products_are_computed_at_once_or_when_asked_for() -> None:
    first, second = weights_of(bucket([2, 2]))
    done: list[str] = []
    gradient_buffer.deliver(first, lambda: done.append("at once"))
    assert done == ["at once"] and first.main_grad_delivered
    with gradient_buffer.put_off() as products:
        gradient_buffer.deliver(first, lambda: done.append("first"))
        with gradient_buffer.put_off() as inner:
            gradient_buffer.deliver(second, lambda: done.append("inner"))
        gradient_buffer.deliver(second, lambda: done.append("second"))
    assert done == ["at once"] and second.grad_added_to_main_grad
    for product in [*products, *inner]:
        product()
    assert done == ["at once", "first", "second", "inner"]
    with pytest.raises(ValueError), gradient_buffer.put_off():
        raise ValueError
    gradient_buffer.deliver(first, lambda: done.append("at once"))
    assert done[-1] == "at once"
