"""The op `route` in Triton: the contract, order of equal logits, NaN, and statistics over many programs."""

from __future__ import annotations

import pytest
import torch

from loong_core.errors import Unsupported
from loong_core.references import routing
from loong_core.testing import OpContract
from loong_ops.route import Config, route
from loong_ops.support import interpreted

DEVICE = "cpu" if interpreted() else "cuda"


@pytest.mark.skipif(not interpreted(), reason="kernels run on the device here, not under Triton's interpreter")
class TestRoute(OpContract):
    op = "route"
    implementation = "triton"
    dtypes = ("float32", "bfloat16", "float16")


@pytest.mark.gpu
class TestRouteOnDevice(OpContract):
    op = "route"
    implementation = "triton"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")


def test_equal_logits_choose_the_first() -> None:
    logits = torch.tensor([[0.0, -0.0, 1.0, 0.0, 1.0], [-1.0, -2.0, -1.0, -1.0, -2.0]], device=DEVICE)
    assert route(logits, 4, normalise=True).experts.tolist() == [[2, 4, 0, 1], [0, 2, 3, 1]]


def test_order_of_extremes() -> None:
    logits = torch.tensor([[1e-40, -1e-40, 1e38, -1e38, 0.0, float("-inf"), 1.0]], device=DEVICE)
    assert route(logits, 7, normalise=False).experts.tolist() == [[2, 6, 0, 4, 1, 3, 5]]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_nan_shows_in_the_weights_but_not_in_the_experts(top_k: int) -> None:
    """Whoever gathers by experts must never be sent outside."""
    nan = float("nan")
    logits = torch.tensor([[nan, nan, nan], [-nan, 1.0, 2.0], [nan, 1.0, 2.0], [0.0, 1.0, 2.0]], device=DEVICE)
    found = route(logits, top_k, normalise=True)
    for experts in found.experts.tolist():
        assert len(set(experts)) == top_k and all(0 <= expert < 3 for expert in experts)
    assert found.weights[:3].isnan().all() and found.weights[3].isfinite().all()
    assert int(found.counts.sum()) == 4 * top_k


@pytest.mark.parametrize("config", [Config(4, 4, 1), Config(2, 4, 3), Config(8, 2, 99)])
@pytest.mark.parametrize("normalise", [True, False])
def test_cuts_give_the_same(config: Config, normalise: bool) -> None:
    logits = torch.randn(19, 11, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    valid = (torch.arange(19) % 3 != 1).to(DEVICE)
    found = []
    for function, others in ((route, {"_config": config}), (routing.route, {})):
        leaf = logits.clone().requires_grad_()
        result = function(leaf, 3, normalise=normalise, valid=valid, **others)
        result.weights.backward(torch.arange(57.0, device=DEVICE).cos().reshape(19, 3))
        found.append([*(part.detach() for part in result), leaf.grad])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_valid_may_be_a_view_and_logits_rows_apart() -> None:
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    valid = torch.tensor([True, False] * 6, device=DEVICE)
    for rows, kept in ((logits[:, :7], valid[::2]), (logits[::2], valid[:6:2]), (logits, valid[1::2])):
        ours, expected = (function(rows, 2, normalise=True, valid=kept) for function in (route, routing.route))
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_unused_weights_have_no_gradient() -> None:
    logits = torch.randn(4, 5, device=DEVICE, requires_grad=True)
    assert not route(logits, 2, normalise=True).sums.requires_grad
    (logits.sum() + route(logits, 2, normalise=True).sums.sum()).backward()
    torch.testing.assert_close(logits.grad, torch.ones_like(logits))


@pytest.mark.parametrize("top_k", [0, 6])
def test_impossible_choice_is_an_error(top_k: int) -> None:
    with pytest.raises(Unsupported, match=rf"{top_k} of 5 experts.*Allowed"):
        route(torch.zeros(2, 5, device=DEVICE), top_k, normalise=True)


@pytest.mark.gpu
@pytest.mark.parametrize("e", [128, 160, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_size(e: int, dtype: torch.dtype) -> None:
    """What the interpreter is too slow for: all programs, several blocks each."""
    logits = torch.randn(20_000, e, device="cuda", dtype=dtype)
    ours, expected = (function(logits, 8, normalise=True) for function in (route, routing.route))
    assert torch.equal(ours.experts, expected.experts) and torch.equal(ours.counts, expected.counts)
    torch.testing.assert_close(ours.weights, expected.weights)
    torch.testing.assert_close(ours.sums, expected.sums, rtol=1e-5, atol=1e-4)
