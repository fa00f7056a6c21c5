"""The op `gated_mlp` by torch's products and the Triton activation: the contract."""

from __future__ import annotations

import pytest

from loong_core.testing import OpContract
from loong_ops.support import interpreted


@pytest.mark.skipif(not interpreted(), reason="kernels run on the device here, not under Triton's interpreter")
class TestGatedMlp(OpContract):
    op = "gated_mlp"
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.gpu
class TestGatedMlpOnDevice(OpContract):
    op = "gated_mlp"
    implementation = "triton"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")
