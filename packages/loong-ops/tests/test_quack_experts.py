"""What surrounds QuACK's products, with torch in their place; and on a Hopper card, the products themselves."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from loong_core.errors import Unsupported
from loong_core.references.experts import experts as reference
from loong_core.testing.op import OpContract, error
from loong_core.types import OpRequest
from loong_ops import quack_experts, support
from loong_ops.quack_experts import experts


class Config(NamedTuple):
    """The fields of quack.gemm_config.GemmConfig that are set here."""

    tile_m: int
    tile_n: int
    pingpong: bool
    is_dynamic_persistent: bool
    cluster_m: int
    cluster_n: int


def alternate(tensor: Tensor, dim: int) -> Tensor:
    """[first half; second half] -> f0, s0, f1, s1, ... along `dim`: QuACK's reading of a concat layout."""
    return torch.stack(tensor.chunk(2, dim), dim + 1).flatten(dim, dim + 1)


def segments(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    ends = offsets.tolist()
    assert offsets.dtype == torch.int32 and ends == sorted(ends)
    for index, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        yield index, slice(start, end)


def whole_tiles(tensor: Tensor) -> None:
    """What a tensor map demands: one dim contiguous, all other steps multiples of 16 bytes, an aligned start."""
    assert 1 in tensor.stride()[-2:] and tensor.data_ptr() % 16 == 0
    steps = [step * tensor.element_size() for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    assert all(step % 16 == 0 for step in steps if step != tensor.element_size()), tensor.stride()


def gemm(
    A: Tensor, B: Tensor, D: Tensor, C: None, tile_count_semaphore: None,
    tile_M: int, tile_N: int, cluster_M: int, cluster_N: int, *,
    pingpong: bool, cu_seqlens_m: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    A_idx: Tensor | None = None, add_to_output: bool = False, concat_layout: tuple[str, ...] | None = None,
) -> None:  # fmt: skip
    """Stands for quack.gemm.gemm: D[l] (+)= A[l] @ B[l]^T, with its demands on strides."""
    for tensor in (A, B, D):
        whole_tiles(tensor)
    assert A_idx is None or (A_idx.dtype == torch.int32 and cluster_N == 1)
    if cu_seqlens_m is not None:
        assert A.stride(-1) == 1 and D.stride(-1) == 1 and not add_to_output and A_idx is None
        for index, rows in segments(cu_seqlens_m):
            weight = B[index].float()
            if concat_layout == ("B",):
                weight = alternate(weight, 0 if B.stride(-1) == 1 else 1)
            D[rows] = (A[rows].float() @ weight.t()).to(D.dtype)
        return
    assert cu_seqlens_k is not None and A_idx is not None
    assert A.stride(-2) == 1 and B.stride(-2) == 1
    for index, rows in segments(cu_seqlens_k):
        result = A.float()[:, A_idx[rows].long()] @ B[:, rows].float().t()
        if concat_layout == ("out",):
            assert D.stride(-2) == 1
            result = torch.cat((result[:, ::2], result[:, 1::2]), 1)
        D[index] = (D[index].float() + result if add_to_output else result).to(D.dtype)


def gemm_gated(
    A: Tensor, B: Tensor, *, activation: str, cu_seqlens_m: Tensor, A_idx: Tensor, store_preact: bool,
    config: Config, tuned: bool, concat_layout: tuple[str, ...],
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """Stands for quack.gemm_interface.gemm_gated; B is [l,k,n]."""
    assert activation == "swiglu" and not tuned and concat_layout == ("B",) and B.stride(-2) == 1
    before = A.new_empty(len(A_idx), B.shape[-1])
    for tensor in (A, B, before):
        whole_tiles(tensor)
    wide = before.float()
    for index, rows in segments(cu_seqlens_m):
        wide[rows] = A[A_idx[rows].long()].float() @ alternate(B[index].float(), 1)
    before.copy_(wide)
    after = (torch.nn.functional.silu(wide[:, ::2]) * wide[:, 1::2]).to(A.dtype)
    return before if store_preact else None, after


def gemm_dgated(
    A: Tensor, B: Tensor, PreAct: Tensor, *, activation: str, colvec_scale: Tensor, colvec_reduce: bool,
    cu_seqlens_m: Tensor, A_idx: Tensor, dynamic_scheduler: bool, config: Config, tuned: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Stands for quack.gemm_interface.gemm_dgated; B is [l,k,n]."""
    assert activation == "swiglu" and not tuned and not dynamic_scheduler and colvec_scale.dtype == torch.float32
    for tensor in (A, B, PreAct):
        whole_tiles(tensor)
    d_before, after = torch.empty_like(PreAct), A.new_empty(len(A_idx), B.shape[-1])
    reduced = torch.empty_like(colvec_scale)
    for index, rows in segments(cu_seqlens_m):
        before = PreAct[rows].float().requires_grad_()
        with torch.enable_grad():
            value = torch.nn.functional.silu(before[:, ::2]) * before[:, 1::2]
        d_value = A[A_idx[rows].long()].float() @ B[index].float()
        (found,) = torch.autograd.grad(value, before, d_value * colvec_scale[rows, None])
        d_before[rows] = found.to(A.dtype)
        after[rows] = (value * colvec_scale[rows, None]).detach().to(A.dtype)
        reduced[rows] = (value * d_value).detach().sum(1)
    return (d_before, after, reduced) if colvec_reduce else (d_before, after)


@pytest.fixture
def torch_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules named as QuACK's, with torch inside."""
    contents: dict[str, dict[str, Any]] = {
        "quack": {},
        "cutlass": {},
        "quack.gemm": {"gemm": gemm},
        "quack.gemm_config": {"GemmConfig": Config},
        "quack.gemm_interface": {"gemm_gated": gemm_gated, "gemm_dgated": gemm_dgated},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    quack_experts._config.cache_clear()


@pytest.mark.usefixtures("torch_products")
class TestAroundTheProducts(OpContract):
    """Indices, transposes, alternating columns and gradients: everything but the products."""

    op = "experts"
    implementation = "quack"
    backend = "cuda"


@pytest.mark.gpu
@pytest.mark.skipif(
    importlib.util.find_spec("quack") is None or importlib.util.find_spec("cutlass") is None,
    reason="quack-kernels and nvidia-cutlass-dsl are not installed",
)
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
def test_weight_gradients_are_written_into_empty_buffers(start: int) -> None:
    hidden, up, down, weights, chosen = inputs()
    for weight in (up, down):
        weight.main_grad = torch.full((start + weight.numel(),), math.nan)[start:].view(weight.shape)  # type: ignore[attr-defined]
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
