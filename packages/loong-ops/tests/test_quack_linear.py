"""Dense products by QuACK: which of them are whose, with torch in their place; and on a Hopper card, themselves."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from quack_stand_ins import needs_quack, play_cuda
from torch import Tensor

from loong_core.errors import Unsupported
from loong_core.references.linear import linear as reference
from loong_core.testing.op import OpContract, error
from loong_ops import quack_linear, quack_products
from loong_ops.bench import linear as bench
from loong_ops.bench.row import Missing
from loong_ops.quack_linear import linear
from loong_ops.quack_products import LARGE, LONG, Tile, rows_of, tile_for


@pytest.fixture(params=[0.0, 2.0], ids=["quack", "torch"])
def busy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Weights' gradients by QuACK however small, or by torch however large."""
    monkeypatch.setattr(quack_linear, "BUSY", request.param)
    return float(request.param)


@pytest.mark.usefixtures("torch_products", "busy")
class TestAroundTheProducts(OpContract):
    """Shapes, strides, biases and gradients: everything but the products."""

    op = "linear"
    implementation = "quack"
    backend = "cuda"


@pytest.mark.gpu
@needs_quack
@pytest.mark.usefixtures("busy", "any_size")
class TestOnTheCard(OpContract):
    """The products as well."""

    op = "linear"
    implementation = "quack"
    backend = "cuda"
    device = "cuda"


def inputs(t: int = 9, n: int = 16, m: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    drawn = (torch.randn(shape, generator=generator) for shape in ((t, n), (m, n), (m,)))
    x, weight, bias = (tensor.bfloat16().requires_grad_() for tensor in drawn)
    return x, weight, bias


def gradients(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The reference's, in float32, of the sum of all results."""
    wide = [tensor.detach().float().requires_grad_() for tensor in tensors]
    reference(*wide).sum().backward()
    return [tensor.grad for tensor in wide if tensor.grad is not None]


@pytest.mark.usefixtures("torch_products", "busy")
@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("start", [0, 8, 1])  # 1: a buffer that no tensor map can reach
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_gradients_of_weights_go_into_the_buffers(dtype: torch.dtype, limit: float, start: int, empty: bool) -> None:
    x, *parameters = inputs()
    exact = gradients((x, *parameters))[1:]
    for parameter in parameters:
        memory = torch.full((start + parameter.numel(),), math.nan if empty else 0.0, dtype=dtype)
        parameter.main_grad = memory[start:].view(parameter.shape)  # type: ignore[attr-defined]
        parameter.main_grad_empty = empty  # type: ignore[attr-defined]
    for times in (1, 2):
        linear(x, *parameters).sum().backward()
        for parameter, gradient in zip(parameters, exact, strict=True):
            assert parameter.grad_added_to_main_grad  # type: ignore[attr-defined]
            assert error(parameter.main_grad, times * gradient) < limit  # type: ignore[attr-defined]


@pytest.mark.usefixtures("torch_products", "busy")
@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("start", [0, 1])
def test_the_first_gradient_in_a_bfloat16_buffer_is_rounded_once(start: int, empty: bool) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        x, *parameters = inputs(t=300)
        for parameter in parameters:
            memory = torch.full((start + parameter.numel(),), math.nan if empty else 0.5, dtype=dtype)
            parameter.main_grad = memory[start:].view(parameter.shape)  # type: ignore[attr-defined]
            parameter.main_grad_empty = empty  # type: ignore[attr-defined]
        linear(x, *parameters).cos().sum().backward()
        found.append([parameter.main_grad for parameter in parameters])  # type: ignore[attr-defined]
    for exact, rounded in zip(*found, strict=True):
        assert torch.equal(exact.bfloat16(), rounded)


@pytest.mark.usefixtures("torch_products", "busy")
@pytest.mark.parametrize("empty", [True, False])
def test_without_rows_the_buffers_are_complete_all_the_same(empty: bool) -> None:
    x, weight, _ = inputs(t=0)
    weight.main_grad = torch.full(weight.shape, math.nan if empty else 3.0)  # type: ignore[attr-defined]
    weight.main_grad_empty = empty  # type: ignore[attr-defined]
    linear(x, weight).sum().backward()
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert bool((weight.main_grad == (0 if empty else 3)).all())  # type: ignore[attr-defined]


@pytest.mark.usefixtures("torch_products")
def test_odd_sizes_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(sys.modules["quack.gemm"], "gemm", refuse)
    for n, m in ((15, 24), (16, 20)):
        x, weight, bias = inputs(n=n, m=m)
        linear(x, weight, bias).sum().backward()
        assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    with pytest.raises(AssertionError, match="called"):
        linear(*inputs())


@pytest.mark.usefixtures("torch_products")
def test_frozen_weights_cost_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    true = sys.modules["quack.gemm"].gemm

    def recorded(*arguments: Any, **options: Any) -> None:
        calls.append(tuple(arguments[2].shape))
        true(*arguments, **options)

    monkeypatch.setattr(sys.modules["quack.gemm"], "gemm", recorded)
    x, weight, bias = inputs()
    linear(x, weight.detach(), bias.detach()).sum().backward()
    assert calls == [(9, 24), (9, 16)]


@pytest.mark.usefixtures("torch_products")
def test_what_is_small_is_left_to_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    true = sys.modules["quack.gemm"].gemm
    monkeypatch.setattr(
        sys.modules["quack.gemm"], "gemm", lambda *given, **more: (calls.append(given[2].shape), true(*given, **more))
    )
    for fewest, narrowest in ((10, 0), (0, 24)):
        monkeypatch.setattr(quack_products, "FEWEST", fewest)
        monkeypatch.setattr(quack_linear, "NARROWEST", narrowest)
        x, weight, bias = inputs(t=9)
        weight.main_grad, weight.main_grad_empty = torch.empty(weight.shape), True  # type: ignore[attr-defined]
        linear(x, weight, bias).sum().backward()
        assert not calls and weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    monkeypatch.setattr(quack_products, "FEWEST", 9)
    monkeypatch.setattr(quack_linear, "NARROWEST", 16)
    linear(*inputs(t=9))
    assert len(calls) == 1


def test_another_dtype_is_refused() -> None:
    x, weight, _ = inputs()
    with pytest.raises(Unsupported, match=r"weight is float32.*ops: \{linear: torch\}"):
        linear(x, weight.float())


def test_rows_are_copied_only_where_a_tensor_map_cannot_read_them() -> None:
    x = torch.zeros(3, 4, 32, dtype=torch.bfloat16, requires_grad=True)
    rows = rows_of(x)
    assert rows.shape == (12, 32) and rows.data_ptr() == x.data_ptr() and not rows.requires_grad
    assert rows_of(x[..., 8:24]).data_ptr() == x.data_ptr() + 16  # every row starts at a multiple of 16 bytes
    memory = torch.zeros(100, dtype=torch.bfloat16)
    for odd in (x[..., 1:17], memory[1:97].view(6, 16), memory[:90].view(6, 15)[:, :8], x.expand(3, 4, 32).mT):
        rows = rows_of(odd)
        assert rows.is_contiguous() and rows.data_ptr() % 16 == 0
        assert torch.equal(rows, odd.reshape(rows.shape)) and rows.data_ptr() != odd.data_ptr()


@pytest.mark.parametrize(
    ("sizes", "tile"),
    [
        ((32768, 24576, 4096), LARGE),
        ((32768, 4096, 12288), LARGE),
        ((4096, 12288, 32768), LARGE),
        ((32768, 5120, 2048), LONG),
        ((32768, 2048, 5120), LONG),
        ((8192, 4096, 4096), LONG),  # 176 tiles of LARGE, for 132 at a time
    ],
)
def test_tiles_by_size(sizes: tuple[int, int, int], tile: Tile) -> None:
    assert tile_for(*sizes) == tile


@pytest.mark.parametrize(
    ("weight", "by_quack"),
    [((4096, 12288), True), ((6144, 4096), True), ((5120, 2048), False), ((2048, 4096), False), ((4096, 4096), False)],
)
def test_who_multiplies_for_a_weights_gradient(weight: tuple[int, int], by_quack: bool) -> None:
    assert (LARGE.busy(*weight) >= quack_linear.BUSY) is by_quack


@pytest.mark.usefixtures("torch_products")
def test_benchmarks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TOKENS", 8)
    monkeypatch.setattr(bench, "SIZES", {"small": (16, 24)})
    play_cuda(monkeypatch)
    done: set[str] = set()
    for row in bench.rows():
        try:
            row.make()()
            done.add(row.name)
        except Missing as missing:
            assert str(missing) == row.name == "transformer_engine"
    assert {"quack", "torch", f"quack[{LARGE}]"} <= done
