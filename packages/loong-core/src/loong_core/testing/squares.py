"""The contract of the op `sum_of_squares`: it takes a list of tensors and has no gradient, hence a suite of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import pytest

from loong_core.op_declarations import DECLARATIONS
from loong_core.testing.no_gradient import NoGradientContract
from loong_core.testing.op import poisoned_memory

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = (("float32",), ("bfloat16",), ("float16",), ("bfloat16", "float32"))
CUTS = (0, 1, 8, 8, 1000, 40_003, 40_010, 140_000)
"""Where tensors begin and end that share a buffer."""


class SquaresContract(NoGradientContract):
    """Set `implementation`. `backend` and `device` are where it runs."""

    op: ClassVar[str] = "sum_of_squares"

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per mixture of dtypes, and per number that is not finite."""
        if "dtypes" in metafunc.fixturenames:
            metafunc.parametrize("dtypes", DTYPES, ids="-".join)
        if "value" in metafunc.fixturenames:
            metafunc.parametrize("value", ("inf", "-inf", "nan"))

    def test_separate_tensors(self, dtypes: tuple[str, ...]) -> None:
        """Of any sizes, dtypes and shapes, with a gradient or without."""
        tensors = self._draw([1, 7, 100_003, 0, 64, 40_000], dtypes)
        self._check([*tensors, tensors[-1].view(4, 100, 100).detach().requires_grad_()])

    def test_parts_of_a_buffer(self, dtypes: tuple[str, ...]) -> None:
        """Neighbours, in order or not, overlapping, with gaps, from odd places on. No element beside them counts."""
        for whole in self._draw([CUTS[-1]] * len(dtypes), dtypes):
            parts = [whole[begin:end] for begin, end in zip(CUTS, CUTS[1:], strict=False)]
            self._check(parts)
            self._check(parts[::-1])
            self._check([parts[0], parts[2], parts[4], parts[4], whole[3:5000], whole[5000:5003]])
            whole[[0, 5, -1]] = float("nan")
            self._check([whole[1:5], whole[6:1003], whole[1003:-1]])
            self._check([whole[6:66].view(6, 10)[:, 7:], whole[101:161].view(6, 10).t()])

    def test_neighbours_of_other_dtypes(self) -> None:
        """Two dtypes in one storage: what adjoins there is not one range."""
        import torch

        whole = torch.ones(1000, device=self.device)
        self._check([whole[:400], whole.view(torch.bfloat16)[400:600], whole[400:]])

    def test_many_equal_numbers_do_not_stall(self) -> None:
        """In bfloat16 256 + 1 is 256."""
        import torch

        whole = torch.ones(100_000, dtype=torch.bfloat16, device=self.device)
        self._check([whole, *whole[:1000].split(1)])

    def test_of_nothing_it_is_zero(self) -> None:
        """No tensors, or tensors without elements."""
        import torch

        for tensors in ([], [torch.ones(0, device=self.device), torch.ones(3, 0, device=self.device)]):
            found = self.function(tensors, self.device)
            assert float(found) == 0.0 and found.device.type == torch.device(self.device).type

    def test_what_is_not_finite_stays_so(self, value: str, dtypes: tuple[str, ...]) -> None:
        """Wherever it is."""
        for place in (0, 1, 39_999, 70_000):
            tensors = self._draw([40_000, 30_001], dtypes)
            tensors[place // 40_000][place % 40_000] = float(value)
            assert not bool(self.function(tensors, self.device).isfinite())

    @pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy, for Triton's interpreter
    def test_too_large_is_not_finite(self) -> None:
        """A square beyond float32 is no wrong number."""
        import torch

        tensor = torch.full((10,), 1e30, device=self.device)
        assert not bool(self.function([tensor], self.device).isfinite())

    def test_bits_repeat(self, dtypes: tuple[str, ...]) -> None:
        """The same call gives the same bits, and leaves its inputs as they are."""
        import torch

        sizes = [100_003, 5, 40_000]
        tensors = self._draw(sizes, dtypes)
        first, second = (self.function(tensors, self.device) for _ in range(2))
        assert torch.equal(first, second)
        assert all(torch.equal(one, other) for one, other in zip(tensors, self._draw(sizes, dtypes), strict=True))

    def test_uninitialised_memory(self) -> None:
        """It reads nothing it has not written."""
        with poisoned_memory():
            self._check(self._draw([5, 40_000], ("bfloat16",)))

    # ------------------------------------------------------------------------------------------------- helpers
    def _draw(self, sizes: Sequence[int], dtypes: Sequence[str]) -> list[Tensor]:
        import torch

        generator = torch.Generator().manual_seed(3)
        drawn = [torch.randn(size, generator=generator) * 3 for size in sizes]
        return [
            tensor.to(getattr(torch, dtypes[index % len(dtypes)])).to(self.device) for index, tensor in enumerate(drawn)
        ]

    def _check(self, tensors: Sequence[Tensor]) -> None:
        import torch

        found = self.function(tensors, self.device)
        assert found.dtype == torch.float32 and found.dim() == 0 and not found.requires_grad
        exact = sum(float(tensor.detach().double().square().sum()) for tensor in tensors)
        limit = DECLARATIONS["sum_of_squares"].tolerances["float32"]
        assert abs(float(found) - exact) <= limit * exact, f"{float(found)}, by definition {exact}"
