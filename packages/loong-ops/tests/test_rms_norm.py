"""The ops `rms_norm` and `residual_rms_norm` in Triton."""

from __future__ import annotations

import pytest
import torch

from loong_core.errors import Unsupported
from loong_core.references import norm
from loong_core.testing import OpContract
from loong_ops.norm_rows import Config, as_rows, cut
from loong_ops.rms_norm import residual_rms_norm, rms_norm
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


@pytest.mark.skipif(not interpreted(), reason="kernels run on the device here, not under Triton's interpreter")
class TestResidualRmsNorm(OpContract):
    op = "residual_rms_norm"
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.gpu
class TestResidualRmsNormOnDevice(OpContract):
    op = "residual_rms_norm"
    implementation = "triton"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def test_rows_apart() -> None:
    """Views of whole rows, inputs and upstream gradients alike, each with a step of its own."""
    x, upstream = (drawn(4, 10 + 3 * i, seed=i)[:, i : i + 10] for i in range(2))
    found = []
    for function in (rms_norm, norm.rms_norm):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, drawn(10, seed=5))]
        function(*leaves, 1e-6).backward(upstream)
        found.append([leaf.grad for leaf in leaves])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_frozen_inputs(wanted: tuple[bool, ...]) -> None:
    found = []
    for function in (rms_norm, norm.rms_norm):
        leaves = [drawn(*size, seed=i) for i, size in enumerate(((3, 10), (10,)))]
        for leaf, wants in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(wants)
        function(*leaves, 1e-6).cos().sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == list(wanted)
        found.append(next(leaf.grad for leaf in leaves if leaf.grad is not None))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("config", [Config(1, 1, 1, 1, 1, 1), Config(4, 1, 2, 1, 3, 2), Config(2, 2, 4, 2, 99, 3)])
def test_cuts_give_the_same(config: Config) -> None:
    found = []
    for chosen in (config, None):
        x, weight = drawn(9, 12).requires_grad_(), drawn(12, seed=1).requires_grad_()
        y = rms_norm(x, weight, 1e-6, _config=chosen)
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
    assert as_rows(wide[..., :12]).data_ptr() == wide.data_ptr()
    assert as_rows(wide.transpose(0, 1)).data_ptr() != wide.data_ptr()
    torch.testing.assert_close(
        rms_norm(wide[..., 4:12], drawn(8), 1e-6), norm.rms_norm(wide[..., 4:12], drawn(8), 1e-6)
    )


def test_no_rows() -> None:
    x, weight = torch.zeros(0, 4, device=DEVICE, requires_grad=True), torch.ones(4, device=DEVICE, requires_grad=True)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [0.0] * 4


def test_too_wide_is_an_error() -> None:
    widest = cut("rms_norm", 16384, 24)
    assert widest.warps == 16 and widest.programs == 132
    with pytest.raises(Unsupported, match="residual_rms_norm: rows of 16385.*Allowed: up to 16384"):
        residual_rms_norm(torch.ones(1, 16385, device=DEVICE), torch.ones(16385, device=DEVICE), 1e-6)
