"""How an op adds a weight's gradient straight into the float32 buffer that an engine reduces and the optimizer reads.

megatron-core hangs the buffer on the parameter as `main_grad` and learns from `grad_added_to_main_grad` that nothing
is left to add. Its hook runs when autograd reaches the parameter, also without a gradient, so no placeholder of the
weight's size is ever allocated.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def buffer_of(weight: Tensor) -> Tensor | None:
    """The float32 buffer, shaped as `weight`, that its gradient may be added to; None: return the gradient instead.

    Only a leaf has one: a weight that is used twice (tied embeddings) is handed to the second place as a view of it,
    and autograd sums.
    """
    if not weight.requires_grad or not weight.is_leaf:
        return None
    return getattr(weight, "main_grad", None)


def mark_added(weight: Any) -> None:
    """Say that the whole gradient of `weight` is in its buffer; backward then returns None for it."""
    # The overlapped reduction insists on a gradient being there: one element, expanded, costs nothing.
    weight.grad = weight.detach().new_zeros(()).expand(weight.shape)
    weight.grad_added_to_main_grad = True
