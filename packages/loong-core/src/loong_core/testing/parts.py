"""The contract of the op `sum_parts`: it writes where it is told and has no gradient, hence a suite of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pytest

from loong_core.op_declarations import DECLARATIONS
from loong_core.testing.no_gradient import NoGradientContract
from loong_core.testing.op import poisoned_memory

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16")
SHAPES = ((1, 5), (2, 7, 33), (3, 1), (4, 100, 128), (8, 4097), (2, 0, 3))
"""Parts, and what each of them is."""


class PartsContract(NoGradientContract):
    """Set `implementation`. `backend` and `device` are where it runs."""

    op: ClassVar[str] = "sum_parts"

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per dtype and shape."""
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", DTYPES)
        if "shape" in metafunc.fixturenames:
            metafunc.parametrize("shape", SHAPES, ids=str)

    def test_sums(self, dtype: str, shape: tuple[int, ...]) -> None:
        """Rounded once, whatever lay in the output, and without touching what lies beside it or the parts."""
        import torch

        parts = self._draw(shape, dtype)
        before = parts.clone()
        count = parts[0].numel()
        for offset in (0, 8, 3):
            whole = torch.full((count + 16,), float("nan"), dtype=parts.dtype, device=self.device)
            out = whole[offset : offset + count].view(shape[1:])
            self.function(parts, out)
            exact = before.double().sum(0).to(parts.dtype)
            limit = DECLARATIONS["sum_parts"].tolerances[dtype]
            torch.testing.assert_close(out, exact, rtol=limit, atol=limit)
            assert int(whole.isnan().sum()) == 16
        assert torch.equal(parts, before)

    def test_a_part_of_ones_own_counts(self, dtype: str, shape: tuple[int, ...]) -> None:
        """One more part, that lies elsewhere; also with no others."""
        import torch

        drawn = self._draw(shape, dtype)
        for count in {0, len(drawn) - 1}:
            out = torch.empty_like(drawn[0])
            self.function(drawn[:count].clone(), out, drawn[-1].clone())
            exact = (drawn[:count].double().sum(0) + drawn[-1].double()).to(drawn.dtype)
            limit = DECLARATIONS["sum_parts"].tolerances[dtype]
            torch.testing.assert_close(out, exact, rtol=limit, atol=limit)

    def test_small_numbers_are_not_lost(self) -> None:
        """In bfloat16 256 + 1 is 256; 256 and eight ones are 264."""
        import torch

        parts = torch.ones(9, 40, dtype=torch.bfloat16, device=self.device)
        parts[0] = 256
        out = torch.empty(40, dtype=torch.bfloat16, device=self.device)
        self.function(parts, out)
        assert bool((out == 264).all())

    def test_bits_repeat(self, dtype: str) -> None:
        """The same call gives the same bits."""
        import torch

        parts = self._draw((4, 5000), dtype)
        first, second = torch.empty_like(parts[0]), torch.empty_like(parts[0])
        self.function(parts, first)
        self.function(parts, second)
        assert torch.equal(first, second)

    def test_uninitialised_memory(self) -> None:
        """It reads nothing it has not written."""
        import torch

        parts = self._draw((3, 4099), "bfloat16")
        with poisoned_memory():
            out = torch.empty_like(parts[0])
            self.function(parts, out)
        assert not bool(out.isnan().any())

    def _draw(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        import torch

        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 3
        return drawn.to(getattr(torch, dtype)).to(self.device)
