"""The contract of ops with dropout: results are random, so the mask of a call is recovered from them and judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from loong_core.op_declarations import DECLARATIONS
from loong_core.plugins import load
from loong_core.registry import Registry, resolve
from loong_core.testing.contract import Contract
from loong_core.testing.op import error, scattered

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]
SEED = 11
RATES = (0.1, 0.5)
MANY = (128, 128)
"""Rows and columns for statistics."""
SIGMAS = 5.0
"""How far from its expectation a share of elements may be, in standard deviations. The seeds are fixed."""


@dataclass(frozen=True)
class _Op:
    """`draw(rows, n, generator)` gives inputs; `call(function, inputs, rate)` is [rows,n], by definition `parts`: what
    is dropped, which is nowhere near 0, and what is added to it."""

    draw: Callable[[int, int, Any], dict[str, Tensor]]
    call: Callable[[Callable[..., Any], Tensors, float], Tensor]
    parts: Callable[[Tensors], tuple[Tensor, Tensor]]


class DropoutContract(Contract):
    """Set `op` and `implementation`. `backend` and `device` are where it runs."""

    required: ClassVar[tuple[str, ...]] = ("op", "implementation")
    op: ClassVar[str]
    implementation: ClassVar[str]
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    sizes: ClassVar[tuple[tuple[int, int], ...]] = ((1, 1), (3, 5), (9, 131), (2, 1024), (0, 8))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per rate, dtype and size."""
        for name, values in (("rate", RATES), ("dtype", self.dtypes), ("size", self.sizes)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values)

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The implementation."""
        return resolve(Registry(load()).get("ops", f"{self.op}.{self.implementation}").target)  # type: ignore[no-any-return]

    def test_results_and_gradients(self, size: tuple[int, int], rate: float, dtype: str) -> None:
        """Each element is dropped or divided by 1 - rate, and so is what backward brings to it."""
        self._compare(self._draw(*size, dtype), rate, dtype)

    def test_non_contiguous_inputs(self, rate: float) -> None:
        """Inputs, and the gradient that backward is given, may be views with any strides."""
        tensors = {name: scattered(tensor) for name, tensor in self._draw(9, 131, self.dtypes[0]).items()}
        self._compare(tensors, rate, self.dtypes[0], upstream_as=scattered)

    def test_frozen_inputs(self, rate: float) -> None:
        """The gradient of one input alone is the gradient it has among all."""
        tensors = self._draw(9, 131, self.dtypes[0])
        _, everything = self._run(tensors, rate)
        for name in tensors:
            _, alone = self._run(tensors, rate, only=name)
            limit = DECLARATIONS[self.op].tolerances[self.dtypes[0]]
            assert error(alone[name], everything[name]) <= limit, f"gradient of {name} changes when the rest is frozen"

    def test_share_that_is_kept(self, rate: float) -> None:
        """It is 1 - rate, for elements apart as if each was drawn for itself, near ones as far ones."""
        mask = self._masks(rate, 1)[0].flatten()
        _expect(mask, 1 - rate, "kept")
        for far in (1, 2, 3, 4, 32, MANY[1], 512, 1024):
            _expect(mask[far:] == mask[:-far], rate**2 + (1 - rate) ** 2, f"alike at a distance of {far}")

    def test_calls_are_independent(self, rate: float) -> None:
        """The next call drops other elements, and where this one dropped says nothing about it."""
        masks = self._masks(rate, 3)
        for one, other in ((0, 1), (1, 2), (0, 2)):
            _expect(masks[one] == masks[other], rate**2 + (1 - rate) ** 2, f"alike in calls {one} and {other}")

    def test_seed_decides(self, rate: float, dtype: str) -> None:
        """The same `torch.manual_seed` gives the same bits, in results and gradients; another one does not."""
        import torch

        tensors = self._draw(9, 131, dtype)
        (first, gradients), (second, again), (third, _) = (self._run(tensors, rate, seed=seed) for seed in (3, 3, 4))
        assert torch.equal(first, second) and not torch.equal(first, third)
        assert all(torch.equal(gradients[name], again[name]) for name in tensors)

    def test_without_a_rate_nothing_is_drawn(self) -> None:
        """At rate 0 torch's generator stays where it is; with a rate it is what is drawn from."""
        import torch

        tensors = self._draw(3, 5, self.dtypes[0])
        for rate, drawn in ((0.0, False), (0.5, True)):
            before = self._state()
            _OPS[self.op].call(self.function, tensors, rate)
            assert torch.equal(before, self._state()) != drawn

    def test_recomputed_activations(self, rate: float) -> None:
        """What is computed again for backward drops the same elements."""
        import torch
        from torch.utils.checkpoint import checkpoint

        def again(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *inputs, **others: checkpoint(function, *inputs, use_reentrant=False, **others)

        tensors = self._draw(9, 131, self.dtypes[0])
        _, kept = self._run(tensors, rate)
        _, computed = self._run(tensors, rate, wrap=again)
        assert all(torch.equal(kept[name], computed[name]) for name in tensors)

    # ------------------------------------------------------------------------------------------------- helpers
    def _draw(self, rows: int, n: int, dtype: str) -> dict[str, Tensor]:
        import torch

        generator = torch.Generator().manual_seed(SEED)
        drawn = _OPS[self.op].draw(rows, n, generator)
        return {name: tensor.to(getattr(torch, dtype)).to(self.device) for name, tensor in drawn.items()}

    def _state(self) -> Tensor:
        import torch

        return torch.get_rng_state() if self.device == "cpu" else torch.cuda.get_rng_state(self.device)

    def _run(
        self,
        tensors: Tensors,
        rate: float,
        *,
        seed: int = SEED,
        only: str | None = None,
        wrap: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
        upstream_as: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The result, and gradients by input: of all `tensors`, or of `only` one of them."""
        import torch

        inputs = {name: tensor.detach().requires_grad_(only in (None, name)) for name, tensor in tensors.items()}
        torch.manual_seed(seed)
        result = _OPS[self.op].call(wrap(self.function) if wrap else self.function, inputs, rate)
        upstream = _upstream(result)
        wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
        found = torch.autograd.grad(result, list(wanted.values()), upstream_as(upstream) if upstream_as else upstream)
        return result.detach(), dict(zip(wanted, found, strict=True))

    def _compare(
        self, tensors: Tensors, rate: float, dtype: str, upstream_as: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        import torch

        result, gradients = self._run(tensors, rate, upstream_as=upstream_as)
        wide = {name: tensor.cpu().double().requires_grad_() for name, tensor in tensors.items()}
        dropped, added = _OPS[self.op].parts(wide)
        exact = _mask(result, dropped, added, rate) * dropped / (1 - rate) + added
        assert result.shape == exact.shape and result.dtype == getattr(torch, dtype)
        upstream = _upstream(result).cpu().double()
        expected = torch.autograd.grad(exact, list(wide.values()), upstream)
        limit = DECLARATIONS[self.op].tolerances[dtype]
        found = {"result": error(result, exact)}
        for name, gradient in zip(wide, expected, strict=True):
            assert gradients[name].dtype == tensors[name].dtype, f"gradient of {name} is {gradients[name].dtype}"
            found[f"gradient of {name}"] = error(gradients[name], gradient)
        wrong = {what: value for what, value in found.items() if not value <= limit}
        assert not wrong, f"off by {wrong}, allowed is {limit}"

    def _masks(self, rate: float, calls: int) -> list[Tensor]:
        """What successive calls keep."""
        import torch

        tensors = self._draw(*MANY, self.dtypes[0])
        dropped, added = _OPS[self.op].parts({name: tensor.cpu().double() for name, tensor in tensors.items()})
        torch.manual_seed(SEED)
        results = [_OPS[self.op].call(self.function, tensors, rate) for _ in range(calls)]
        return [_mask(result, dropped, added, rate) for result in results]


def _upstream(result: Tensor) -> Tensor:
    """A fixed, uneven gradient for a result, nowhere near 0."""
    import torch

    return (2 + torch.cos(torch.arange(result.numel(), dtype=torch.float64))).reshape(result.shape).to(result)


def _mask(result: Tensor, dropped: Tensor, added: Tensor, rate: float) -> Tensor:
    """Which elements of a result were kept: those that are nearer to what they would be then."""
    found = result.detach().cpu().double() - added
    return (found - dropped / (1 - rate)).abs() < found.abs()


def _expect(found: Tensor, share: float, what: str) -> None:
    """The share of true elements is `share`, as far as their number lets one tell."""
    measured = float(found.double().mean())
    limit = SIGMAS * math.sqrt(share * (1 - share) / found.numel())
    assert abs(measured - share) <= limit, f"{what}: {measured}, expected {share} with a deviation of {limit} at most"


# ------------------------------------------------------------------------------------------------------ the ops
def _draw_sum(rows: int, n: int, generator: Any) -> dict[str, Tensor]:
    import torch

    x, residual = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for _ in range(2))
    return {"x": x + x.sign() * 0.5, "residual": residual}


def _draw_gelu(rows: int, n: int, generator: Any) -> dict[str, Tensor]:
    """What comes before the activation is near 1 and -1: GELU is 0 at 0 and almost 0 far below."""
    import torch

    x, weight = (torch.randn(m, 4, generator=generator, dtype=torch.float64) * 0.3 for m in (rows, n))
    bias = torch.randn(n, generator=generator, dtype=torch.float64)
    return {"x": x, "weight": weight, "bias": bias.sign() + bias * 0.01}


def _gelu(tensors: Tensors) -> tuple[Tensor, Tensor]:
    import torch

    product = tensors["x"] @ tensors["weight"].t() + tensors["bias"]
    cubic = math.sqrt(2 / math.pi) * (product + 0.044715 * product**3)
    return product / 2 * (1 + torch.tanh(cubic)), torch.zeros_like(product)


_OPS = {
    "dropout_add": _Op(
        draw=_draw_sum,
        call=lambda function, tensors, rate: function(tensors["x"], tensors["residual"], rate),
        parts=lambda tensors: (tensors["x"], tensors["residual"]),
    ),
    "linear_gelu": _Op(
        draw=_draw_gelu,
        call=lambda function, tensors, rate: function(*tensors.values(), dropout=rate),
        parts=_gelu,
    ),
}
