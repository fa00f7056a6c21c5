"""The reference of the op `adamw`, and master weights kept as what the bfloat16 parameter lacks of them: 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

_SLICE = 1 << 22
"""Elements updated at a time, so that temporaries stay small however large a parameter is."""


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as its nearest bfloat16 and a signed int16 remainder: bits(master) = bits(rounded) 2^16 +
    remainder.

    Every bit pattern, subnormal numbers and the largest included, comes back from `join` exactly. That leaves no choice
    for a number halfway between two bfloat16: rounding half to even would give one pair of (rounded, remainder) to two
    numbers, so halves are rounded away from zero. Rounding to the nearest is signed, hence the signed remainder. Only a
    NaN whose payload lies in the low 16 bits alone looks like an infinity in `rounded`. Transformer Engine's FusedAdam
    keeps the same pairs (`store_param_remainders`).
    """
    bits = master.detach().contiguous().view(torch.int32)
    rounded = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return rounded, bits.to(torch.int16)


def join(rounded: Tensor, remainder: Tensor) -> Tensor:
    """The float32 tensor that `split` took apart."""
    high = rounded.detach().contiguous().view(torch.int16).to(torch.int32)
    return ((high << 16) + remainder.to(torch.int32)).view(torch.float32)


@torch.no_grad()
def adamw(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    remainder: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    step: int,
    scale: Tensor,
) -> None:
    """One AdamW update of `parameter` and both moments, in place; the tensors are contiguous and of one shape.

    The update is torch's (Loshchilov and Hutter, arXiv 1711.05101; bias-corrected; decoupled weight decay `decay`),
    computed in float32 (float64 stays) for the gradient times `scale`, a float32 scalar tensor. Where `scale` is not
    finite nothing is written. `step` counts from 1. With `remainder` (int16) the update is that of the float32 master
    weight `join(parameter, remainder)`; without, `parameter` itself is updated and rounded once.
    """
    if not bool(torch.isfinite(scale)):
        return
    tensors = [parameter, gradient, exp_avg, exp_avg_sq, *([] if remainder is None else [remainder])]
    for parts in zip(*(tensor.view(-1).split(_SLICE) for tensor in tensors), strict=True):
        _update(*parts, lr=lr, betas=betas, eps=eps, decay=decay, step=step, scale=scale)


def _update(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    remainder: Tensor | None = None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    step: int,
    scale: Tensor,
) -> None:
    """As `adamw`, on flat tensors. Conversions to the dtype a tensor has already are views: those update in place."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    master = parameter.to(wide) if remainder is None else join(parameter, remainder)
    first, second, scaled = exp_avg.to(wide), exp_avg_sq.to(wide), gradient.to(wide) * scale
    master.mul_(1.0 - lr * decay)
    first.lerp_(scaled, 1.0 - betas[0])
    second.mul_(betas[1]).addcmul_(scaled, scaled, value=1.0 - betas[1])
    spread = (second.sqrt() / (1.0 - betas[1] ** step) ** 0.5).add_(eps)
    master.addcdiv_(first, spread, value=-lr / (1.0 - betas[0] ** step))
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
    if remainder is None:
        parameter.copy_(master)
    else:
        rounded, low = split(master)
        parameter.copy_(rounded)
        remainder.copy_(low)
