"""The op `geglu` in Triton: the contract, cuts, and far gates."""

from __future__ import annotations

import pytest
import torch

from loong_core.references import activation
from loong_core.testing import OpContract
from loong_ops.geglu import geglu
from loong_ops.support import interpreted
from loong_ops.swiglu import Config

DEVICE = "cpu" if interpreted() else "cuda"


@pytest.mark.skipif(not interpreted(), reason="kernels run on the device here, not under Triton's interpreter")
class TestGeglu(OpContract):
    op = "geglu"
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.gpu
class TestGegluOnDevice(OpContract):
    op = "geglu"
    implementation = "triton"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("config", [Config(1, 16, 1), Config(4, 8, 1), Config(2, 128, 4)])
def test_cuts_give_the_same(config: Config) -> None:
    found = []
    for function, others in ((geglu, {"_config": config}), (activation.geglu, {})):
        x = torch.randn(7, 58, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        y = function(x, **others)
        y.backward(torch.arange(7.0 * 29, device=DEVICE).cos().reshape(7, 29))
        found.append((y.detach(), x.grad))
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_far_gates() -> None:
    """Exponentials that overflow still leave the right zeros."""
    x = torch.tensor([[-1e4, 1e4, -200.0, 200.0, 3.0, 2.0, 1.0, 5.0]], device=DEVICE).requires_grad_()
    y = geglu(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), torch.tensor([[0.0, 2e4, 0.0, 1e3]], device=DEVICE))
    expected = torch.tensor([[0.0, 2.0, 0.0, 5.0, 0.0, 1e4, 0.0, 200.0]], device=DEVICE)
    torch.testing.assert_close(x.grad, expected)
