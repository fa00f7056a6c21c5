"""Dropout in Triton: the contracts, what is kept for backward, cuts, and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loong_core.testing import DropoutContract, OpContract
from loong_ops.dropout import dropout_add
from loong_ops.gelu_dropout import gelu_dropout
from loong_ops.support import interpreted

DEVICE = "cpu" if interpreted() else "cuda"


@pytest.mark.skipif(not interpreted(), reason="kernels run on the device here, not under Triton's interpreter")
class TestDropoutAdd(OpContract):
    op = "dropout_add"
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.gpu
class TestDropoutAddOnDevice(OpContract):
    op = "dropout_add"
    implementation = "triton"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.skipif(not interpreted(), reason="kernels run on the device here, not under Triton's interpreter")
class TestDropoutAddWithRates(DropoutContract):
    op = "dropout_add"
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.gpu
class TestDropoutAddWithRatesOnDevice(DropoutContract):
    op = "dropout_add"
    implementation = "triton"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")


def plus_one(x: Tensor, **config: dict[str, int]) -> Tensor:
    return dropout_add(x, torch.ones_like(x), 0.3, **config)


def activated(x: Tensor, **config: dict[str, int]) -> Tensor:
    return gelu_dropout(x, 0.3, **config)


@pytest.mark.parametrize("function", [plus_one, activated])
@pytest.mark.parametrize("config", [{"BLOCK": 4, "num_warps": 1}, {"BLOCK": 64, "num_warps": 1}])
def test_cuts_give_the_same(function: Callable[..., Tensor], config: dict[str, int]) -> None:
    found = []
    for settings in ({}, {"_config": config}):
        x = torch.linspace(0.5, 2, 301, device=DEVICE).requires_grad_()
        torch.manual_seed(5)
        y = function(x, **settings)
        y.backward(y.detach().cos())
        found.append((y.detach(), x.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("function", "kept"), [(plus_one, 0), (activated, 300 * 4)])
def test_no_mask_is_kept(function: Callable[..., Tensor], kept: int) -> None:
    """Beside what went into the activation a seed of 8 bytes is."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: (sizes.append(part.nbytes), part)[1], lambda part: part):
        function(torch.ones(300, device=DEVICE).requires_grad_())
    assert sum(sizes) == kept + 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("function", [plus_one, activated])
def test_replays_of_a_graph_drop_what_the_seed_says(function: Callable[..., Tensor]) -> None:
    """Each replay drops as a call of its own would, and its backward pass what its forward pass dropped."""
    x = torch.ones(4096, device="cuda").requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        y = function(x)
        return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y, gradient = step()
    results = []
    for seed in (1, None, 1):
        if seed is not None:
            torch.manual_seed(seed)
        graph.replay()
        assert torch.equal(y > y.min(), gradient > 0)
        results.append(y.clone())
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])
    torch.manual_seed(1)
    assert torch.equal(results[0], step()[0])
