"""Where a weight's gradient goes: into the engine's buffer if the weight has one, to autograd otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from loong_core.parallel.gradient_buffer import buffer_to_fill, deliver, mark_added


def delivered(weight: Tensor, gradient: Tensor) -> Tensor | None:
    """What backward returns for `weight`, whose float32 gradient is `gradient`: None once it lies in the buffer."""
    buffer, empty = buffer_to_fill(weight)
    if buffer is None:
        return gradient.to(weight.dtype)
    (buffer.copy_ if empty else buffer.add_)(gradient)
    mark_added(weight)
    return None


def weight_gradient(weight: Tensor, write: Callable[[Tensor, bool], None]) -> Tensor | None:
    """As `delivered`, of a product that can write where it is told to: `write(target, add)` writes the gradient over,
    or adds it to, `target`, which is shaped as the weight, contiguous, and begins at a multiple of 16 bytes.

    A product that adds in the memory system (QuACK's `add_to_output`) gives a bfloat16 buffer the sum of two rounded
    numbers, rounded.
    """
    buffer, empty = buffer_to_fill(weight)
    if buffer is None:
        target = torch.empty_like(weight, memory_format=torch.contiguous_format)
        write(target, False)
        return target
    deliver(weight, partial(_write, write, buffer, empty))
    return None


def _write(write: Callable[[Tensor, bool], None], buffer: Tensor, empty: bool) -> None:
    # A tensor map starts at a multiple of 16 bytes.
    if buffer.is_contiguous() and buffer.data_ptr() % 16 == 0:
        write(buffer, not empty)
    else:
        target = torch.empty(buffer.shape, dtype=torch.float32, device=buffer.device)
        write(target, False)
        (buffer.copy_ if empty else buffer.add_)(target)
