"""The ops `ada_rms_norm`, `layer_norm_modulate` and `gated_residual` in Triton: contracts, cuts, parts of a tensor."""

from __future__ import annotations

import pytest
import torch

from loong_core.errors import Unsupported
from loong_core.references import modulation as reference
from loong_core.testing import OpContract
from loong_ops.gated_residual import gated_residual
from loong_ops.modulation import Config, _cut, ada_rms_norm, layer_norm_modulate
from loong_ops.support import interpreted

DEVICE = "cpu" if interpreted() else "cuda"


@pytest.mark.skipif(not interpreted(), reason="kernels run on the device here, not under Triton's interpreter")
class TestAdaRmsNorm(OpContract):
    op = "ada_rms_norm"
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.gpu
class TestAdaRmsNormOnDevice(OpContract):
    op = "ada_rms_norm"
    implementation = "triton"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.skipif(not interpreted(), reason="kernels run on the device here, not under Triton's interpreter")
class TestResidualAdaRmsNorm(OpContract):
    op = "residual_ada_rms_norm"
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.gpu
class TestResidualAdaRmsNormOnDevice(OpContract):
    op = "residual_ada_rms_norm"
    implementation = "triton"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.skipif(not interpreted(), reason="kernels run on the device here, not under Triton's interpreter")
class TestLayerNormModulate(OpContract):
    op = "layer_norm_modulate"
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.gpu
class TestLayerNormModulateOnDevice(OpContract):
    op = "layer_norm_modulate"
    implementation = "triton"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.skipif(not interpreted(), reason="kernels run on the device here, not under Triton's interpreter")
class TestGatedResidual(OpContract):
    op = "gated_residual"
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.gpu
class TestGatedResidualOnDevice(OpContract):
    op = "gated_residual"
    implementation = "triton"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE).requires_grad_()


@pytest.mark.parametrize("name", ["ada_rms_norm", "layer_norm_modulate"])
@pytest.mark.parametrize("config", [Config(1, 1, 1), Config(2, 1, 5), Config(4, 2, 99)])
def test_cuts_give_the_same(name: str, config: Config) -> None:
    """Fewer programs than samples, as many, more than there are blocks."""
    ours = {"ada_rms_norm": ada_rms_norm, "layer_norm_modulate": layer_norm_modulate}[name]
    found = []
    for function, others in ((ours, {"_config": config}), (getattr(reference, name), {})):
        leaves = drawn(2, 9, 12), drawn(2, 12, seed=1), drawn(2, 12, seed=2)
        y = function(*leaves, 1e-6, **others)
        y.backward(y.detach().cos())
        found.append((y.detach(), *(leaf.grad for leaf in leaves)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_parts_of_one_modulation() -> None:
    """Scale, shift and gate as a layer makes them: views into one tensor, whose gradient is theirs together."""
    found = []
    for norm, residual in (
        (ada_rms_norm, gated_residual),
        (reference.ada_rms_norm, reference.gated_residual),
    ):
        x, modulation = drawn(3, 4, 10), drawn(3, 30, seed=1)
        scale, shift, gate = modulation.chunk(3, dim=-1)
        y = residual(x, norm(x, scale, shift, 1e-6), gate)
        y.backward(y.detach().sin())
        found.append((y.detach(), x.grad, modulation.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_weights_stored_less_one() -> None:
    """One sample of many rows is the norm of Gemma."""
    x, weight = drawn(50, 16), drawn(16, seed=1)
    ours = ada_rms_norm(x[None], weight[None], None, 1e-6)[0]
    torch.testing.assert_close(ours, torch.nn.functional.rms_norm(x, (16,), 1 + weight, 1e-6))


def test_too_wide_is_an_error() -> None:
    assert _cut("ada_rms_norm", 16384).warps == 16
    with pytest.raises(Unsupported, match="layer_norm_modulate: rows of 16385.*Allowed: up to 16384"):
        layer_norm_modulate(torch.ones(1, 1, 16385, device=DEVICE), torch.ones(1, 16385, device=DEVICE), None, 1e-6)
