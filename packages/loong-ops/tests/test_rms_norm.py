"""The op `rms_norm` in Triton, and its form that adds a residual, against the two steps it replaces."""

from __future__ import annotations

import pytest
import torch

from loong_core.errors import Unsupported
from loong_core.references import norm
from loong_core.testing import OpContract
from loong_core.testing.op import poisoned_memory, scattered
from loong_ops.rms_norm import Config, _cut, _rows, add_rms_norm, rms_norm
from loong_ops.support import interpreted

DEVICE = "cpu" if interpreted() else "cuda"


@pytest.mark.skipif(not interpreted(), reason="kernels run on the device here, not under Triton's interpreter")
class TestRmsNorm(OpContract):
    op = "rms_norm"
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.gpu
class TestRmsNormOnDevice(OpContract):
    op = "rms_norm"
    implementation = "triton"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def two_steps(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return total, norm.rms_norm(total, weight, epsilon)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 3), (5, 2, 33), (7, 64), (0, 8)])
def test_add_rms_norm_is_the_two_steps(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = []
    for function in (add_rms_norm, two_steps):
        leaves = [drawn(*size, seed=i).to(dtype).requires_grad_() for i, size in enumerate((shape, shape, shape[-1:]))]
        with poisoned_memory():
            total, normed = function(*leaves, 1e-6)
            upstream = drawn(*shape, seed=4).to(dtype), drawn(*shape, seed=5).to(dtype)
            torch.autograd.backward((total, normed), upstream)
        found.append([total.detach(), normed.detach(), *(leaf.grad for leaf in leaves)])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("used", [0, 1])
def test_add_rms_norm_with_one_result_used(used: int) -> None:
    found = []
    for function in (add_rms_norm, two_steps):
        leaves = [drawn(*size, seed=i).requires_grad_() for i, size in enumerate(((3, 10), (3, 10), (10,)))]
        function(*leaves, 1e-6)[used].cos().sum().backward()
        found.append([torch.zeros(10, device=DEVICE) if leaf.grad is None else leaf.grad for leaf in leaves])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_add_rms_norm_with_frozen_inputs(wanted: tuple[bool, ...]) -> None:
    found = []
    for function in (add_rms_norm, two_steps):
        leaves = [drawn(*size, seed=i) for i, size in enumerate(((3, 10), (3, 10), (10,)))]
        for leaf, wants in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(wants)
        total, normed = function(*leaves, 1e-6)
        (total.sin().sum() + normed.cos().sum()).backward()
        assert [leaf.grad is not None for leaf in leaves] == list(wanted)
        found.append(next(leaf.grad for leaf in leaves if leaf.grad is not None))
    torch.testing.assert_close(*found)


def test_gradients_of_both_addends_are_not_tangled() -> None:
    """They are one tensor; summing into the one must not change the other."""
    x, residual, weight = drawn(3, 10), drawn(3, 10, seed=1), drawn(10, seed=2)
    found = []
    for function in (add_rms_norm, two_steps):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, residual)]
        for _ in range(3):
            total, normed = function(leaves[0] * 2, leaves[1], weight, 1e-6)
            (total.sin().sum() + normed.cos().sum() + leaves[1].sum()).backward()
        found.append([leaf.grad for leaf in leaves])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_add_rms_norm_of_views() -> None:
    x, residual, weight = drawn(4, 10), drawn(4, 10, seed=1), drawn(10, seed=2)
    for one, other in ((scattered(x), residual), (x, scattered(residual)), (x[:, :1].expand(-1, 10), residual)):
        found = [function(one, other, weight, 1e-6) for function in (add_rms_norm, two_steps)]
        for ours, expected in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected)


def test_rows_apart() -> None:
    """Views of whole rows, inputs and upstream gradients alike, each with a step of its own."""
    x, residual, d_total, d_normed = (drawn(4, 10 + 3 * i, seed=i)[:, i : i + 10] for i in range(4))
    found = []
    for function in (add_rms_norm, two_steps):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, residual, drawn(10, seed=5))]
        torch.autograd.backward(function(*leaves, 1e-6), (d_total, d_normed))
        found.append([leaf.grad for leaf in leaves])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounded_sum_is_what_is_normed(dtype: torch.dtype) -> None:
    x, residual, weight = (drawn(*size, seed=i).to(dtype) for i, size in enumerate(((6, 40), (6, 40), (40,))))
    total, normed = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(normed, rms_norm(total, weight, 1e-6))


@pytest.mark.parametrize("config", [Config(1, 1, 1, 1, 1, 1), Config(4, 1, 2, 1, 3, 2), Config(2, 2, 4, 2, 99, 3)])
def test_cuts_give_the_same(config: Config) -> None:
    found = []
    for cut in (config, None):
        x, weight = drawn(9, 12).requires_grad_(), drawn(12, seed=1).requires_grad_()
        y = rms_norm(x, weight, 1e-6, _config=cut)
        y.backward(y.detach().cos())
        found.append((y.detach(), x.grad, weight.grad))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_adds_to_its_buffer(dtype: torch.dtype) -> None:
    x, weight = drawn(5, 12).requires_grad_(), drawn(12, seed=1).to(torch.bfloat16).requires_grad_()
    rms_norm(x, weight, 1e-6).cos().sum().backward()
    expected = weight.grad.float()  # type: ignore[union-attr]
    weight.grad = None
    weight.main_grad = torch.ones(12, device=DEVICE, dtype=dtype)  # type: ignore[attr-defined]
    rms_norm(x, weight, 1e-6).cos().sum().backward()
    torch.testing.assert_close(weight.main_grad.float() - 1, expected, rtol=2e-2, atol=2e-2)  # type: ignore[attr-defined]
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]


def test_views_of_whole_rows_are_not_copied() -> None:
    wide = drawn(5, 3, 20)
    assert _rows(wide[..., :12]).data_ptr() == wide.data_ptr()
    assert _rows(wide.transpose(0, 1)).data_ptr() != wide.data_ptr()
    torch.testing.assert_close(
        rms_norm(wide[..., 4:12], drawn(8), 1e-6), norm.rms_norm(wide[..., 4:12], drawn(8), 1e-6)
    )


def test_no_rows() -> None:
    x, weight = torch.zeros(0, 4, device=DEVICE, requires_grad=True), torch.ones(4, device=DEVICE, requires_grad=True)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [0.0] * 4


def test_too_wide_is_an_error() -> None:
    assert _cut(16384).warps == 16 and _cut(16384).programs == 132
    with pytest.raises(Unsupported, match="rows of 16385.*Allowed: up to 16384"):
        rms_norm(torch.ones(1, 16385, device=DEVICE), torch.ones(16385, device=DEVICE), 1e-6)


def test_unlike_addends_are_an_error() -> None:
    with pytest.raises(Unsupported, match=r"x is \(2, 4\).*residual \(1, 4\)"):
        add_rms_norm(
            torch.ones(2, 4, device=DEVICE), torch.ones(1, 4, device=DEVICE), torch.ones(4, device=DEVICE), 0.0
        )
