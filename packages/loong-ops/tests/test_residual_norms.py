"""The ops `residual_...` in Triton: x beside its norm, for autograd as if the norm had never seen it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from loong_core.references import modulation, norm
from loong_ops.layer_norm import residual_layer_norm
from loong_ops.modulation import residual_ada_rms_norm
from loong_ops.rms_norm import residual_rms_norm
from loong_ops.support import interpreted

DEVICE = "cpu" if interpreted() else "cuda"
Op = Callable[..., tuple[Tensor, Tensor]]
ROWS = 2, 5, 12


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def pairs(weights: Callable[..., tuple[Any, ...]], ours: Op, reference: Op) -> tuple[Any, ...]:
    return weights, ours, reference


OPS = {
    "rms_norm": pairs(lambda: (drawn(12, seed=1),), residual_rms_norm, norm.residual_rms_norm),
    "layer_norm": pairs(lambda: (drawn(12, seed=1), drawn(12, seed=2)), residual_layer_norm, norm.residual_layer_norm),
    "ada_rms_norm": pairs(
        lambda: (drawn(2, 12, seed=1), drawn(2, 12, seed=2)),
        residual_ada_rms_norm,
        modulation.residual_ada_rms_norm,
    ),
}
USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "both": lambda normed, x: (x + normed.sin()).cos(),
    "norm": lambda normed, x: normed.cos(),
    "residual": lambda normed, x: x.cos(),
    "non_contiguous": lambda normed, x: (x.transpose(0, 2) * normed.transpose(0, 2)).expand(3, 12, 5, 2).cos(),
    "twice": lambda normed, x: x.cos() + (x * normed).sin(),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("name", OPS)
def test_gradients(name: str, leaf: bool, use: str) -> None:
    """Of results that are used together, alone, and through views; x a leaf, or itself computed and used elsewhere."""
    weights, *functions = OPS[name]
    found = []
    for function in functions:
        leaves = [drawn(*ROWS), *weights()]
        for tensor in leaves:
            tensor.requires_grad_()
        x = leaves[0] if leaf else leaves[0] * 1.5
        result = USES[use](*function(x, *leaves[1:], 1e-6)).sum() + (0.0 if leaf else x.sin().sum())
        result.backward()
        found.append([result.detach(), *(tensor.grad for tensor in leaves)])
    for ours, expected in zip(*found, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPS)
def test_x_is_handed_through(name: str) -> None:
    """Its memory, never a copy; a gradient goes to it only where x has one."""
    weights, ours, _ = OPS[name]
    trained = [tensor.requires_grad_() for tensor in weights()]
    x = drawn(*ROWS)
    normed, residual = ours(x, *trained, 1e-6)
    assert residual is x and normed.requires_grad
    x.requires_grad_()
    with torch.no_grad():
        normed, residual = ours(x, *trained, 1e-6)
    assert residual is x and not normed.requires_grad
    normed, residual = ours(x, *trained, 1e-6)
    assert residual.data_ptr() == x.data_ptr() and residual.requires_grad and normed.requires_grad
    with pytest.raises(RuntimeError, match="inplace|in-place"):
        residual.add_(1.0)


@pytest.mark.parametrize("name", OPS)
def test_sums_are_rounded_once(name: str) -> None:
    """In bfloat16 the two gradients meet before they are rounded: less its rounded self, one leaves what it lost."""
    weights, ours, _ = OPS[name]
    x, *others = (tensor.bfloat16() for tensor in (drawn(*ROWS), *weights()))
    results = ours(x.requires_grad_(), *others, 1e-6)
    upstream = drawn(*ROWS, seed=7).bfloat16()
    alone = torch.autograd.grad(results[0], x, upstream, retain_graph=True)[0]
    lost = torch.autograd.grad(results, x, [upstream, -alone])[0]
    assert lost.count_nonzero() > lost.numel() // 2
    assert (lost.abs() <= alone.abs() * 2**-7).all()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", OPS)
def test_computed_again(name: str, reentrant: bool) -> None:
    """Inside an activation checkpoint."""
    weights, ours, reference = OPS[name]
    found = []
    for function, again in ((ours, True), (reference, False)):
        leaves = [tensor.requires_grad_() for tensor in (drawn(*ROWS), *weights())]

        def layer(x: Tensor, *others: Tensor, function: Op = function) -> Tensor:
            for _ in range(2):
                normed, residual = function(x, *others, 1e-6)
                x = residual + normed.sin()
            return x

        called = partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=reentrant) if again else layer
        called(*leaves).cos().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for ours_, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours_, expected, rtol=1e-4, atol=1e-4)
