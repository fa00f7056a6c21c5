"""Precision policies as data; what each number format means for a module is the engine's business."""

from __future__ import annotations

from loong_core.types import PrecisionPolicy

POLICIES: tuple[PrecisionPolicy, ...] = (
    PrecisionPolicy(
        name="fp32",
        parameters="float32",
        activations="float32",
        summary="32-bit floats throughout: the reference, and the right choice on a CPU.",
    ),
    PrecisionPolicy(
        name="bf16",
        parameters="bfloat16",
        activations="bfloat16",
        needs=frozenset({"bf16"}),
        summary="bfloat16 parameters and activations; gradients, master weights and AdamW's moments in 32 bits.",
    ),
    PrecisionPolicy(
        name="bf16_gradients",
        parameters="bfloat16",
        activations="bfloat16",
        gradients="bfloat16",
        needs=frozenset({"bf16"}),
        summary="bf16 with gradients summed in bfloat16: 2 bytes less a parameter, and less to move. For steps of one "
        "or few micro-batches: a sum over many of them, or over many ranks, loses precision.",
    ),
)
"""What the core provides. fp32 means 32 bits in matmuls too: the cuda backend switches TF32 off."""
