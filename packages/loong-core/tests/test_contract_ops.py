"""The op contract, applied to the references themselves: they are held to the definitions in float64."""

from __future__ import annotations

from loong_core.testing import DropoutContract, OpContract, PartsContract, SquaresContract


class TestRmsNorm(OpContract):
    op = "rms_norm"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestResidualRmsNorm(OpContract):
    op = "residual_rms_norm"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestLayerNorm(OpContract):
    op = "layer_norm"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestResidualLayerNorm(OpContract):
    op = "residual_layer_norm"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestAttention(OpContract):
    op = "attention"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestRaggedAttention(OpContract):
    op = "ragged_attention"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestCrossEntropy(OpContract):
    op = "cross_entropy"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestRotaryQkv(OpContract):
    op = "rotary_qkv"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestSwiglu(OpContract):
    op = "swiglu"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestRoute(OpContract):
    op = "route"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestLinearCrossEntropy(OpContract):
    op = "linear_cross_entropy"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestLinear(OpContract):
    op = "linear"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestLinearGelu(OpContract):
    op = "linear_gelu"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestGatedMlp(OpContract):
    op = "gated_mlp"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestGeglu(OpContract):
    op = "geglu"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestAdaRmsNorm(OpContract):
    op = "ada_rms_norm"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestResidualAdaRmsNorm(OpContract):
    op = "residual_ada_rms_norm"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestLayerNormModulate(OpContract):
    op = "layer_norm_modulate"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestGatedResidual(OpContract):
    op = "gated_residual"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestDropoutAdd(OpContract):
    op = "dropout_add"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestDropoutAddWithRates(DropoutContract):
    op = "dropout_add"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestLinearGeluWithRates(DropoutContract):
    op = "linear_gelu"
    implementation = "torch"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestSumOfSquares(SquaresContract):
    implementation = "torch"


class TestSumParts(PartsContract):
    implementation = "torch"
