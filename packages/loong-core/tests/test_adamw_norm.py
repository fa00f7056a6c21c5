"""The norm of gradients is summed in float32, whatever their dtype."""

from __future__ import annotations

import pytest
import torch

from loong_core.parallel.adamw import sum_of_squares


def exact(tensors: list[torch.Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors)


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.bfloat16, torch.float32)])
def test_it_is_as_exact_as_float32(dtypes: tuple[torch.dtype, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = [1, 7, 100_003, 64, 40_000]
    drawn = [torch.randn(size, generator=generator) * 3 for size in sizes]
    tensors = [tensor.to(dtypes[index % len(dtypes)]) for index, tensor in enumerate(drawn)]
    found = sum_of_squares(tensors, "cpu")
    assert found.dtype == torch.float32 and found.dim() == 0
    assert float(found) == pytest.approx(exact(tensors), rel=1e-5)


def test_many_equal_norms_do_not_stall() -> None:
    """In bfloat16 256 + 1 is 256: a norm of norms there would stay at 16."""
    tensors = [torch.ones(1, dtype=torch.bfloat16) for _ in range(1000)]
    assert float(sum_of_squares(tensors, "cpu")) == 1000.0


def test_of_nothing_it_is_zero() -> None:
    assert float(sum_of_squares([], "cpu")) == 0.0
    assert float(sum_of_squares([torch.ones(0)], "cpu")) == 0.0


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    tensors = [torch.ones(3, dtype=torch.bfloat16), torch.tensor([1.0, value], dtype=torch.bfloat16)]
    assert not bool(sum_of_squares(tensors, "cpu").isfinite())
