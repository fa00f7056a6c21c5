"""What surrounds QuACK's products, with torch in their place; and on a Hopper card, the products themselves."""

from __future__ import annotations

import importlib.util
import math
import sys
from typing import Any

import pytest
import torch
from quack_stand_ins import gemm_gated, needs_quack
from torch import Tensor

from loong_core.errors import Unsupported
from loong_core.references.experts import experts as reference
from loong_core.testing.op import OpContract, error
from loong_core.types import OpRequest
from loong_ops import quack_experts, support
from loong_ops.quack_experts import experts


@pytest.mark.usefixtures("torch_products")
class TestAroundTheProducts(OpContract):
    """Indices, transposes, alternating columns and gradients: everything but the products."""

    op = "experts"
    implementation = "quack"
    backend = "cuda"


@pytest.mark.gpu
@needs_quack
class TestOnTheCard(OpContract):
    """The products as well."""

    op = "experts"
    implementation = "quack"
    backend = "cuda"
    device = "cuda"


def inputs(
    t: int = 9, n: int = 16, f: int = 8, e: int = 3, k: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randn(shape, generator=generator) for shape in ((t, n), (e, 2 * f, n), (e, n, f))]
    hidden, up, down = (tensor.bfloat16().requires_grad_() for tensor in drawn)
    weights = torch.rand(t, k, generator=generator).requires_grad_()
    return hidden, up, down, weights, torch.rand(t, e, generator=generator).topk(k).indices


@pytest.mark.usefixtures("torch_products")
def test_shapes_repeat_where_numbers_of_rows_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows are held here as the choice wants, which differs in every call; tensors have few sizes."""
    sizes, gated = set(), quack_experts._gated

    def noted(hidden: Tensor, up: Tensor, rows: Any, *args: Any) -> Any:
        sizes.add((len(rows.token), len(rows.weight)))
        return gated(hidden, up, rows, *args)

    monkeypatch.setattr(quack_experts, "_gated", noted)
    monkeypatch.setattr(quack_experts, "GRANULE", 8)
    counts = set()
    for seed in range(12):
        hidden, up, down, weights, _ = inputs(t=20, e=2)
        chosen = torch.rand(20, 5, generator=torch.Generator().manual_seed(seed)).topk(2).indices
        count = int(((chosen == 1) | (chosen == 2)).sum())
        counts.add(count)
        found = experts(hidden, up, down, weights, chosen, first=1, pairs=lambda count=count: count)
        exact = reference(hidden.float(), up.float(), down.float(), weights, chosen, first=1)
        assert error(found.float(), exact) < 2e-2
        (gradient,) = torch.autograd.grad(found.float().sum(), up)
        (wanted,) = torch.autograd.grad(exact.sum(), up)
        assert error(gradient.float(), wanted.float()) < 2e-2
    assert len(counts) > 4 and sizes <= {(16, 16), (24, 24), (8, 8)}
    experts(*inputs(t=3)[:4], inputs(t=3)[4])
    assert (6, 6) in sizes  # never more than there are


@pytest.mark.usefixtures("torch_products")
@pytest.mark.parametrize("start", [0, 8, 1])  # 1: a buffer that no tensor map can reach
def test_weight_gradients_are_added_into_the_buffers(start: int) -> None:
    hidden, up, down, weights, chosen = inputs()
    for weight in (up, down):
        memory = torch.full((start + weight.numel(),), 1000.0)
        weight.main_grad = memory[start:].view(weight.shape)  # type: ignore[attr-defined]
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, up, down, weights)]
    grad = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    experts(hidden, up, down, weights, chosen).backward(grad)
    reference(*wide, chosen).backward(grad.float())  # type: ignore[misc]
    for weight, exact in ((up, wide[1]), (down, wide[2])):
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        assert weight.main_grad.dtype == torch.float32  # type: ignore[attr-defined]
        assert exact.grad is not None
        assert error(weight.main_grad - 1000, exact.grad) < 2e-2  # type: ignore[attr-defined]


@pytest.mark.usefixtures("torch_products")
@pytest.mark.parametrize("start", [0, 8, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_are_written_into_empty_buffers(dtype: torch.dtype, start: int) -> None:
    hidden, up, down, weights, chosen = inputs()
    for weight in (up, down):
        memory = torch.full((start + weight.numel(),), math.nan, dtype=dtype)
        weight.main_grad = memory[start:].view(weight.shape)  # type: ignore[attr-defined]
        weight.main_grad_empty = True  # type: ignore[attr-defined]
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, up, down, weights)]
    reference(*wide, chosen).sum().backward()  # type: ignore[misc]
    for times in (1, 2):
        experts(hidden, up, down, weights, chosen).sum().backward()
        for weight, exact in ((up, wide[1]), (down, wide[2])):
            assert exact.grad is not None
            assert error(weight.main_grad, times * exact.grad) < 2e-2  # type: ignore[attr-defined]


@pytest.mark.usefixtures("torch_products")
def test_without_tokens_empty_buffers_become_zeros() -> None:
    hidden, up, down, weights, chosen = inputs()
    hidden, weights = (tensor.detach()[:0].requires_grad_() for tensor in (hidden, weights))
    up.main_grad, up.main_grad_empty = torch.full(up.shape, math.nan), True  # type: ignore[attr-defined]
    experts(hidden, up, down, weights, chosen[:0]).sum().backward()
    assert not bool(up.main_grad.any())  # type: ignore[attr-defined]


@pytest.mark.usefixtures("torch_products")
def test_without_tokens_the_buffers_are_complete_all_the_same() -> None:
    hidden, up, down, weights, chosen = inputs()
    hidden, weights = (tensor.detach()[:0].requires_grad_() for tensor in (hidden, weights))
    up.main_grad = torch.full(up.shape, 3.0)  # type: ignore[attr-defined]
    experts(hidden, up, down, weights, chosen[:0]).sum().backward()
    assert up.grad_added_to_main_grad and bool((up.main_grad == 3).all())  # type: ignore[attr-defined]
    assert down.grad is not None and not bool(down.grad.any())


@pytest.mark.usefixtures("torch_products")
def test_weights_in_float32_get_gradients_in_float32() -> None:
    hidden, up, down, weights, chosen = inputs()
    experts(hidden, up, down, weights, chosen).sum().backward()
    assert weights.grad is not None and weights.grad.dtype == torch.float32


@pytest.mark.usefixtures("torch_products")
def test_nothing_is_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []

    def recorded(*args: Any, **options: Any) -> tuple[Tensor | None, Tensor]:
        kept.append(options["store_preact"])
        return gemm_gated(*args, **options)

    monkeypatch.setattr(sys.modules["quack.gemm_interface"], "gemm_gated", recorded)
    hidden, up, down, weights, chosen = inputs()
    with torch.no_grad():
        experts(hidden, up, down, weights, chosen)
    experts(hidden, up, down, weights, chosen)
    assert kept == [False, True]


def test_another_dtype_is_refused() -> None:
    hidden, up, down, weights, chosen = inputs()
    with pytest.raises(Unsupported, match="hidden is float32"):
        experts(hidden.float(), up, down, weights, chosen)


@pytest.mark.usefixtures("torch_products")
@pytest.mark.parametrize(("dtype", "wrong"), [("bfloat16", None), ("float32", "bfloat16"), ("float16", "bfloat16")])
def test_supports(dtype: str, wrong: str | None) -> None:
    reason = support.quack(OpRequest(backend="cuda", dtype=dtype, degrees={}, fields={}))
    assert (reason is None) == (wrong is None) and (wrong is None or wrong in str(reason))


def test_supports_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = support.quack(OpRequest(backend="cuda", dtype="bfloat16", degrees={}, fields={}))
    assert reason is not None and "quack-kernels" in reason and "nvidia-cutlass-dsl" in reason
