"""The contract of an op implementation: the definition's numbers, for the result and every gradient, on any input."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from loong_core.ops import DECLARATIONS, choose
from loong_core.plugins import load
from loong_core.registry import Registry, resolve
from loong_core.testing.contract import Contract
from loong_core.types import OpImpl, OpRequest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loong_core.testing.op_cases import OpCase


class OpContract(Contract):
    """Set `op` and `implementation`. `backend` and `device` are where it runs; of `dtypes` those are tried that it
    supports.

    The measure is the declaration's: largest |difference| / largest |definition in float64|, per tensor.
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
    def function(self) -> Callable[..., Tensor]:
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
        """Result and all gradients agree with the definition."""
        if self.supports(dtype):
            self._compare(case, dtype, case.draw(_dtype(dtype), self.device))

    def test_uninitialised_memory(self, case: OpCase) -> None:
        """It reads nothing it has not written: with every fresh allocation full of NaN the numbers are the same."""
        with poisoned_memory():
            self._compare(case, self._dtype(), case.draw(_dtype(self._dtype()), self.device))

    def test_non_contiguous_inputs(self, case: OpCase) -> None:
        """Inputs may be views with any strides."""
        tensors = case.draw(_dtype(self._dtype()), self.device)
        self._compare(case, self._dtype(), {name: scattered(tensor) for name, tensor in tensors.items()})

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
        assert _same(first, second), "two calls gave different results"
        for name, gradient in first_gradients.items():
            assert _same(gradient, second_gradients[name]), f"two calls gave different gradients of {name}"

    # ------------------------------------------------------------------------------------------------- helpers
    def _dtype(self) -> str:
        return next(dtype for dtype in self.dtypes if self.supports(dtype))

    def _request(self, dtype: str) -> OpRequest:
        degrees = dict.fromkeys(("tp", "pp", "cp", "ep", "etp", "dp"), 1)
        return OpRequest(backend=self.backend, dtype=dtype, degrees=degrees, fields={})

    def _run(
        self, case: OpCase, tensors: dict[str, Tensor], only: str | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = {name: tensor.detach().requires_grad_(only in (None, name)) for name, tensor in tensors.items()}
        output = case.call(self.function, inputs)
        return output.detach(), _gradients(output, inputs)

    def _compare(self, case: OpCase, dtype: str, tensors: dict[str, Tensor]) -> None:
        output, gradients = self._run(case, tensors)
        wide = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in tensors.items()}
        exact = case.exact(wide)
        limit = DECLARATIONS[self.op].tolerances[dtype]
        assert output.shape == exact.shape, f"result {tuple(output.shape)}, by definition {tuple(exact.shape)}"
        found = {"result": error(output, exact.detach())}
        for name, gradient in _gradients(exact, wide).items():
            assert gradients[name].dtype == tensors[name].dtype, f"gradient of {name} is {gradients[name].dtype}"
            found[f"gradient of {name}"] = error(gradients[name], gradient)
        wrong = {what: value for what, value in found.items() if not value <= limit}
        assert not wrong, f"{case.name} in {dtype}: off by {wrong}, allowed is {limit}"


def _dtype(name: str) -> torch.dtype:
    import torch

    return getattr(torch, name)  # type: ignore[no-any-return]


def _gradients(output: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of sum(output * c) for fixed, uneven c, of the inputs that require one."""
    import torch

    upstream = torch.cos(torch.arange(output.numel(), dtype=torch.float64)).reshape(output.shape)
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    found = torch.autograd.grad(output, list(wanted.values()), upstream.to(output))
    return dict(zip(wanted, found, strict=True))


def error(value: Tensor, exact: Tensor) -> float:
    """Largest |difference| relative to the largest |exact| number; NaN where `value` has one."""
    value, exact = value.detach().cpu().double(), exact.detach().cpu().double()
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
