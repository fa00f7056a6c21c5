"""The op `sum_of_squares` in Triton: the contract, how ranges are joined, and cuts."""

from __future__ import annotations

import pytest
import torch

from loong_core.testing import SquaresContract
from loong_ops.sum_of_squares import _ranges, sum_of_squares
from loong_ops.support import interpreted

DEVICE = "cpu" if interpreted() else "cuda"


@pytest.mark.skipif(not interpreted(), reason="kernels run on the device here, not under Triton's interpreter")
class TestSumOfSquares(SquaresContract):
    implementation = "triton"


@pytest.mark.gpu
class TestSumOfSquaresOnDevice(SquaresContract):
    implementation = "triton"
    backend = "cuda"
    device = "cuda"


def test_neighbours_are_one_range() -> None:
    whole, other = torch.zeros(100), torch.zeros(10)
    parts = [whole[:30], whole[30:30], whole[30:50].view(4, 5), other, whole[50:60], whole[61:70], whole[70:], other]
    assert [count for _, count in _ranges(parts)] == [50, 10, 10, 39, 10]
    assert [count for _, count in _ranges([whole[50:], whole[:50]])] == [50, 50]


@pytest.mark.parametrize("config", [{"BLOCK": 16, "STEPS": 1}, {"BLOCK": 64, "STEPS": 3}])
def test_cuts_give_the_same(config: dict[str, int]) -> None:
    drawn = torch.randn(1001, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    parts = [drawn[:300], drawn[301:]]
    found = sum_of_squares(parts, DEVICE, _config=config | {"num_warps": 1})
    torch.testing.assert_close(found, sum_of_squares(parts, DEVICE))
