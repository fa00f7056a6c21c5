"""The head's loss without logits: the contract, every way its gradient may be asked for, ranks, and memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loong_core.errors import DataError
from loong_core.parallel import memory
from loong_core.references.linear_cross_entropy import linear_cross_entropy as reference
from loong_core.testing import OpContract
from loong_core.testing.op import poisoned_memory
from loong_core.testing.ranks import run_ranks
from loong_ops import cross_entropy
from loong_ops import linear_cross_entropy as module
from loong_ops.linear_cross_entropy import chunk_tokens, linear_cross_entropy


class TestLinearCrossEntropy(OpContract):
    op = "linear_cross_entropy"
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.gpu
class TestLinearCrossEntropyOnCuda(OpContract):
    op = "linear_cross_entropy"
    implementation = "triton"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")


VOCABULARY, ROWS, HIDDEN = 13, 80, 6
"""Of the rows 13 count, 51 more align them, and the last take no part at all."""


def inputs(tokens=7, dtype=torch.float32):
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN).to(dtype).requires_grad_()
    weight = torch.randn(ROWS, HIDDEN).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (tokens,))
    targets[1::3] = -100
    return hidden, weight, targets


def expected(hidden, weight, targets, upstream):
    wide = [part.detach().double().requires_grad_() for part in (hidden, weight)]
    loss = reference(*wide, targets, vocabulary=VOCABULARY)
    return loss.detach(), *torch.autograd.grad(loss, wide, upstream.to(loss))


def assert_near(found, exact):
    assert len(found) == len(exact)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=2e-6)


def upstream_of(kind, tokens):
    """One number for all, as the gradient of a sum has, and one for each."""
    return torch.tensor(0.37).expand(tokens) if kind == "uniform" else torch.randn(tokens)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100, None])
@pytest.mark.parametrize("kind", ["uniform", "own"])
def test_chunks_that_do_not_divide_the_tokens(kind, chunk):
    hidden, weight, targets = inputs()
    upstream = upstream_of(kind, 7)
    with poisoned_memory():
        loss = linear_cross_entropy(hidden, weight, targets, vocabulary=VOCABULARY, _chunk=chunk)
        found = loss.detach(), *torch.autograd.grad(loss, (hidden, weight), upstream)
    assert_near(found, expected(hidden, weight, targets, upstream))
    assert (found[2][VOCABULARY:] == 0).all(), "padding has no gradient"
    assert (found[1][targets == -100] == 0).all()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_one_factor_for_all_in_half_precision(dtype, limit):
    """The contract's factors are the tokens' own, so that it tries the other way alone."""
    hidden, weight, targets = inputs(9, dtype)
    upstream = torch.tensor(1 / 3).expand(9)
    loss = linear_cross_entropy(hidden, weight, targets, vocabulary=VOCABULARY, _chunk=4)
    found = loss.detach(), *torch.autograd.grad(loss, (hidden, weight), upstream)
    assert [part.dtype for part in found] == [torch.float32, dtype, dtype]
    for one, exact in zip(found, expected(hidden, weight, targets, upstream), strict=True):
        assert (one.double() - exact).abs().max() <= limit * exact.abs().max()


def test_the_head_that_sums_keeps_one_factor(monkeypatch):
    """What training does, shapes and all: nothing is computed twice."""
    monkeypatch.setattr(module, "_compute_again", None)
    hidden, weight, targets = inputs(6)
    losses = linear_cross_entropy(hidden, weight, targets, vocabulary=VOCABULARY, _chunk=4).view(3, 2).t()
    (losses.sum() * 0.25).backward()
    assert_near([hidden.grad, weight.grad], expected(hidden, weight, targets, torch.tensor(0.25).expand(6))[1:])


@pytest.mark.parametrize("kind", ["uniform", "own"])
def test_the_weight_gradient_joins_its_buffer(kind):
    hidden, weight, targets = inputs()
    weight.main_grad = torch.full((ROWS, HIDDEN), 2.0)
    upstream = upstream_of(kind, 7)
    with poisoned_memory():
        linear_cross_entropy(hidden, weight, targets, vocabulary=VOCABULARY, _chunk=3).backward(upstream)
    _, hidden_gradient, weight_gradient = expected(hidden, weight, targets, upstream)
    assert weight.grad_added_to_main_grad
    assert_near([hidden.grad, weight.main_grad], [hidden_gradient, weight_gradient + 2.0])
    assert (weight.main_grad[VOCABULARY:] == 2.0).all()


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("kind", ["uniform", "own"])
def test_a_bfloat16_buffer_gets_the_sum_rounded_once(kind, empty):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, targets = inputs()
        weight.main_grad = torch.full((ROWS, HIDDEN), float("nan") if empty else 2.0, dtype=dtype)
        weight.main_grad_empty = empty
        with poisoned_memory():
            loss = linear_cross_entropy(hidden, weight, targets, vocabulary=VOCABULARY, _chunk=3)
            loss.backward(upstream_of(kind, 7))
        assert weight.grad_added_to_main_grad
        found.append(weight.main_grad)
    torch.testing.assert_close(found[1], found[0].bfloat16(), rtol=2**-8, atol=2**-16)


@pytest.mark.parametrize("kind", ["uniform", "own"])
def test_an_empty_buffer_is_written_as_a_whole(kind):
    hidden, weight, targets = inputs()
    weight.main_grad, weight.main_grad_empty = torch.full((ROWS, HIDDEN), float("nan")), True
    upstream = upstream_of(kind, 7)
    linear_cross_entropy(hidden, weight, targets, vocabulary=VOCABULARY, _chunk=3).backward(upstream)
    assert weight.grad_added_to_main_grad and not weight.main_grad_empty
    assert_near([weight.main_grad], expected(hidden, weight, targets, upstream)[2:])
    assert (weight.main_grad[VOCABULARY:] == 0).all()


def test_a_tied_weight_returns_its_gradient():
    hidden, weight, targets = inputs()
    weight.main_grad = torch.zeros(ROWS, HIDDEN)
    linear_cross_entropy(hidden, weight.view_as(weight), targets, vocabulary=VOCABULARY).sum().backward()
    assert (weight.main_grad == 0).all()
    assert_near([weight.grad], expected(hidden, weight, targets, torch.tensor(1.0).expand(7))[2:])


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("kind", ["uniform", "own"])
def test_nothing_is_computed_for_what_is_frozen(monkeypatch, kind, frozen):
    hidden, weight, targets = inputs()
    upstream = upstream_of(kind, 7)
    wanted = expected(hidden, weight, targets, upstream)[2 - frozen]
    free = (weight, hidden)[frozen]
    (hidden, weight)[frozen].requires_grad_(False)
    products = []
    multiply = module._multiply
    monkeypatch.setattr(module, "_multiply", lambda *a, **k: (products.append(a[2].shape), multiply(*a, **k)))
    linear_cross_entropy(hidden, weight, targets, vocabulary=VOCABULARY).backward(upstream)
    assert_near([free.grad], [wanted])
    assert set(products) == {tuple(free.shape) if frozen else (64, HIDDEN)}


def test_evaluation_computes_and_keeps_no_gradient(monkeypatch):
    monkeypatch.setattr(module, "_multiply", None)
    hidden, weight, targets = inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, vocabulary=VOCABULARY, _chunk=2)
    assert loss.grad_fn is None
    assert_near([loss], expected(hidden, weight, targets, torch.ones(7))[:1])


def test_a_second_backward_gives_the_same():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, targets, vocabulary=VOCABULARY, _chunk=3)
    first = torch.autograd.grad(loss.sum(), (hidden, weight), retain_graph=True)
    assert_near(torch.autograd.grad(loss.sum(), (hidden, weight)), first)


def test_an_uncounted_token_hides_its_upstream():
    hidden, weight, targets = inputs()
    upstream = torch.where(targets == -100, float("nan"), 1.0)
    loss = linear_cross_entropy(hidden, weight, targets, vocabulary=VOCABULARY)
    found = torch.autograd.grad(loss, (hidden, weight), upstream)
    assert_near(found, expected(hidden, weight, targets, torch.ones(7))[1:])


@pytest.mark.parametrize("kind", ["uniform", "own"])
def test_no_tokens(kind):
    hidden, weight, targets = torch.randn(0, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True), []
    loss = linear_cross_entropy(hidden, weight, torch.tensor(targets, dtype=torch.int64), vocabulary=5)
    loss.backward(upstream_of(kind, 0))
    assert loss.shape == (0,) and hidden.grad.shape == (0, 6) and (weight.grad == 0).all()


def test_a_target_outside_the_vocabulary_is_an_error():
    with pytest.raises(DataError, match="target 13 .*vocabulary of 13"):
        linear_cross_entropy(torch.randn(1, 6), torch.randn(16, 6), torch.tensor([13]), vocabulary=13)


def test_strided_targets():
    hidden, weight, targets = inputs()
    strided = torch.stack([targets, torch.zeros_like(targets)], 1)[:, 0]
    loss = linear_cross_entropy(hidden, weight, strided, vocabulary=VOCABULARY)
    assert_near([loss.detach()], expected(hidden, weight, targets, torch.ones(7))[:1])


@pytest.mark.parametrize(("world", "vocabulary", "width"), [(2, 131, 66), (3, 4, 4), (3, 8, 3)])
@pytest.mark.parametrize("kind", ["uniform", "own"])
def test_over_ranks(kind, world, vocabulary, width):
    """With padding, and with ranks that hold padding alone. A chunk costs one collective."""
    torch.manual_seed(5)
    hidden, weight = torch.randn(7, 6), torch.randn(world * width, 6)
    targets = torch.randint(0, vocabulary, (7,))
    targets[2] = -100
    upstream = upstream_of(kind, 7)

    def compute(rank):
        gathers = []
        gather = torch.distributed.all_gather_into_tensor
        torch.distributed.all_gather_into_tensor = lambda *a, **k: (gathers.append(1), gather(*a, **k))[1]
        mine = weight[rank * width : (rank + 1) * width].clone().requires_grad_()
        leaf = hidden.clone().requires_grad_()
        group = torch.distributed.group.WORLD
        loss = linear_cross_entropy(leaf, mine, targets, vocabulary=vocabulary, group=group, _chunk=3)
        gradients = torch.autograd.grad(loss, (leaf, mine), upstream)
        return [len(gathers), loss.tolist(), *(gradient.tolist() for gradient in gradients)]

    results = run_ranks(world, compute, init=True, megatron=False)
    wide = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    exact = reference(*wide, targets, vocabulary=vocabulary)
    hidden_gradient, weight_gradient = torch.autograd.grad(exact, wide, upstream.double())
    for gathers, loss, _, _ in results:
        assert gathers == 3
        assert_near([torch.tensor(loss)], [exact.detach()])
    assert_near([sum(torch.tensor(part) for _, _, part, _ in results)], [hidden_gradient])
    assert_near([torch.cat([torch.tensor(part) for *_, part in results])], [weight_gradient])


def test_float16_keeps_small_probabilities(monkeypatch):
    """Of 40,000 equally likely tokens each has a probability that float16 itself holds to one part in 420."""
    monkeypatch.setattr(cross_entropy, "WARPS", 4)
    hidden = torch.zeros(2, 4, dtype=torch.float16).requires_grad_()
    hidden.data[:, 0] = 1.0
    weight = torch.zeros(40000, 4, dtype=torch.float16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.tensor([0, -100]), vocabulary=40000, _chunk=2).sum().mul(64).backward()
    torch.testing.assert_close(weight.grad[1:, 0].float(), torch.full((39999,), 64 / 40000), rtol=1e-3, atol=0)


# ------------------------------------------------------------------------------------------------ memory
class Allocations(TorchDispatchMode):
    """Bytes of every memory that an op of torch takes, in `sizes`."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        made = [leaf.untyped_storage() for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
        # The interpreter lets tensors of its own look at a kernel's arguments.
        if func.overloadpacket is not torch.ops.aten.set_:
            self.sizes += [memory.nbytes() for memory in made if memory.data_ptr() not in given]
        return result


@pytest.mark.parametrize("kind", ["uniform", "own"])
def test_no_allocation_exceeds_a_tenth_of_the_logits(kind):
    torch.manual_seed(0)
    tokens, vocabulary, size = 160, 160, 4
    hidden, weight = torch.randn(tokens, size, requires_grad=True), torch.randn(vocabulary, size, requires_grad=True)
    weight.main_grad = torch.zeros(vocabulary, size)
    targets = torch.randint(0, vocabulary, (tokens,))
    with Allocations() as found:
        loss = linear_cross_entropy(hidden, weight, targets, vocabulary=vocabulary, _chunk=12)
        loss.backward(upstream_of(kind, tokens))
    logits = 4 * tokens * vocabulary
    assert max(found.sizes) <= logits / 10
    assert sum(size > logits / 20 for size in found.sizes) <= (1 if kind == "uniform" else 2), "chunks share memory"
    with Allocations() as plain:
        torch.autograd.grad(reference(hidden, weight, targets, vocabulary=vocabulary).sum(), weight)
    assert max(plain.sizes) >= logits, "the hook sees logits where there are any"


def test_the_chosen_chunk_is_less_than_a_tenth():
    for tokens, hidden in ((32768, 2048), (32768, 4096), (65536, 5120), (131072, 2048)):
        assert chunk_tokens(tokens, hidden, module.Products()) <= tokens / 10
    # Few tokens have few logits: there a chunk is at least what keeps the products fast.
    assert chunk_tokens(4096, 2048, module.Products()) == min(module.CHUNKS)
    assert chunk_tokens(1, 1, module.Products()) == min(module.CHUNKS)


def test_the_planner_knows_the_chunks():
    assert (min(module.CHUNKS), max(module.CHUNKS)) == (memory.LEAST_LOSS_CHUNK, memory.LOSS_CHUNK)


# --------------------------------------------------------------------------------------------------- gpu
REAL = 151936


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["uniform", "own"])
def test_memory_on_a_gpu(kind):
    """Beside the weight's float32 gradient and the hidden states' own, less than a tenth of the logits."""
    tokens, size = 32768, 256
    hidden = torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(REAL, size, device="cuda") * 0.02).bfloat16().requires_grad_()
    weight.main_grad = torch.zeros(REAL, size, device="cuda")
    targets = torch.randint(0, REAL, (tokens,), device="cuda")
    upstream = upstream_of(kind, 1).cuda().expand(tokens) if kind == "uniform" else torch.rand(tokens, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, targets, vocabulary=REAL).backward(upstream)
    used = torch.cuda.max_memory_allocated() - before
    assert used - 4 * REAL * size - 4 * tokens * size < 2 * tokens * REAL / 10


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [REAL, REAL - 77])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_real_vocabulary(dtype, vocabulary):
    torch.manual_seed(0)
    tokens, size = 300, 64
    hidden = torch.randn(tokens, size, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(REAL, size, device="cuda") * 0.2).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device="cuda")
    targets[::7] = -100
    wide = [part.detach().double().requires_grad_() for part in (hidden, weight)]
    exact = reference(*wide, targets, vocabulary=vocabulary)
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for upstream in (torch.tensor(0.5, device="cuda").expand(tokens), torch.rand(tokens, device="cuda")):
        loss = linear_cross_entropy(hidden, weight, targets, vocabulary=vocabulary, _chunk=128)
        found = loss, *torch.autograd.grad(loss, (hidden, weight), upstream)
        wanted = exact, *torch.autograd.grad(exact, wide, upstream.double(), retain_graph=True)
        for one, other in zip(found, wanted, strict=True):
            assert (one.double() - other).abs().max() <= limit * other.abs().max()
