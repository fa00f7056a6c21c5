"""The op `experts` in Triton: its contract, its gradient buffers, its tiles."""

from __future__ import annotations

import pytest

from loong_core.testing.op import OpContract

# Rows that no expert uses are not masked in the products, because nobody reads what comes out of them.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


class TestExperts(OpContract):
    op = "experts"
    implementation = "triton"


@pytest.mark.gpu
class TestExpertsOnGpu(OpContract):
    op = "experts"
    implementation = "triton"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")
