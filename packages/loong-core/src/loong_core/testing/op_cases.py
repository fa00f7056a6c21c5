"""Op -> its cases, small and odd: sizes of one, primes, groups, packing, padding."""

from __future__ import annotations

from loong_core.testing.cases import (
    activation,
    attention,
    cross_entropy,
    dropout,
    experts,
    linear,
    linear_cross_entropy,
    mlp,
    modulation,
    norm,
    ragged_attention,
    rotary,
    routing,
)
from loong_core.testing.cases.case import OpCase

CASES: dict[str, tuple[OpCase, ...]] = {
    "rms_norm": norm.RMS_NORM,
    "residual_rms_norm": norm.RESIDUAL_RMS_NORM,
    "layer_norm": norm.LAYER_NORM,
    "residual_layer_norm": norm.RESIDUAL_LAYER_NORM,
    "attention": attention.CASES,
    "ragged_attention": ragged_attention.CASES,
    "cross_entropy": cross_entropy.CASES,
    "linear_cross_entropy": linear_cross_entropy.CASES,
    "rotary_qkv": rotary.CASES,
    "swiglu": activation.CASES,
    "route": routing.CASES,
    "experts": experts.CASES,
    "linear": linear.CASES,
    "linear_gelu": linear.GELU,
    "gated_mlp": mlp.CASES,
    "geglu": activation.GEGLU,
    "ada_rms_norm": modulation.ADA_RMS_NORM,
    "residual_ada_rms_norm": modulation.RESIDUAL_ADA_RMS_NORM,
    "layer_norm_modulate": modulation.LAYER_NORM_MODULATE,
    "gated_residual": modulation.GATED_RESIDUAL,
    "dropout_add": dropout.CASES,
}
