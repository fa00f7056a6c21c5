"""The reference of the op `sum_of_squares`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def sum_of_squares(tensors: Sequence[Tensor], device: str) -> Tensor:
    """Of all elements of `tensors`, of any shapes and dtypes on `device`: [] in float32, without gradients.

    torch's `get_total_norm` would round the norms of the tensors, and the norm of those, to the dtype of the tensors;
    so this asks for norms in float32.
    """
    total = torch.zeros((), dtype=torch.float32, device=device)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)  # one kernel takes many tensors of one dtype
    for dtype, alike in by_dtype.items():
        norms = torch._foreach_norm(alike, 2.0, dtype=torch.promote_types(dtype, torch.float32))
        total += torch.stack(norms).square().sum()
    return total
