"""The head's loss by QuACK's products: which are whose, with torch in their place; and on a Hopper card, themselves."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch
from quack_stand_ins import needs_quack
from torch import Tensor

from loong_core.errors import Unsupported
from loong_core.references.linear_cross_entropy import linear_cross_entropy as reference
from loong_core.testing.op import OpContract, error, poisoned_memory
from loong_ops import quack_linear_cross_entropy as module
from loong_ops.linear_cross_entropy import CHUNKS, chunk_tokens
from loong_ops.quack_linear_cross_entropy import QuackProducts, linear_cross_entropy


class Gemm:
    """Stands for quack.gemm.gemm, D (+)= A @ B^T, with the demands of tensor maps; remembers the sizes of its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def __call__(
        self, A: Tensor, B: Tensor, D: Tensor, C: None, tile_count_semaphore: None,
        tile_M: int, tile_N: int, cluster_M: int, cluster_N: int, *, pingpong: bool, max_swizzle_size: int = 8,
        add_to_output: bool = False,
    ) -> None:  # fmt: skip
        for matrix in (A, B, D):
            assert matrix.dim() == 2 and not matrix.requires_grad and matrix.data_ptr() % 16 == 0
            steps = [step * matrix.element_size() for step in matrix.stride()]
            assert matrix.element_size() in steps and any(step % 16 == 0 for step in steps), steps
        assert A.dtype == B.dtype == torch.bfloat16 and A.shape[1] == B.shape[1] and D.stride(1) == 1
        self.calls.append((*D.shape, A.shape[1], tile_M, tile_N))
        result = A.float() @ B.float().t()
        D.copy_(D + result if add_to_output else result)


@pytest.fixture
def gemm(monkeypatch: pytest.MonkeyPatch) -> Gemm:
    """A module named as QuACK's, with torch inside."""
    stand_in = Gemm()
    for name, content in {"quack": {}, "cutlass": {}, "quack.gemm": {"gemm": stand_in}}.items():
        fake = types.ModuleType(name)
        fake.__spec__ = importlib.machinery.ModuleSpec(name, None)
        fake.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, fake)
    return stand_in


@pytest.mark.usefixtures("gemm")
class TestAroundTheProducts(OpContract):
    op = "linear_cross_entropy"
    implementation = "quack"
    backend = "cuda"


@pytest.mark.gpu
@needs_quack
class TestOnTheCard(OpContract):
    op = "linear_cross_entropy"
    implementation = "quack"
    backend = "cuda"
    device = "cuda"


VOCABULARY, ROWS = 13, 80
"""Of the rows 13 count, 51 more align them, and the last take no part at all."""


def inputs(tokens: int = 7, hidden: int = 16, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    states = torch.randn(tokens, hidden, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(rows, hidden, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    targets[1::3] = -100
    return states, weight, targets


def check(states: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, chunk: int = 3) -> None:
    """Loss and gradients are the reference's, in memory that was not zero before."""
    wide = [part.detach().double().requires_grad_() for part in (states, weight)]
    exact = reference(*wide, targets, vocabulary=VOCABULARY)
    with poisoned_memory():
        loss = linear_cross_entropy(states, weight, targets, vocabulary=VOCABULARY, _chunk=chunk)
        loss.backward(upstream)
    exact.backward(upstream.double())
    buffer = getattr(weight, "main_grad", None)
    found = weight.grad if buffer is None else buffer
    for one, other in ((loss, exact), (states.grad, wide[0].grad), (found, wide[1].grad)):
        assert one is not None and other is not None and error(one, other) < 2e-2


@pytest.mark.parametrize("buffer", [None, "full", "empty"])
@pytest.mark.parametrize("upstream", [torch.tensor(0.5).expand(7), torch.linspace(-1, 1, 7)])
def test_all_products_are_quacks(gemm: Gemm, upstream: Tensor, buffer: str | None) -> None:
    states, weight, targets = inputs()
    if buffer is not None:
        weight.main_grad = torch.full((ROWS, 16), float("nan") if buffer == "empty" else 0.0)  # type: ignore[attr-defined]
        weight.main_grad_empty = buffer == "empty"  # type: ignore[attr-defined]
    check(states, weight, targets, upstream)
    first = [call[:3] for call in gemm.calls[:9]]
    assert first == [call for c in (3, 3, 1) for call in ((c, 64, 16), (c, 16, 64), (64, 16, c))]
    assert {call[3:] for call in gemm.calls if call[1] == 64 or call[0] == 64} == {(128, 192)}
    assert len(gemm.calls) == (9 if upstream.stride(0) == 0 else 15)


def test_a_wide_head_takes_one_product(gemm: Gemm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NARROW", 8)
    check(*inputs(), torch.rand(7))
    assert [call[:3] for call in gemm.calls] == [(3, 16, 64), (3, 16, 64), (1, 16, 64)]


@pytest.mark.parametrize(("hidden", "rows"), [(6, ROWS), (16, 37)])
def test_what_no_tensor_map_can_read_is_torchs(gemm: Gemm, hidden: int, rows: int) -> None:
    check(*inputs(hidden=hidden, rows=rows), torch.rand(7))
    assert not gemm.calls


def test_strided_states_and_a_buffer_at_an_odd_address(gemm: Gemm) -> None:
    states, weight, targets = inputs()
    memory = torch.zeros(1 + ROWS * 16)
    weight.main_grad = memory[1:].view(ROWS, 16)  # type: ignore[attr-defined]
    check(states.detach().t().contiguous().t().requires_grad_(), weight, targets, torch.rand(7))
    # Contiguous, as far as torch is concerned: there is no second row.
    one = inputs(1)[0].detach().as_strided((1, 16), (3, 1)).requires_grad_()
    check(one, inputs()[1], targets[:1], torch.ones(1))


def test_nothing_of_no_tokens(gemm: Gemm) -> None:
    states, weight, _ = inputs(1)
    loss = linear_cross_entropy(states[:0], weight, torch.zeros(0, dtype=torch.int64), vocabulary=VOCABULARY)
    loss.sum().backward()
    assert not gemm.calls and weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize(("which", "name"), [(0, "hidden"), (1, "weight")])
def test_other_dtypes_are_refused(which: int, name: str) -> None:
    given = list(inputs())
    given[which] = given[which].float()
    with pytest.raises(Unsupported, match=f"{name} is float32"):
        linear_cross_entropy(*given, vocabulary=VOCABULARY)


@pytest.mark.parametrize(("tokens", "hidden", "chunk"), [(32768, 2048, 3072), (32768, 4096, 3072), (4096, 2048, 2048)])
def test_a_chunk_fills_the_card(tokens: int, hidden: int, chunk: int) -> None:
    """With 132 tiles at a time these lose what sticks out over the edges alone."""
    products = QuackProducts()
    assert chunk_tokens(tokens, hidden, products) == chunk and chunk in CHUNKS
    tile = products.tile(chunk, hidden)
    tiles = -(-chunk // tile.rows) * -(-hidden // tile.columns)
    assert tiles / 132 % 1 in (0, pytest.approx(128 / 132))
