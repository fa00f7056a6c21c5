"""How an op adds a weight's gradient straight into the buffer that an engine reduces and the optimizer reads.

megatron-core hangs the buffer on the parameter as `main_grad` and learns from `grad_added_to_main_grad` that nothing
is left to add. Its hook runs when autograd reaches the parameter, also without a gradient, so no placeholder of the
weight's size is ever allocated. The buffer has the dtype of the precision policy's `gradients`, float32 or the weight's
own; what an op adds to it, it sums in float32 and rounds at the end.

Zeroing a buffer at the start of a step, only to read the zeros back in the first addition, moves twelve bytes a weight
for nothing. So a weight whose gradient came this way once is not zeroed again: its buffer is declared empty, and the
first to deliver writes over it.

Nobody waits for the gradient of a weight before the end of a step, but other ranks may wait for that of its inputs. So
who knows of such a rank may have the products put off (`put_off`), send what is waited for, and call them then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor


def buffer_of(weight: Tensor) -> Tensor | None:
    """The buffer, shaped as `weight`, that its gradient may be added to; None: return the gradient instead.

    Only a leaf has one: a weight that is used twice (tied embeddings) is handed to the second place as a view of it,
    and autograd sums.
    """
    buffer, empty = buffer_to_fill(weight)
    if buffer is not None and empty:
        buffer.zero_()
    return buffer


def buffer_to_fill(weight: Any) -> tuple[Tensor | None, bool]:
    """As `buffer_of`, for an op that can also write: where the second value is True the buffer holds garbage, and the
    caller must write all of it; where it is False the caller must add."""
    if not weight.requires_grad or not weight.is_leaf:
        return None, False
    buffer = getattr(weight, "main_grad", None)
    empty = buffer is not None and getattr(weight, "main_grad_empty", False)
    if empty:
        weight.main_grad_empty = False
    return buffer, empty


def mark_added(weight: Any) -> None:
    """Say that the whole gradient of `weight` is in its buffer; backward then returns None for it."""
    # The overlapped reduction insists on a gradient being there: one element, expanded, costs no memory.
    weight.grad = _nothing(weight.dtype, weight.device).expand(weight.shape)
    weight.grad_added_to_main_grad = True
    weight.main_grad_delivered = True


_later: list[Callable[[], None]] | None = None


@contextmanager
def put_off() -> Iterator[list[Callable[[], None]]]:
    """Products of weights' gradients for buffers, asked for within, are not computed but listed: call them, in order,
    before anybody reads the buffers."""
    global _later
    outside, _later = _later, []
    try:
        yield _later
    finally:
        _later = outside


def deliver(weight: Any, product: Callable[[], None]) -> None:
    """Have `product` bring the whole gradient of `weight` to its buffer, now, or as the list of `put_off` is called."""
    if _later is None:
        product()
    else:
        _later.append(torch.no_grad()(product))  # as inside of backward
    mark_added(weight)


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zero, made once: hundreds of weights a step would each launch a kernel for their own."""
    return torch.zeros((), dtype=dtype, device=device)


def clear(buckets: Iterable[Any]) -> None:
    """Start a step: zero the gradients in megatron-core's `buckets`, or declare them empty where that is as good."""
    for bucket in buckets:
        begin = end = 0  # of what is to be zeroed: neighbours together, in one launch
        for weight in sorted(bucket.params_list, key=lambda weight: bucket.param_to_index[weight][0]):
            weight.main_grad_empty = getattr(weight, "main_grad_delivered", False)
            if weight.main_grad_empty:
                bucket.grad_data[begin:end].zero_()
                begin = end = bucket.param_to_index[weight][1]
            else:
                end = bucket.param_to_index[weight][1]
        bucket.grad_data[begin:end].zero_()


def settle(weights: Iterable[Any]) -> None:
    """End a step's backward passes: zero the buffers of weights that no gradient has reached."""
    for weight in weights:
        if getattr(weight, "main_grad_empty", False):
            buffer_of(weight)
