"""The op `rotary_qkv` in Triton: the contract, views that attention hands back, and the engine's gradient buffers."""

from __future__ import annotations

import pytest
import torch

from loong_core.references import rotary
from loong_core.testing import OpContract
from loong_ops.rotary_qkv import Config, rotary_qkv
from loong_ops.support import interpreted

DEVICE = "cpu" if interpreted() else "cuda"


@pytest.mark.skipif(not interpreted(), reason="kernels run on the device here, not under Triton's interpreter")
class TestRotaryQkv(OpContract):
    op = "rotary_qkv"
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.gpu
class TestRotaryQkvOnDevice(OpContract):
    op = "rotary_qkv"
    implementation = "triton"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")


def inputs(s: int = 3, b: int = 2, g: int = 2, width: int = 4, d: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    mixed = torch.randn(s, b, g, width, d, generator=generator)
    angles = torch.randn(s, b, 1, d // 2, generator=generator).mul(50).repeat(1, 1, 1, 2)
    norms = torch.randn(2, d, generator=generator)
    return mixed.to(DEVICE), angles.to(DEVICE), norms[0].to(DEVICE), norms[1].to(DEVICE)


def test_large_angles_stay_accurate() -> None:
    """A position of a million is an angle of a million in the fastest pair."""
    mixed, angles, *norms = inputs()
    ours = rotary_qkv(mixed, angles * 20_000, *norms, 1e-6)
    exact = rotary.rotary_qkv(mixed.double(), (angles * 20_000).double(), *[norm.double() for norm in norms], 1e-6)
    for found, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_angles_may_be_shared_by_the_samples() -> None:
    mixed, angles, *norms = inputs()
    ours = rotary_qkv(mixed, angles[:, :1], *norms, 1e-6)
    for found, expected in zip(ours, rotary.rotary_qkv(mixed, angles[:, :1], *norms, 1e-6), strict=True):
        torch.testing.assert_close(found, expected)


def test_gradient_of_one_result_alone() -> None:
    """Results that nothing uses have no gradient."""
    for index in range(3):
        found = []
        for function in (rotary_qkv, rotary.rotary_qkv):
            tensors = [tensor.requires_grad_(i != 1) for i, tensor in enumerate(inputs())]
            function(*tensors, 1e-6)[index].square().sum().backward()
            found.append([tensors[i].grad for i in (0, 2, 3)])
        for ours, expected in zip(*found, strict=True):
            torch.testing.assert_close(ours, torch.zeros_like(ours) if expected is None else expected)


def test_broadcast_upstream() -> None:
    """A sum's gradient is one number in a view of no strides."""
    found = []
    for function in (rotary_qkv, rotary.rotary_qkv):
        mixed, *others = inputs()
        mixed.requires_grad_()
        sum(part.sum() for part in function(mixed, *others, 1e-6)).backward()
        found.append(mixed.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("programs", [1, 2, 5])
def test_few_programs_take_all_tokens(programs: int) -> None:
    found = []
    for config in (Config(), Config(backward_programs=programs)):
        tensors = [tensor.requires_grad_(i != 1) for i, tensor in enumerate(inputs())]
        results = rotary_qkv(*tensors, 1e-6, _config=config)
        torch.autograd.backward(results, [part.detach().cos() for part in results])
        found.append([tensors[i].grad for i in (0, 2, 3)])
    for some, all_ in zip(*found, strict=True):
        torch.testing.assert_close(some, all_)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_add_to_their_buffers(dtype: torch.dtype) -> None:
    mixed, angles, *norms = inputs()
    expected = []
    for buffered in (False, True):
        weights = [norm.to(torch.bfloat16).requires_grad_() for norm in norms]
        for weight in weights if buffered else ():
            weight.main_grad = torch.ones(weight.shape, device=DEVICE, dtype=dtype)  # type: ignore[attr-defined]
        query, key, _ = rotary_qkv(mixed, angles, *weights, 1e-6)
        (query.cos().sum() + key.sin().sum()).backward()
        if not buffered:
            expected = [weight.grad for weight in weights]
            continue
        for weight, gradient in zip(weights, expected, strict=True):
            found, limit = weight.main_grad.float() - 1, 1e-2 if dtype == torch.float32 else 4e-2
            torch.testing.assert_close(found, gradient.float(), rtol=limit, atol=limit)
            assert weight.grad_added_to_main_grad


def test_without_norms_the_projection_is_not_kept() -> None:
    mixed, angles, *_ = inputs()
    query, *_ = rotary_qkv(mixed.requires_grad_(), angles, None, None, 1e-6)
    kept = query.grad_fn.saved_tensors
    assert all(tensor is None or tensor.data_ptr() != mixed.data_ptr() for tensor in kept)
