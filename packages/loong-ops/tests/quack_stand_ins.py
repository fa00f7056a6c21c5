"""QuACK's functions with torch inside, and their demands on strides: what tests without a Hopper card compute with."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from loong_ops import quack_linear, quack_products

needs_quack = pytest.mark.skipif(
    importlib.util.find_spec("quack") is None or importlib.util.find_spec("cutlass") is None,
    reason="quack-kernels and nvidia-cutlass-dsl are not installed: the products themselves are what is tested",
)


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
    pingpong: bool, rowvec_bias: Tensor | None = None,
    cu_seqlens_m: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    A_idx: Tensor | None = None, add_to_output: bool = False, concat_layout: tuple[str, ...] | None = None,
) -> None:  # fmt: skip
    """Stands for quack.gemm.gemm: D[l] (+)= A[l] @ B[l]^T + rowvec_bias[l]."""
    for tensor in (A, B, D):
        whole_tiles(tensor)
    assert A_idx is None or (A_idx.dtype == torch.int32 and cluster_N == 1)
    if cu_seqlens_m is None and cu_seqlens_k is None:
        assert A_idx is None and A.dim() == B.dim() == D.dim() and (A.dim() == 3 or concat_layout is None)
        return dense(A, B, D, rowvec_bias, add_to_output, concat_layout)
    assert rowvec_bias is None
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


def dense(
    A: Tensor, B: Tensor, D: Tensor, bias: Tensor | None, add: bool, concat_layout: tuple[str, ...] | None
) -> None:
    assert len(A.shape) in (2, 3) and A.shape[-1] == B.shape[-1] > 0 and D.numel()
    assert D.shape[-2:] == (A.shape[-2], B.shape[-2])
    right = B.float()
    if concat_layout == ("B",):
        right = alternate(right, right.dim() - (2 if B.stride(-1) == 1 else 1))
    result = A.float() @ right.mT
    if bias is not None:
        assert bias.shape == (1, D.shape[-1]) and bias.stride(1) == 1 and bias.data_ptr() % 8 == 0
        result = result + bias.float()
    if concat_layout == ("out",):
        dim = result.dim() - (2 if D.stride(-1) == 1 else 1)
        even = torch.arange(0, result.shape[dim], 2)
        result = torch.cat((result.index_select(dim, even), result.index_select(dim, even + 1)), dim)
    D.copy_(D.float() + result if add else result)


def gemm_gated(
    A: Tensor, B: Tensor, *, activation: str, store_preact: bool, config: Config, tuned: bool,
    concat_layout: tuple[str, ...], cu_seqlens_m: Tensor | None = None, A_idx: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """Stands for quack.gemm_interface.gemm_gated; B is [l,k,n] with segments of rows, [k,n] without."""
    assert activation == "swiglu" and not tuned and concat_layout == ("B",) and B.stride(-2) == 1
    assert config.tile_n % 32 == 0 and (cu_seqlens_m is None) == (A_idx is None) == (B.dim() == 2)
    before = A.new_empty(len(A if A_idx is None else A_idx), B.shape[-1])
    for tensor in (A, B, before):
        whole_tiles(tensor)
    if cu_seqlens_m is None or A_idx is None:
        wide = A.float() @ alternate(B.float(), 1)
    else:
        wide = before.float()
        for index, rows in segments(cu_seqlens_m):
            wide[rows] = A[A_idx[rows].long()].float() @ alternate(B[index].float(), 1)
    before.copy_(wide)
    after = (torch.nn.functional.silu(wide[:, ::2]) * wide[:, 1::2]).to(A.dtype)
    return before if store_preact else None, after


def gemm_dgated(
    A: Tensor, B: Tensor, PreAct: Tensor, *, activation: str, dynamic_scheduler: bool, config: Config, tuned: bool,
    colvec_scale: Tensor | None = None, colvec_reduce: bool = False,
    cu_seqlens_m: Tensor | None = None, A_idx: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Stands for quack.gemm_interface.gemm_dgated; B is [l,k,n] with segments of rows, [k,n] without."""
    assert activation == "swiglu" and not tuned and not dynamic_scheduler
    assert (cu_seqlens_m is None) == (A_idx is None) == (B.dim() == 2)
    assert colvec_scale is None or colvec_scale.dtype == torch.float32
    for tensor in (A, B, PreAct):
        whole_tiles(tensor)
    d_before, after = torch.empty_like(PreAct), A.new_empty(len(PreAct), B.shape[-1])
    reduced = A.new_empty(len(PreAct), dtype=torch.float32)
    parts = [(0, slice(None))] if cu_seqlens_m is None else segments(cu_seqlens_m)
    for index, rows in parts:
        left, right = (A[rows], B) if A_idx is None else (A[A_idx[rows].long()], B[index])
        scale = 1.0 if colvec_scale is None else colvec_scale[rows, None]
        before = PreAct[rows].float().requires_grad_()
        with torch.enable_grad():
            value = torch.nn.functional.silu(before[:, ::2]) * before[:, 1::2]
        d_value = left.float() @ right.float()
        (found,) = torch.autograd.grad(value, before, d_value * scale)
        d_before[rows] = found.to(A.dtype)
        after[rows] = (value * scale).detach().to(A.dtype)
        reduced[rows] = (value * d_value).detach().sum(1)
    return (d_before, after, reduced) if colvec_reduce else (d_before, after)


def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """QuACK computes what has a few rows and columns too."""
    monkeypatch.setattr(quack_products, "FEWEST", 0)
    monkeypatch.setattr(quack_linear, "NARROWEST", 0)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules named as QuACK's, with torch inside."""
    any_size(monkeypatch)
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
    quack_products.config.cache_clear()


def play_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors asked for on a CUDA device come to be on the CPU."""

    def elsewhere(function: Any) -> Any:
        return lambda *arguments, device, **options: function(*arguments, **options)

    for name in ("randn", "zeros", "empty"):
        monkeypatch.setattr(torch, name, elsewhere(getattr(torch, name)))
