"""`OpContract` catches the faults it promises to catch, each planted in an otherwise right implementation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loong_core.references import norm
from loong_core.errors import NotFound
from loong_core.testing import OpContract
from loong_core.testing.op import error, poisoned_memory, scattered
from loong_core.testing.op_cases import CASES, OpCase


def right(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return norm.rms_norm(x, weight, epsilon)


def wrong_formula(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-2) * weight


def no_weight_gradient(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return right(x, weight.detach(), epsilon) + 0 * weight.sum()


def reads_fresh_memory(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return right(x, weight, epsilon) + 0 * torch.empty(1)


def needs_contiguous(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    flat = torch.as_strided(x, x.shape, torch.empty(x.shape).stride())
    return right(flat, weight, epsilon)


def writes_its_input(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    result = right(x, weight, epsilon)
    with torch.no_grad():
        x.detach().mul_(1.0 + 1e-6)
    return result


def random_result(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return right(x, weight, epsilon) * (1 + 1e-6 * torch.rand(()))


class Suite(OpContract):
    """The contract on a function instead of an installed row."""

    op = "rms_norm"
    implementation = "planted"
    function: Callable[..., Tensor] = staticmethod(right)  # type: ignore[assignment]

    def supports(self, dtype: str) -> bool:
        return True


CASE = next(case for case in CASES["rms_norm"] if case.name == "odd")


def suite(function: Callable[..., Tensor]) -> OpContract:
    return type("Planted", (Suite,), {"function": staticmethod(function)})()


def test_right_implementation_passes() -> None:
    contract = suite(right)
    contract.test_result_and_gradients(CASE, "float32")
    for name in ("uninitialised_memory", "non_contiguous_inputs", "inputs_stay_as_they_are", "frozen_inputs"):
        getattr(contract, f"test_{name}")(CASE)
    contract.test_deterministic(CASE)


@pytest.mark.parametrize(
    ("function", "test"),
    [
        (wrong_formula, "test_uninitialised_memory"),
        (no_weight_gradient, "test_uninitialised_memory"),
        (reads_fresh_memory, "test_uninitialised_memory"),
        (needs_contiguous, "test_non_contiguous_inputs"),
        (writes_its_input, "test_inputs_stay_as_they_are"),
        (random_result, "test_deterministic"),
    ],
)
def test_fault_is_caught(function: Callable[..., Tensor], test: str) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        getattr(suite(function), test)(CASE)


def test_wrong_numbers_are_named() -> None:
    with pytest.raises(AssertionError, match=r"odd in float32: off by .*'result'.*allowed is 1e-05"):
        suite(wrong_formula).test_result_and_gradients(CASE, "float32")


def test_unknown_implementation_is_an_error() -> None:
    with pytest.raises(NotFound, match=r"rms_norm.absent.*Installed: .*rms_norm.torch"):
        _ = type("Absent", (OpContract,), {"op": "rms_norm", "implementation": "absent"})().row


def test_tools() -> None:
    tensor = torch.randn(3, 4, 5)
    view = scattered(tensor)
    assert torch.equal(view, tensor) and not view.is_contiguous() and view.stride(-1) != 1
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    assert error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5
    assert not error(torch.tensor([float("nan")]), torch.tensor([1.0])) <= 1.0


@pytest.mark.parametrize("case", CASES["attention"], ids=lambda case: case.name)
def test_definition_of_attention_never_divides_by_nothing(case: OpCase) -> None:
    assert case.exact(case.draw(torch.float64, "cpu")).isfinite().all()
