"""A dense SwiGLU layer by QuACK's products, with torch in their place; and on a Hopper card, themselves."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from quack_stand_ins import needs_quack, play_cuda
from torch import Tensor

from loong_core.errors import Unsupported
from loong_core.references.mlp import gated_mlp as reference
from loong_core.testing.op import OpContract, error
from loong_ops.bench import gated_mlp as bench
from loong_ops.quack_mlp import gated_mlp
from loong_ops.quack_products import Tile


@pytest.mark.usefixtures("torch_products")
class TestAroundTheProducts(OpContract):
    """Shapes, strides, alternating columns and gradients: everything but the products."""

    op = "gated_mlp"
    implementation = "quack"
    backend = "cuda"


@pytest.mark.gpu
@needs_quack
@pytest.mark.usefixtures("any_size")
class TestOnTheCard(OpContract):
    """The products as well."""

    op = "gated_mlp"
    implementation = "quack"
    backend = "cuda"
    device = "cuda"


def inputs(t: int = 9, n: int = 16, f: int = 24, m: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    drawn = (torch.randn(shape, generator=generator) * 0.5 for shape in ((t, n), (2 * f, n), (m, f)))
    x, up, down = (tensor.bfloat16().requires_grad_() for tensor in drawn)
    return x, up, down


@pytest.mark.usefixtures("torch_products")
@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("start", [0, 8, 1])  # 1: a buffer that no tensor map can reach
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_weights_go_into_the_buffers(dtype: torch.dtype, start: int, empty: bool) -> None:
    x, *weights = inputs()
    wide = [tensor.detach().float().requires_grad_() for tensor in (x, *weights)]
    reference(*wide).sum().backward()
    for weight in weights:
        memory = torch.full((start + weight.numel(),), math.nan if empty else 0.0, dtype=dtype)
        weight.main_grad = memory[start:].view(weight.shape)  # type: ignore[attr-defined]
        weight.main_grad_empty = empty  # type: ignore[attr-defined]
    for times in (1, 2):
        gated_mlp(x, *weights).sum().backward()
        for weight, exact in zip(weights, wide[1:], strict=True):
            assert exact.grad is not None and weight.grad_added_to_main_grad  # type: ignore[attr-defined]
            assert error(weight.main_grad, times * exact.grad) < 1e-2  # type: ignore[attr-defined]


@pytest.mark.usefixtures("torch_products")
@pytest.mark.parametrize("empty", [True, False])
def test_without_rows_the_buffers_are_complete_all_the_same(empty: bool) -> None:
    x, *weights = inputs(t=0)
    for weight in weights:
        weight.main_grad = torch.full(weight.shape, math.nan if empty else 3.0)  # type: ignore[attr-defined]
        weight.main_grad_empty = empty  # type: ignore[attr-defined]
    gated_mlp(x, *weights).sum().backward()
    for weight in weights:
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        assert bool((weight.main_grad == (0 if empty else 3)).all())  # type: ignore[attr-defined]


@pytest.mark.usefixtures("torch_products")
def test_kept_are_the_inputs_and_the_projected_rows() -> None:
    x, up, down = inputs()
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gated_mlp(x, up, down)
    assert kept == [(9, 16), (48, 16), (8, 24), (9, 48)]


@pytest.mark.usefixtures("torch_products")
def test_projected_rows_are_not_even_written_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[bool] = []
    true = sys.modules["quack.gemm_interface"].gemm_gated

    def recorded(*arguments: Any, **options: Any) -> Any:
        stored.append(options["store_preact"])
        return true(*arguments, **options)

    monkeypatch.setattr(sys.modules["quack.gemm_interface"], "gemm_gated", recorded)
    x, up, down = inputs()
    with torch.no_grad():
        gated_mlp(x, up, down)
    gated_mlp(x, up, down)
    assert stored == [False, True]


@pytest.mark.usefixtures("torch_products")
def test_odd_sizes_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in (("gemm", "gemm"), ("gemm_interface", "gemm_gated")):
        monkeypatch.delattr(sys.modules[f"quack.{name}"], function)
    for sizes in ({"n": 15}, {"f": 20}, {"m": 7}):
        x, up, down = inputs(**sizes)
        wide = [tensor.detach().float().requires_grad_() for tensor in (x, up, down)]
        gated_mlp(x, up, down).sum().backward()
        reference(*wide).sum().backward()
        for found, exact in zip((x, up, down), wide, strict=True):
            assert found.grad is not None and exact.grad is not None and error(found.grad, exact.grad) < 2e-2
    with pytest.raises(ImportError):
        gated_mlp(*inputs())


@pytest.mark.usefixtures("torch_products")
def test_tiles_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the benchmarks compare reaches the products."""
    seen: list[tuple[int, int]] = []
    true = sys.modules["quack.gemm"].gemm

    def recorded(*arguments: Any, **options: Any) -> None:
        seen.append(arguments[5:7])
        true(*arguments, **options)

    monkeypatch.setattr(sys.modules["quack.gemm"], "gemm", recorded)
    names = ("down", "d_down", "d_up", "d_x")
    gated_mlp(*inputs(), _tiles={name: Tile(128, 32 * at) for at, name in enumerate(names, 1)}).sum().backward()
    assert seen == [(128, 32), (128, 64), (128, 96), (128, 128)]


def test_another_dtype_is_refused() -> None:
    x, up, down = inputs()
    with pytest.raises(Unsupported, match=r"x is float16.*ops: \{gated_mlp: torch\}"):
        gated_mlp(x.half(), up, down)


@pytest.mark.usefixtures("torch_products")
def test_benchmarks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("TOKENS", 8), ("HIDDEN", 16), ("INNER", 24)):
        monkeypatch.setattr(bench, name, size)
    rows = bench.rows()
    assert {row.shape.split(":")[0] for row in rows if not row.headline} == set(bench.VARIANTS)
    play_cuda(monkeypatch)
    for row in rows:
        row.make()()
