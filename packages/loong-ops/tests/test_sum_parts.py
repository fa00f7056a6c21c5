"""The op `sum_parts` in Triton: the contract, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from loong_core.testing import PartsContract
from loong_ops.sum_parts import sum_parts
from loong_ops.support import interpreted


@pytest.mark.skipif(not interpreted(), reason="kernels run on the device here, not under Triton's interpreter")
class TestSumParts(PartsContract):
    implementation = "triton"


@pytest.mark.gpu
class TestSumPartsOnDevice(PartsContract):
    implementation = "triton"
    backend = "cuda"
    device = "cuda"


@pytest.mark.parametrize(
    ("parts", "out"),
    [
        (torch.zeros(2, 3), torch.zeros(4)),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.float16)),
        (torch.zeros(3, 2).t(), torch.zeros(3)),
        (torch.zeros(2, 3), torch.zeros(6)[::2]),
    ],
)
def test_what_does_not_match_is_refused(parts: torch.Tensor, out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"sum_parts: .*\[r,\.\.\.\]"):
        sum_parts(parts, out)
