"""AdamW in one pass over memory: 28 bytes an element with bfloat16 parameters, their master weights included.

Read and written: parameter (2), remainder of the master weight (2) and two moments (8); read: the gradient (4; 2 where
gradients are summed in bfloat16). The clip coefficient arrives as a device tensor, so that neither a pass over the
gradients nor a wait for their norm is needed; a coefficient that is not finite leaves everything as it is.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

CONFIG: dict[str, int] = {"BLOCK": 512, "num_warps": 4}
"""Elements and warps of a program. Four elements a thread are 16 bytes of a float32 tensor and 8 of a 2-byte one, in
the same threads; with eight a thread Triton gives 2-byte tensors a layout of their own and exchanges them through
shared memory."""


@triton.jit
def _adamw_kernel(
    parameter_ptr,
    gradient_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    remainder_ptr,
    scale_ptr,
    count,
    keep,  # 1 - lr decay
    fresh1,  # 1 - beta1: rounded from the host's double, where 1 - float32(0.999) would be off by 5e-5
    beta2,
    fresh2,
    eps,
    step_size,  # lr / (1 - beta1^step)
    spread_scale,  # 1 / sqrt(1 - beta2^step)
    HAS_REMAINDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = tl.load(scale_ptr)
    if tl.abs(scale) < float("inf"):
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < count
        stored = tl.load(parameter_ptr + offsets, mask=mask)
        gradient = tl.load(gradient_ptr + offsets, mask=mask).to(tl.float32) * scale
        first = tl.load(exp_avg_ptr + offsets, mask=mask).to(tl.float32)
        second = tl.load(exp_avg_sq_ptr + offsets, mask=mask).to(tl.float32)
        if HAS_REMAINDER:
            low = tl.load(remainder_ptr + offsets, mask=mask).to(tl.int32)
            high = stored.to(tl.int16, bitcast=True).to(tl.int32)
            master = ((high << 16) + low).to(tl.float32, bitcast=True)
        else:
            master = stored.to(tl.float32)
        first += fresh1 * (gradient - first)
        second = beta2 * second + fresh2 * gradient * gradient
        spread = tl.sqrt(second) * spread_scale + eps
        master = master * keep - step_size * (first / spread)
        tl.store(exp_avg_ptr + offsets, first.to(exp_avg_ptr.dtype.element_ty), mask=mask)
        tl.store(exp_avg_sq_ptr + offsets, second.to(exp_avg_sq_ptr.dtype.element_ty), mask=mask)
        if HAS_REMAINDER:
            # Halves are rounded away from zero: with half to even 16 bits would not bring the master back.
            bits = master.to(tl.int32, bitcast=True)
            rounded = ((bits + 0x8000) >> 16).to(tl.int16)
            tl.store(parameter_ptr + offsets, rounded.to(tl.bfloat16, bitcast=True), mask=mask)
            tl.store(remainder_ptr + offsets, bits.to(tl.int16), mask=mask)
        else:
            tl.store(parameter_ptr + offsets, master.to(parameter_ptr.dtype.element_ty), mask=mask)


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
    _config: dict[str, Any] | None = None,
) -> None:
    """See `loong_core.references.adamw.adamw`, which it equals up to the rounding of a few operations.

    No tensor is allocated and nothing waits for the device.
    """
    count = parameter.numel()
    if count == 0:
        return
    config = CONFIG if _config is None else _config
    _adamw_kernel[(triton.cdiv(count, config["BLOCK"]),)](
        parameter,
        gradient,
        exp_avg,
        exp_avg_sq,
        parameter if remainder is None else remainder,
        scale,
        count,
        1.0 - lr * decay,
        1.0 - betas[0],
        betas[1],
        1.0 - betas[1],
        eps,
        lr / (1.0 - betas[0] ** step),
        (1.0 - betas[1] ** step) ** -0.5,
        HAS_REMAINDER=remainder is not None,
        **config,
    )
