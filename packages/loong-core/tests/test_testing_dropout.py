"""`DropoutContract` catches the faults it promises to catch, each planted in an otherwise right implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loong_core.testing import DropoutContract

RATE = 0.5


def right(x: Tensor, residual: Tensor, rate: float) -> Tensor:
    return residual + x * (torch.rand(x.shape) >= rate) / (1 - rate) if rate else residual + x


def not_rescaled(x: Tensor, residual: Tensor, rate: float) -> Tensor:
    return residual + x * (torch.rand(x.shape) >= rate)


def too_few(x: Tensor, residual: Tensor, rate: float) -> Tensor:
    return residual + x * (torch.rand(x.shape) >= rate + 0.1) / (1 - rate)


def four_alike(x: Tensor, residual: Tensor, rate: float) -> Tensor:
    numbers = torch.rand(-(-x.numel() // 4)).repeat_interleave(4)[: x.numel()].view(x.shape)
    return residual + x * (numbers >= rate) / (1 - rate)


def seed_of_its_own(x: Tensor, residual: Tensor, rate: float) -> Tensor:
    numbers = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    return residual + x * (numbers >= rate) / (1 - rate)


def wasteful(x: Tensor, residual: Tensor, rate: float) -> Tensor:
    return residual + x * (torch.rand(x.shape) >= rate) / (1 - rate)


class _OtherMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float) -> Tensor:
        ctx.rate = rate
        return torch.nn.functional.dropout(x, rate)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.nn.functional.dropout(gradients[0], ctx.rate), None


def other_mask(x: Tensor, residual: Tensor, rate: float) -> Tensor:
    return residual + _OtherMask.apply(x, rate)


def suite(planted: Callable[..., Tensor]) -> DropoutContract:
    attributes = {"op": "dropout_add", "function": staticmethod(planted)}
    return type("Planted", (DropoutContract,), attributes | {"implementation": "planted"})()


def test_right_implementation_passes() -> None:
    contract = suite(right)
    contract.test_results_and_gradients((9, 131), RATE, "float32")
    contract.test_seed_decides(RATE, "float32")
    contract.test_without_a_rate_nothing_is_drawn()
    for name in ("share_that_is_kept", "calls_are_independent", "recomputed_activations", "frozen_inputs"):
        getattr(contract, f"test_{name}")(RATE)


@pytest.mark.parametrize(
    ("function", "test", "arguments"),
    [
        (not_rescaled, "results_and_gradients", ((9, 131), RATE, "float32")),
        (other_mask, "results_and_gradients", ((9, 131), RATE, "float32")),
        (too_few, "share_that_is_kept", (RATE,)),
        (four_alike, "share_that_is_kept", (RATE,)),
        (seed_of_its_own, "calls_are_independent", (RATE,)),
        (seed_of_its_own, "seed_decides", (RATE, "float32")),
        (wasteful, "without_a_rate_nothing_is_drawn", ()),
    ],
)
def test_fault_is_caught(function: Callable[..., Tensor], test: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(AssertionError):
        getattr(suite(function), f"test_{test}")(*arguments)
