"""The contract of an op implementation: the definition's numbers, for all results and gradients, on any input."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from loong_core.op_declarations import DECLARATIONS
from loong_core.ops import choose
from loong_core.plugins import load
from loong_core.registry import Registry, resolve
from loong_core.testing.contract import Contract
from loong_core.types import OpImpl, OpRequest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loong_core.testing.cases.case import Result
    from loong_core.testing.op_cases import OpCase


class OpContract(Contract):
    """Set `op` and `implementation`. `backend` and `device` are where it runs; of `dtypes` those are tried that it
    supports.

    The measure is the declaration's: largest |difference| / largest |definition in float64|, per tensor. Results of
    integers have to be equal. Gradients are those of all differentiable results together.
    """

    required: ClassVar[tuple[str, ...]] = ("op", "implementation")
    op: ClassVar[str]
    implementation: ClassVar[str]
    backend: ClassVar[str] = "cpu"
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    deterministic: ClassVar[bool] = True

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per case of the op."""
        if "case" in metafunc.fixturenames:
            from loong_core.testing.op_cases import CASES

            cases = CASES[self.op]
            metafunc.parametrize("case", cases, ids=[case.name for case in cases])
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes)

    @cached_property
    def row(self) -> OpImpl:
        """The implementation's own row."""
        row: OpImpl = Registry(load()).get("ops", f"{self.op}.{self.implementation}")
        return row

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The implementation."""
        return resolve(self.row.target)  # type: ignore[no-any-return]

    def supports(self, dtype: str) -> bool:
        """Whether the row says that it serves this dtype here."""
        return self.row.supports is None or resolve(self.row.supports)(self._request(dtype)) is None

    def test_can_be_chosen(self) -> None:
        """A recipe may name it, and it serves at least one of the suite's dtypes."""
        served = [dtype for dtype in self.dtypes if self.supports(dtype)]
        assert served, f"{self.row.supports} refuses every one of {', '.join(self.dtypes)}"
        choices = choose(Registry(load()).ops(), self._request(served[0]), {self.op: self.implementation})
        assert choices[self.op].name == self.implementation
        if self.row.supports is not None:
            reason = resolve(self.row.supports)(self._request("complex64"))
            assert reason is None or (isinstance(reason, str) and reason), f"a reason is a text, not {reason!r}"

    def test_result_and_gradients(self, case: OpCase, dtype: str) -> None:
        """Results and all gradients agree with the definition."""
        if self.supports(dtype):
            self._compare(case, dtype, case.draw(_dtype(dtype), self.device))

    def test_dtypes_of_results(self, case: OpCase, dtype: str) -> None:
        """Every result has the dtype that the plain-torch reference gives it, and the name, where it has one."""
        if not self.supports(dtype):
            return
        tensors = case.draw(_dtype(dtype), self.device)
        reference = resolve(DECLARATIONS[self.op].reference)
        expected = results(case.call(reference, {name: tensor.cpu() for name, tensor in tensors.items()}))
        found = results(case.call(self.function, tensors))
        assert {name: tensor.dtype for name, tensor in found.items()} == {
            name: tensor.dtype for name, tensor in expected.items()
        }

    def test_uninitialised_memory(self, case: OpCase) -> None:
        """It reads nothing it has not written: with every fresh allocation full of NaN the numbers are the same."""
        with poisoned_memory():
            self._compare(case, self._dtype(), case.draw(_dtype(self._dtype()), self.device))

    def test_non_contiguous_inputs(self, case: OpCase) -> None:
        """Inputs, and the gradients that backward is given, may be views with any strides."""
        drawn = case.draw(_dtype(self._dtype()), self.device)
        tensors = {name: scattered(tensor) for name, tensor in drawn.items()}
        self._compare(case, self._dtype(), tensors, upstream_as=scattered)

    def test_inputs_stay_as_they_are(self, case: OpCase) -> None:
        """Neither the call nor its gradient writes into an input."""
        tensors = case.draw(_dtype(self._dtype()), self.device)
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        self._run(case, tensors)
        changed = [name for name in tensors if not _same(tensors[name], before[name])]
        assert not changed, f"written to: {', '.join(changed)}"

    def test_frozen_inputs(self, case: OpCase) -> None:
        """The gradient of one input alone is the gradient it has among all."""
        tensors = case.draw(_dtype(self._dtype()), self.device)
        _, everything = self._run(case, tensors)
        for name in tensors:
            _, alone = self._run(case, tensors, only=name)
            limit = DECLARATIONS[self.op].tolerances[self._dtype()]
            assert error(alone[name], everything[name]) <= limit, f"gradient of {name} changes when the rest is frozen"

    def test_deterministic(self, case: OpCase) -> None:
        """The same call gives the same bits."""
        if not self.deterministic:
            return
        tensors = case.draw(_dtype(self._dtype()), self.device)
        first, first_gradients = self._run(case, tensors)
        second, second_gradients = self._run(case, tensors)
        for name, result in first.items():
            assert _same(result, second[name]), f"two calls gave different results: {name}"
        for name, gradient in first_gradients.items():
            assert _same(gradient, second_gradients[name]), f"two calls gave different gradients of {name}"

    # ------------------------------------------------------------------------------------------------- helpers
    def _dtype(self) -> str:
        return next(dtype for dtype in self.dtypes if self.supports(dtype))

    def _request(self, dtype: str) -> OpRequest:
        degrees = dict.fromkeys(("tp", "pp", "cp", "ep", "etp", "dp"), 1)
        return OpRequest(backend=self.backend, dtype=dtype, degrees=degrees, fields={})

    def _run(
        self,
        case: OpCase,
        tensors: dict[str, Tensor],
        only: str | None = None,
        upstream_as: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Results by name, and gradients by input: of all `tensors`, or of `only` one of them."""
        inputs = {name: tensor.detach().requires_grad_(only in (None, name)) for name, tensor in tensors.items()}
        found = results(case.call(self.function, inputs))
        return found, _gradients(found, inputs, upstream_as)

    def _compare(
        self,
        case: OpCase,
        dtype: str,
        tensors: dict[str, Tensor],
        upstream_as: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        output, gradients = self._run(case, tensors, upstream_as=upstream_as)
        wide = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in tensors.items()}
        exact = results(case.exact(wide))
        _check_form(output, exact)
        limit = DECLARATIONS[self.op].tolerances[dtype]
        found = {name: error(output[name], value) for name, value in exact.items()}
        for name, gradient in _gradients(exact, wide).items():
            assert gradients[name].dtype == tensors[name].dtype, f"gradient of {name} is {gradients[name].dtype}"
            found[f"gradient of {name}"] = error(gradients[name], gradient)
        wrong = {what: value for what, value in found.items() if not value <= limit}
        assert not wrong, f"{case.name} in {dtype}: off by {wrong}, allowed is {limit}"


def _dtype(name: str) -> torch.dtype:
    import torch

    return getattr(torch, name)  # type: ignore[no-any-return]


def results(output: Result) -> dict[str, Tensor]:
    """The results of a call by name: `result`, or the fields of a named tuple, or `result 0`, `result 1` ..."""
    if not isinstance(output, tuple):
        return {"result": output}
    names = getattr(output, "_fields", None) or [f"result {index}" for index in range(len(output))]
    return dict(zip(names, output, strict=True))


def _check_form(output: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Names, shapes, kinds of numbers and which results carry gradients are the definition's."""
    assert list(output) == list(exact), f"results {list(output)}, by definition {list(exact)}"
    for name, value in exact.items():
        got = output[name]
        assert got.shape == value.shape, f"{name} {tuple(got.shape)}, by definition {tuple(value.shape)}"
        assert got.is_floating_point() == value.is_floating_point(), f"{name} is {got.dtype}"
        assert got.requires_grad == value.requires_grad, (
            f"{name} {'carries' if got.requires_grad else 'lacks'} a gradient, by definition it is the other way round"
        )


def _gradients(
    output: dict[str, Tensor], inputs: dict[str, Tensor], upstream_as: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Gradients of the inputs that require one, of the sum of (result * c) with fixed, uneven c over all results."""
    import torch

    differentiable, upstream = [], []
    for index, tensor in enumerate(output.values()):
        if tensor.requires_grad:
            numbers = torch.cos(torch.arange(tensor.numel(), dtype=torch.float64) + index).reshape(tensor.shape)
            differentiable.append(tensor)
            upstream.append((upstream_as or _as_it_is)(numbers.to(tensor)))
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    assert differentiable, "no result carries a gradient"
    found = torch.autograd.grad(differentiable, list(wanted.values()), upstream, allow_unused=True)
    missing = [name for name, gradient in zip(wanted, found, strict=True) if gradient is None]
    assert not missing, f"no gradient arrives at: {', '.join(missing)}"
    return dict(zip(wanted, found, strict=True))


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def error(value: Tensor, exact: Tensor) -> float:
    """Largest |difference| relative to the largest |exact| number; NaN where `value` has one.

    Integers are equal (0) or not (infinite).
    """
    if not exact.is_floating_point():
        return 0.0 if _same(value.detach().cpu().long(), exact.detach().long()) else math.inf
    value, exact = value.detach().cpu().double(), exact.detach().cpu().double()
    if exact.numel() == 0:
        return 0.0
    scale = float(exact.abs().max()) or 1.0
    return float((value - exact).abs().max()) / scale


def scattered(tensor: Tensor) -> Tensor:
    """The same numbers in a view whose elements lie two apart, dims in another order where there are several."""
    import torch

    order = list(reversed(range(tensor.dim())))
    base = torch.full(
        (*(tensor.shape[dim] for dim in order), 2), float("nan"), dtype=tensor.dtype, device=tensor.device
    )
    view = base[..., 0].permute(order)
    view.copy_(tensor)
    return view


def _same(first: Tensor, second: Tensor) -> bool:
    import torch

    return bool(torch.equal(first, second))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every uninitialised allocation of torch with NaN (a feature of its deterministic mode)."""
    import torch

    utils: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = utils.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    utils.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of ops without a deterministic form: not the question here
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        utils.fill_uninitialized_memory = filled
