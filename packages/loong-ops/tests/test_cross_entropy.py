"""The Triton cross entropy: the contract, long rows, and a vocabulary cut over ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from loong_core.errors import DataError
from loong_core.references.cross_entropy import cross_entropy as reference
from loong_core.testing import OpContract
from loong_core.testing.ranks import run_ranks
from loong_ops import cross_entropy as module
from loong_ops.cross_entropy import cross_entropy


class TestCrossEntropy(OpContract):
    op = "cross_entropy"
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.gpu
class TestCrossEntropyOnCuda(OpContract):
    op = "cross_entropy"
    implementation = "triton"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")


# Whole blocks alone, a block and one column, many blocks and a rest, less than a block.
@pytest.mark.parametrize("width", [256, 257, 1031, 100])
def test_rows_longer_than_a_block(monkeypatch, width):
    monkeypatch.setattr(module, "BLOCK", 256)
    torch.manual_seed(0)
    logits = (torch.randn(5, width) * 3).requires_grad_()
    targets = torch.tensor([0, width - 1, -100, width // 2, 7])
    upstream = torch.randn(5)
    results = []
    for function in (cross_entropy, reference):
        loss = function(logits, targets, vocabulary=width)
        results.append((loss.detach(), *torch.autograd.grad(loss, logits, upstream)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("column", [0, 255, 256, 767, 768, 799])
def test_a_row_becomes_its_gradient_in_place(monkeypatch, column):
    """The target's column is put right last, wherever its block lies."""
    monkeypatch.setattr(module, "BLOCK", 256)
    logits = torch.randn(1, 832, generator=torch.Generator().manual_seed(column)) * 3
    wanted = logits[:, :800].softmax(1) - functional.one_hot(torch.tensor([column]), 800)
    loss, peaks, inverses = torch.empty(3, 1)
    share, targets = module.Share(first=0, held=800, group=None), torch.tensor([column])
    again = logits.clone()
    module.write_losses(logits, targets, share, loss, peaks, inverses, logits, 64.0)
    module.write_gradients(again, targets, share, peaks, inverses, torch.tensor([64.0]), again)
    assert torch.equal(logits, again) and not logits[:, 800:].any()
    torch.testing.assert_close(logits[:, :800] / 64, wanted, rtol=1e-5, atol=1e-6)


def test_a_target_of_another_rank_touches_no_padding():
    logits, targets = torch.zeros(1, 8), torch.tensor([6])
    loss, peaks, inverses = torch.empty(3, 1)
    module.write_losses(logits, targets, module.Share(first=0, held=5, group=None), loss, peaks, inverses, logits)
    torch.testing.assert_close(logits, torch.tensor([[0.2] * 5 + [0.0] * 3]))


def test_large_and_infinite_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [float("-inf"), 2.0, 1.0], [-3e4, -3e4, -3e4]]).requires_grad_()
    targets = torch.tensor([0, 2, 1])
    loss = cross_entropy(logits, targets, vocabulary=3)
    torch.testing.assert_close(loss, functional.cross_entropy(logits, targets, reduction="none"))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all() and gradient[1, 0] == 0
    torch.testing.assert_close(gradient[2], torch.tensor([1 / 3, -2 / 3, 1 / 3]))


@pytest.mark.filterwarnings("ignore:.*NaN.*:RuntimeWarning")  # numpy's, under the interpreter
def test_what_is_not_a_number_shows_where_it_counts_only():
    logits = torch.full((2, 5), math.nan, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1, -100]), vocabulary=5)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss[0].isnan() and gradient[0].isnan().all()
    assert loss[1] == 0 and (gradient[1] == 0).all()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_tokens(shape):
    logits = torch.randn(shape, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(shape[:-1], dtype=torch.int64), vocabulary=5)
    loss.sum().backward()
    assert loss.shape == shape[:-1] and logits.grad.shape == shape


def test_a_target_outside_the_vocabulary_is_an_error():
    with pytest.raises(DataError, match="target 7 .*vocabulary of 7"):
        cross_entropy(torch.randn(2, 9), torch.tensor([0, 7]), vocabulary=7)


@pytest.mark.parametrize(("world", "vocabulary", "width"), [(2, 131, 66), (3, 4, 4), (3, 8, 3)])
def test_over_ranks(world, vocabulary, width):
    """Also where the last ranks hold padding alone."""
    torch.manual_seed(3)
    logits = torch.randn(2, 3, world * width) * 3
    targets = torch.randint(0, vocabulary, (2, 3))
    targets[0, 1] = -100
    upstream = torch.randn(2, 3)

    def compute(rank):
        mine = logits[..., rank * width : (rank + 1) * width].clone().requires_grad_()
        loss = cross_entropy(mine, targets, vocabulary=vocabulary, group=torch.distributed.group.WORLD)
        (gradient,) = torch.autograd.grad(loss, mine, upstream)
        return [loss.tolist(), gradient.tolist()]

    results = run_ranks(world, compute, init=True, megatron=False)
    whole = logits.clone().requires_grad_()
    expected = reference(whole, targets, vocabulary=vocabulary)
    (wanted,) = torch.autograd.grad(expected, whole, upstream)
    for loss, _ in results:
        torch.testing.assert_close(torch.tensor(loss), expected.detach(), rtol=1e-5, atol=1e-6)
    gradient = torch.cat([torch.tensor(part) for _, part in results], -1)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)
