"""Where a weight's gradient goes: into the engine's buffer if the weight has one, to autograd otherwise."""

from __future__ import annotations

from torch import Tensor

from loong_core.parallel.gradient_buffer import buffer_to_fill, mark_added


def delivered(weight: Tensor, gradient: Tensor) -> Tensor | None:
    """What backward returns for `weight`, whose float32 gradient is `gradient`: None once it lies in the buffer."""
    buffer, empty = buffer_to_fill(weight)
    if buffer is None:
        return gradient.to(weight.dtype)
    (buffer.copy_ if empty else buffer.add_)(gradient)
    mark_added(weight)
    return None
