"""The ops `layer_norm` and `residual_layer_norm` in Triton."""

from __future__ import annotations

import pytest
import torch

from loong_core.errors import Unsupported
from loong_core.references import norm
from loong_core.testing import OpContract
from loong_ops.layer_norm import layer_norm, residual_layer_norm
from loong_ops.norm_rows import Config
from loong_ops.support import interpreted

DEVICE = "cpu" if interpreted() else "cuda"


@pytest.mark.skipif(not interpreted(), reason="kernels run on the device here, not under Triton's interpreter")
class TestLayerNorm(OpContract):
    op = "layer_norm"
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.gpu
class TestLayerNormOnDevice(OpContract):
    op = "layer_norm"
    implementation = "triton"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.skipif(not interpreted(), reason="kernels run on the device here, not under Triton's interpreter")
class TestResidualLayerNorm(OpContract):
    op = "residual_layer_norm"
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.gpu
class TestResidualLayerNormOnDevice(OpContract):
    op = "residual_layer_norm"
    implementation = "triton"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("config", [Config(1, 1, 1, 1, 1, 1), Config(4, 1, 2, 1, 3, 2), Config(2, 2, 4, 2, 99, 3)])
def test_cuts_give_the_same(config: Config) -> None:
    found = []
    for chosen in (config, None):
        leaves = [drawn(*size, seed=i).requires_grad_() for i, size in enumerate(((9, 12), (12,), (12,)))]
        y = layer_norm(*leaves, 1e-6, _config=chosen)
        y.backward(y.detach().cos())
        found.append((y.detach(), *(leaf.grad for leaf in leaves)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_rows_far_from_zero() -> None:
    """The variance is that of what is left when the mean is gone."""
    x = drawn(3, 40) + 1e4
    torch.testing.assert_close(layer_norm(x, None, None, 1e-6), norm.layer_norm(x.double(), None, None, 1e-6).float(),
                               rtol=0, atol=2e-3)  # fmt: skip


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("name", ["layer_norm", "residual_layer_norm"])
def test_frozen_inputs(name: str, wanted: tuple[bool, ...]) -> None:
    found = []
    for function in ({"layer_norm": layer_norm, "residual_layer_norm": residual_layer_norm}[name], getattr(norm, name)):
        leaves = [drawn(*size, seed=i) for i, size in enumerate(((3, 10), (10,), (10,)))]
        for leaf, wants in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(wants)
        result = function(*leaves, 1e-6)
        (result if isinstance(result, torch.Tensor) else sum(result)).cos().sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == list(wanted)
        found.append(next(leaf.grad for leaf in leaves if leaf.grad is not None))
    torch.testing.assert_close(*found)


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    x, weight = drawn(3, 10), drawn(10, seed=1).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        assert layer_norm(x, weight.detach(), None, 1e-6).grad_fn is None
        with torch.no_grad():
            layer_norm(x, weight, None, 1e-6)
        assert not kept
        layer_norm(x, weight, None, 1e-6)
    assert [tuple(tensor.shape) for tensor in kept] == [(3, 10), (10,), (2, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_add_to_their_buffers(dtype: torch.dtype) -> None:
    x = drawn(5, 12).requires_grad_()
    weights = [drawn(12, seed=seed).to(torch.bfloat16).requires_grad_() for seed in (1, 2)]
    layer_norm(x, *weights, 1e-6).cos().sum().backward()
    expected = [weight.grad.float() for weight in weights]  # type: ignore[union-attr]
    for weight in weights:
        weight.grad = None
        weight.main_grad = torch.ones(12, device=DEVICE, dtype=dtype)  # type: ignore[attr-defined]
    layer_norm(x, *weights, 1e-6).cos().sum().backward()
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.main_grad.float() - 1, gradient, rtol=2e-2, atol=2e-2)  # type: ignore[attr-defined]
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]


def test_too_wide_is_an_error() -> None:
    with pytest.raises(Unsupported, match="residual_layer_norm: rows of 16385.*Allowed: up to 16384"):
        residual_layer_norm(torch.ones(1, 16385, device=DEVICE), None, None, 1e-6)
