"""The references against naive formulas in float64: forward and every gradient, odd shapes, packing, sharding."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as functional

from loong_core.errors import DataError
from loong_core.op_declarations import DECLARATIONS
from loong_core.references.attention import attention
from loong_core.references.cross_entropy import cross_entropy
from loong_core.references.norm import rms_norm
from loong_core.testing.ranks import run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that is allocated and not written holds NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_near(actual, expected, op, dtype):
    """|difference| / max|expected| within the op's tolerance for the dtype; values below 0.1 count as 0.1, because a
    result that is zero by cancellation keeps the rounding of what was cancelled."""
    bound = DECLARATIONS[op].tolerances[str(dtype).removeprefix("torch.")]
    largest = expected.abs().max().clamp_min(0.1)
    assert actual.isfinite().all()
    assert ((actual.double() - expected).abs().max() / largest).item() <= bound


def compare(op, function, reference, inputs, dtype):
    """The op on inputs rounded to `dtype` against the reference on the same values in float64, gradients too."""
    leaves = [value.to(dtype).requires_grad_() for value in inputs]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, expected = function(*leaves), reference(*wide)
    assert_near(out, expected, op, dtype)
    upstream = torch.randn_like(expected).to(out.dtype)
    gradients = torch.autograd.grad(out, leaves, upstream)
    expected_gradients = torch.autograd.grad(expected, wide, upstream.double())
    for gradient, wanted, leaf in zip(gradients, expected_gradients, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert_near(gradient, wanted, op, dtype)
    return out


# ------------------------------------------------------------------------------------------------- rms_norm
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2,), (7,), (3, 5), (2, 3, 33), (0, 4)])
def test_rms_norm(shape, dtype):
    if 0 in shape:
        assert rms_norm(torch.zeros(shape, dtype=dtype), torch.ones(shape[-1], dtype=dtype), 1e-6).shape == shape
        return

    def naive(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    out = compare(
        "rms_norm",
        lambda x, weight: rms_norm(x, weight, 1e-6),
        naive,
        [torch.randn(shape) * 3, torch.rand(shape[-1]) + 0.5],
        dtype,
    )
    assert out.dtype == dtype


def test_rms_norm_keeps_the_order_of_casts_of_transformers():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for dtype in (torch.float32, torch.bfloat16):
        module = LlamaRMSNorm(65, eps=1e-5).to(dtype)
        module.weight.data.uniform_(0.5, 1.5)
        x = torch.randn(9, 65).to(dtype) * 10
        assert torch.equal(rms_norm(x, module.weight, 1e-5), module(x))


def test_rms_norm_takes_strided_inputs_and_a_wider_weight():
    x = torch.randn(6, 10, dtype=torch.bfloat16)
    strided = x.t().contiguous().t()
    weight = torch.rand(20)[::2]
    out = rms_norm(strided, weight, 1e-6)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rms_norm(x, weight.contiguous(), 1e-6))


# ------------------------------------------------------------------------------------------------ attention
def naive_attention(query, key, value, scale, allowed):
    """Softmax over allowed keys, one head at a time; `allowed` bool [b,s,t]. Queries without a key give zero."""
    s, b, h, _ = query.shape
    g = key.shape[2]
    rows = []
    for head in range(h):
        scores = torch.einsum("sbd,tbd->bst", query[:, :, head], key[:, :, head // (h // g)]) * scale
        scores = scores.masked_fill(~allowed, float("-inf"))
        weights = torch.nan_to_num(scores.softmax(-1), 0.0)
        rows.append(torch.einsum("bst,tbe->sbe", weights, value[:, :, head // (h // g)]))
    return torch.cat(rows, -1)


def qkv(s, t, b, h, g, d, e):
    return [torch.randn(s, b, h, d), torch.randn(t, b, g, d), torch.randn(t, b, g, e)]


SHAPES = [(1, 1, 1, 1, 4, 4), (7, 2, 6, 2, 8, 8), (5, 3, 3, 1, 5, 5), (33, 1, 5, 5, 16, 16), (9, 2, 4, 2, 6, 10)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_causal_attention(shape, dtype):
    s, b, h, g, d, e = shape
    allowed = torch.ones(b, s, s).tril().bool()
    out = compare(
        "attention",
        lambda q, k, v: attention(q, k, v, scale=0.3),
        lambda q, k, v: naive_attention(q, k, v, 0.3, allowed),
        qkv(s, s, b, h, g, d, e),
        dtype,
    )
    assert out.shape == (s, b, h * e) and out.dtype == dtype


SEGMENTS = torch.tensor(
    [
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 2, 2, 2, 2],
        [5, 5, 3, -1, -1, -1, -1, -1, -1],
        [-1, -1, -1, -1, -1, -1, -1, -1, -1],
    ]
)


def allowed_of(segments, rows):
    same = segments[0][:, :, None] == segments[1][:, None, :]
    real = (segments[0] >= 0)[:, :, None] & (segments[1] >= 0)[:, None, :]
    return same & real & (rows[1][None, :] <= rows[0][:, None])[None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(6, 2), (3, 1), (2, 2)])
def test_packed_and_padded_attention(heads, dtype):
    h, g = heads
    allowed = allowed_of((SEGMENTS, SEGMENTS), (torch.arange(9), torch.arange(9)))
    out = compare(
        "attention",
        lambda q, k, v: attention(q, k, v, scale=0.5, segments=(SEGMENTS, SEGMENTS)),
        lambda q, k, v: naive_attention(q, k, v, 0.5, allowed),
        qkv(9, 9, 4, h, g, 6, 6),
        dtype,
    )
    assert (out[:, 3] == 0).all() and (out[3:, 2] == 0).all()


def test_padding_gets_exactly_no_gradient_and_gives_none():
    q, k, v = (part.requires_grad_() for part in qkv(9, 9, 4, 4, 2, 6, 6))
    attention(q, k, v, scale=0.5, segments=(SEGMENTS, SEGMENTS)).sum().backward()
    padding = (SEGMENTS < 0).t()
    for part in (q, k, v):
        assert (part.grad[padding] == 0).all()
        assert (part.grad[~padding].abs().sum(-1) > 0).any()


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_context_parallel_ranks(packed):
    """Queries of one zigzag rank over the gathered keys equal the same rows of the whole."""
    from loong_core.parallel import context

    size, s, b = 2, 12, 3
    whole = [part.double() for part in qkv(s, s, b, 6, 2, 8, 8)]
    segments = torch.tensor([[0] * 12, [0] * 5 + [1] * 4 + [-1] * 3, [0] * 2 + [7] * 10])
    pair = (segments, segments) if packed else None
    expected = attention(*whole, scale=0.4, segments=pair)
    gathered = context.gathered_rows(s, size)
    for rank in range(size):
        mine = context.rows(s, size, rank)
        local = None if not packed else (segments[:, mine], segments[:, gathered])
        out = attention(
            whole[0][mine], whole[1][gathered], whole[2][gathered], scale=0.4, rows=(mine, gathered), segments=local
        )
        torch.testing.assert_close(out, expected[mine], rtol=1e-12, atol=1e-12)


def test_attention_takes_strided_inputs():
    q, k, v = qkv(7, 7, 2, 6, 2, 8, 8)
    fused = torch.cat([q.reshape(7, 2, 2, -1), k, v], dim=-1)
    parts = fused.split([24, 8, 8], dim=-1)
    strided = [parts[0].reshape(7, 2, 6, 8), parts[1], parts[2]]
    assert not strided[1].is_contiguous()
    torch.testing.assert_close(attention(*strided, scale=0.3), attention(q, k, v, scale=0.3))
    packed = (torch.zeros(7, 2, dtype=torch.int64).t(), torch.zeros(2, 7, dtype=torch.int64))
    torch.testing.assert_close(attention(*strided, scale=0.3, segments=packed), attention(q, k, v, scale=0.3))


def test_attention_dropout_drops_and_keeps_the_mean():
    q, k = torch.zeros(64, 4, 4, 8), torch.zeros(64, 4, 2, 8)
    v = torch.ones(64, 4, 2, 8)
    plain = attention(q, k, v, scale=1.0)
    dropped = attention(q, k, v, scale=1.0, dropout=0.5)
    torch.testing.assert_close(plain, torch.ones_like(plain))
    assert (dropped != 1).float().mean() > 0.5
    assert abs(dropped.mean().item() - 1.0) < 0.05


def test_attention_is_deterministic():
    inputs = qkv(17, 17, 2, 6, 2, 8, 8)
    results = []
    for _ in range(2):
        leaves = [part.clone().requires_grad_() for part in inputs]
        out = attention(*leaves, scale=0.3)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


# -------------------------------------------------------------------------------------------- cross entropy
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "vocabulary"), [((1, 131), 131), ((3, 5, 136), 131), ((2, 1, 3), 2), ((4, 2), 1), ((0, 8), 5)]
)
def test_cross_entropy_equals_torch(shape, vocabulary, dtype):
    logits = (torch.randn(shape) * 4).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, shape[:-1])
    if targets.numel() > 2:
        targets.view(-1)[::3] = -100
    loss = cross_entropy(logits, targets, vocabulary=vocabulary, group=None)
    assert loss.dtype == torch.float32 and loss.shape == targets.shape
    wide = logits.detach().double()[..., :vocabulary].requires_grad_()
    expected = functional.cross_entropy(wide.reshape(-1, vocabulary), targets.reshape(-1), reduction="none")
    if not targets.numel():
        loss.sum().backward()
        assert logits.grad.shape == logits.shape
        return
    assert_near(loss.flatten(), expected, "cross_entropy", torch.float32)
    upstream = torch.randn(targets.shape)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    (wanted,) = torch.autograd.grad(expected, wide, upstream.double().flatten())
    assert gradient.dtype == dtype
    assert (gradient[..., vocabulary:] == 0).all()
    assert (gradient[targets == -100] == 0).all()
    if wanted.abs().max() > 0:
        assert_near(gradient[..., :vocabulary], wanted, "cross_entropy", dtype)


def test_cross_entropy_in_chunks_is_the_same(monkeypatch):
    from loong_core.references import cross_entropy as module

    logits = torch.randn(11, 13, requires_grad=True)
    targets = torch.randint(0, 13, (11,))
    results = []
    for elements in (1 << 24, 39, 1):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
        loss = cross_entropy(logits, targets, vocabulary=13)
        results.append((loss, torch.autograd.grad(loss.sum(), logits)[0]))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-6, atol=1e-8)


def test_cross_entropy_survives_large_and_infinite_logits_and_strides():
    logits = torch.tensor([[1e4, -1e4, 0.0], [float("-inf"), 2.0, 1.0]]).t().contiguous().t().requires_grad_()
    loss = cross_entropy(logits, torch.tensor([0, 2]), vocabulary=3)
    expected = functional.cross_entropy(logits, torch.tensor([0, 2]), reduction="none")
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all() and gradient[1, 0] == 0


@pytest.mark.parametrize("target", [7, -1, -101])
def test_a_target_outside_the_vocabulary_is_an_error(target):
    with pytest.raises(DataError, match=f"target {target} .*vocabulary of 7"):
        cross_entropy(torch.randn(2, 9), torch.tensor([0, target]), vocabulary=7)


@pytest.mark.parametrize(("world", "vocabulary", "width"), [(2, 131, 66), (2, 5, 3), (3, 4, 4), (2, 6, 3)])
def test_cross_entropy_over_ranks(world, vocabulary, width):
    """Also where the last ranks hold padding alone."""
    torch.manual_seed(3)
    logits = torch.randn(2, 5, world * width) * 3
    targets = torch.randint(0, vocabulary, (2, 5))
    targets[0, 1] = -100
    upstream = torch.randn(2, 5)

    def compute(rank):
        group = torch.distributed.group.WORLD
        mine = logits[..., rank * width : (rank + 1) * width].clone().requires_grad_()
        loss = cross_entropy(mine, targets, vocabulary=vocabulary, group=group)
        (gradient,) = torch.autograd.grad(loss, mine, upstream)
        return [loss.tolist(), gradient.tolist()]

    results = run_ranks(world, compute, init=True, megatron=False)
    whole = logits.clone().requires_grad_()
    expected = cross_entropy(whole, targets, vocabulary=vocabulary)
    (wanted,) = torch.autograd.grad(expected, whole, upstream)
    for loss, _ in results:
        torch.testing.assert_close(torch.tensor(loss), expected.detach(), rtol=1e-6, atol=1e-6)
    gradient = torch.cat([torch.tensor(part) for _, part in results], -1)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)


def test_the_naive_attention_itself_sees_a_wrong_mask():
    """The comparison can fail: one key too many is noticed."""
    inputs = qkv(6, 6, 1, 2, 1, 4, 4)
    wrong = torch.ones(1, 6, 6).tril(1).bool()
    with pytest.raises(AssertionError):
        compare(
            "attention",
            lambda q, k, v: attention(q, k, v, scale=0.3),
            lambda q, k, v: naive_attention(q, k, v, 0.3, wrong),
            inputs,
            torch.float32,
        )


def test_every_pair_of_grouped_heads_agrees_with_repeated_heads():
    for h, g in itertools.product((6, 12), (1, 2, 3, 6)):
        q, k, v = qkv(8, 8, 1, h, g, 4, 4)
        repeated = (part.repeat_interleave(h // g, dim=2) for part in (k, v))
        torch.testing.assert_close(attention(q, k, v, scale=0.5), attention(q, *repeated, scale=0.5))
