"""The op `linear` by torch's products: the contract, and where gradients of weights go."""

from __future__ import annotations

import math

import pytest
import torch

from loong_core.references import linear as references
from loong_core.references.linear import linear as reference
from loong_core.testing import DropoutContract
from loong_core.testing.op import OpContract, error
from loong_ops.linear import linear, linear_gelu
from loong_ops.support import interpreted


class TestLinear(OpContract):
    op = "linear"
    implementation = "cublas"
    backend = "cuda"
    dtypes = ("float32", "bfloat16", "float16", "float64")


@pytest.mark.gpu
class TestLinearOnDevice(OpContract):
    op = "linear"
    implementation = "cublas"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16", "float64")


class TestLinearGelu(OpContract):
    op = "linear_gelu"
    implementation = "cublas"
    backend = "cuda"
    dtypes = ("float32", "bfloat16", "float16", "float64")


@pytest.mark.gpu
class TestLinearGeluOnDevice(OpContract):
    op = "linear_gelu"
    implementation = "cublas"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16", "float64")


@pytest.mark.skipif(not interpreted(), reason="kernels run on the device here, not under Triton's interpreter")
class TestLinearGeluWithRates(DropoutContract):
    op = "linear_gelu"
    implementation = "cublas"
    dtypes = ("float32", "bfloat16", "float16", "float64")


@pytest.mark.gpu
class TestLinearGeluWithRatesOnDevice(DropoutContract):
    op = "linear_gelu"
    implementation = "cublas"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16", "float64")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the activation is an epilogue on a card alone")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gelu_of_frozen_weights_is_the_same(dtype: torch.dtype) -> None:
    drawn = (torch.randn(shape, device="cuda") for shape in ((5, 33, 64), (96, 64), (96,)))
    x, weight, bias = (tensor.to(dtype) for tensor in drawn)
    exact = references.linear_gelu(x.double(), weight.double(), bias.double())
    assert error(linear_gelu(x, weight, bias), exact) < (1e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("start", [0, 1])  # 1: a buffer that begins between two lines of 16 bytes
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_gradients_of_weights_go_into_the_buffers(dtype: torch.dtype, limit: float, start: int, empty: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    drawn = (torch.randn(shape, generator=generator) for shape in ((3, 7, 15), (21, 15), (21,)))
    x, *parameters = (tensor.bfloat16().requires_grad_() for tensor in drawn)
    wide = [tensor.detach().float().requires_grad_() for tensor in (x, *parameters)]
    # What comes from above is rounded for both alike, so that only the rounding of this op's sums is measured.
    upstream = torch.randn(3, 7, 21, generator=generator).bfloat16()
    reference(*wide).backward(upstream.float())
    for parameter in parameters:
        memory = torch.full((start + parameter.numel(),), math.nan if empty else 0.0, dtype=dtype)
        parameter.main_grad = memory[start:].view(parameter.shape)
        parameter.main_grad_empty = empty
    for times in (1, 2):
        linear(x, *parameters).backward(upstream)
        for parameter, exact in zip(parameters, wide[1:], strict=True):
            assert exact.grad is not None and parameter.grad_added_to_main_grad
            assert error(parameter.main_grad, times * exact.grad) < limit


def test_without_rows_the_buffer_is_complete_all_the_same() -> None:
    weight = torch.randn(4, 3).requires_grad_()
    weight.main_grad, weight.main_grad_empty = torch.full((4, 3), math.nan), True  # type: ignore[attr-defined]
    linear(torch.zeros(0, 3), weight).sum().backward()
    assert bool((weight.main_grad == 0).all())  # type: ignore[attr-defined]


def test_a_compiled_graph_keeps_the_gradient() -> None:
    x, weight = torch.randn(5, 3), torch.randn(4, 3).requires_grad_()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    compiled(x, weight, None).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(4, 3))


@pytest.mark.parametrize("empty", [False, True])
def test_the_weights_gradient_can_be_put_off(empty: bool) -> None:
    from loong_core.parallel.gradient_buffer import put_off

    generator = torch.Generator().manual_seed(5)
    x = torch.randn(7, 16, generator=generator).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(24, 16, generator=generator))
    weight.main_grad, weight.main_grad_empty = torch.full((24, 16), 3.0), empty  # type: ignore[attr-defined]
    out = linear(x, weight)
    with put_off() as products:
        (of_x, nothing) = torch.autograd.grad(out.sum(), (x, weight), allow_unused=True)
    torch.testing.assert_close(of_x, weight.detach().sum(0).expand(7, 16))
    assert nothing is None and len(products) == 1 and bool((weight.main_grad == 3.0).all())  # type: ignore[attr-defined]
    products[0]()
    exact = x.detach().sum(0).expand(24, 16) + (0.0 if empty else 3.0)
    torch.testing.assert_close(weight.main_grad, exact)  # type: ignore[attr-defined]
