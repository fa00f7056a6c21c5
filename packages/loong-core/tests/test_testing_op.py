"""`OpContract` catches the faults it promises to catch, each planted in an otherwise right implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loong_core.errors import NotFound
from loong_core.references import norm
from loong_core.references.rotary import rotary_qkv
from loong_core.references.routing import Routing, route
from loong_core.testing import OpContract
from loong_core.testing.op import error, poisoned_memory, results, scattered
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
    return right(x, weight, epsilon) * (1 + 1e-3 * torch.rand(()))


def swapped_experts(logits: Tensor, top_k: int, **others: Any) -> Routing:
    found = route(logits, top_k, **others)
    return found._replace(experts=found.experts.flip(-1))


def one_count_too_many(logits: Tensor, top_k: int, **others: Any) -> Routing:
    found = route(logits, top_k, **others)
    return found._replace(counts=found.counts + 1)


def wide_experts(logits: Tensor, top_k: int, **others: Any) -> Routing:
    found = route(logits, top_k, **others)
    return found._replace(experts=found.experts.long())


def sums_with_gradient(logits: Tensor, top_k: int, **others: Any) -> Routing:
    return route(logits, top_k, **others)._replace(sums=torch.softmax(logits, dim=-1).sum(0))


def weights_without_gradient(logits: Tensor, top_k: int, **others: Any) -> Routing:
    found = route(logits, top_k, **others)
    return found._replace(weights=found.weights.detach())


def nameless(logits: Tensor, top_k: int, **others: Any) -> tuple[Tensor, ...]:
    return tuple(route(logits, top_k, **others))


def two_results(mixed: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return rotary_qkv(mixed, *others)[:2]


def key_for_value(mixed: Tensor, *others: Any) -> tuple[Tensor, ...]:
    query, key, _ = rotary_qkv(mixed, *others)
    return query, key, key


def value_without_gradient(mixed: Tensor, *others: Any) -> tuple[Tensor, ...]:
    query, key, value = rotary_qkv(mixed, *others)
    return query, key, value.detach()


class _LosesValueGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.zeros_like(gradients[0])


def loses_value_gradient(mixed: Tensor, *others: Any) -> tuple[Tensor, ...]:
    query, key, value = rotary_qkv(mixed, *others)
    return query, key, _LosesValueGradient.apply(value)


class _ExpectsContiguousUpstream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.as_strided(gradients[0], gradients[0].shape, torch.empty(gradients[0].shape).stride())


def expects_contiguous_upstream(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return _ExpectsContiguousUpstream.apply(right(x, weight, epsilon))


class Suite(OpContract):
    """The contract on a function instead of an installed row."""

    op = "rms_norm"
    implementation = "planted"
    function: Callable[..., Tensor] = staticmethod(right)  # type: ignore[assignment]

    def supports(self, dtype: str) -> bool:
        return True


CASE = next(case for case in CASES["rms_norm"] if case.name == "odd")


def suite(function: Callable[..., Any], op: str = "rms_norm") -> OpContract:
    return type("Planted", (Suite,), {"op": op, "function": staticmethod(function)})()


def odd_case(op: str) -> OpCase:
    return next(case for case in CASES[op] if case.name in ("odd", "normed"))


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
        (expects_contiguous_upstream, "test_non_contiguous_inputs"),
        (writes_its_input, "test_inputs_stay_as_they_are"),
        (random_result, "test_deterministic"),
    ],
)
def test_fault_is_caught(function: Callable[..., Tensor], test: str) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        getattr(suite(function), test)(CASE)


@pytest.mark.parametrize(("op", "function"), [("route", route), ("rotary_qkv", rotary_qkv)])
def test_right_implementation_of_several_results_passes(op: str, function: Callable[..., Any]) -> None:
    contract, case = suite(function, op), odd_case(op)
    contract.test_result_and_gradients(case, "float32")
    contract.test_dtypes_of_results(case, "bfloat16")
    contract.test_non_contiguous_inputs(case)
    contract.test_frozen_inputs(case)
    contract.test_deterministic(case)


@pytest.mark.parametrize(
    ("op", "function", "message"),
    [
        ("route", swapped_experts, "'experts': inf"),
        ("route", one_count_too_many, "'counts': inf"),
        ("route", sums_with_gradient, "sums carries a gradient"),
        ("route", weights_without_gradient, "no result carries a gradient"),
        ("route", nameless, r"results \['result 0'.*by definition \['weights'"),
        ("rotary_qkv", two_results, r"by definition \['result 0', 'result 1', 'result 2'\]"),
        ("rotary_qkv", key_for_value, "'result 2'"),
        ("rotary_qkv", value_without_gradient, "result 2 lacks a gradient"),
        ("rotary_qkv", loses_value_gradient, "off by {'gradient of mixed'"),
    ],
)
def test_fault_in_one_of_several_results_is_caught(op: str, function: Callable[..., Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        suite(function, op).test_result_and_gradients(odd_case(op), "float32")


def test_wrong_dtype_of_a_result_is_caught() -> None:
    with pytest.raises(AssertionError, match="int64"):
        suite(wide_experts, "route").test_dtypes_of_results(odd_case("route"), "float32")


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
    assert error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0.0
    assert error(torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32)) == 0.0
    assert error(torch.tensor([1, 2]), torch.tensor([2, 1])) == float("inf")
    assert list(results(tensor)) == ["result"] and list(results((tensor, tensor))) == ["result 0", "result 1"]


@pytest.mark.parametrize("case", CASES["attention"], ids=lambda case: case.name)
def test_definition_of_attention_never_divides_by_nothing(case: OpCase) -> None:
    assert case.exact(case.draw(torch.float64, "cpu")).isfinite().all()
