"""What would be the chip's kernels; kept apart from `ops.py`, which the parent process imports without torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RmsNorm(torch.autograd.Function):
    """y = x * r * w with r = 1 / sqrt(mean(x^2) + epsilon); only x, w and r are kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normal, upstream = x.float() * scale, gradients[0].float()
        weighted = upstream * weight.float()
        along = (weighted * normal).mean(-1, keepdim=True)
        columns = (upstream * normal).reshape(-1, weight.shape[0]).sum(0)
        return ((weighted - normal * along) * scale).to(x.dtype), columns.to(weight.dtype), None
