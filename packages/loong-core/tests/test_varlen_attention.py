"""The op `ragged_attention` by torch's FlashAttention-2: the contract on a GPU; elsewhere the call that is made."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import varlen

from loong_core.backends import cuda
from loong_core.ops import OPS, choose
from loong_core.parallel.varlen_attention import ragged_attention, supports
from loong_core.references.ragged_attention import ragged_attention as reference
from loong_core.testing import OpContract
from loong_core.testing.cases.ragged_attention import CASES, LARGE
from loong_core.types import OpRequest


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr("loong_core.parallel.varlen_attention.compute_capability", lambda: (9, 0))


def chosen(backend="cuda", dtype="bfloat16", **fields):
    return choose(OPS, OpRequest(backend, dtype, {}, fields), {})["ragged_attention"]


def test_it_is_chosen_in_half_precision(hopper):
    assert chosen().name == chosen(dtype="float16", head_dim=256).name == "varlen"
    for choice, reason in (
        (chosen(backend="cpu"), "backend cuda"),
        (chosen(dtype="float32"), "not in float32"),
        (chosen(head_dim=6), "heads of 6"),
        (chosen(head_dim=264), "heads of 264"),
    ):
        assert choice.name == "torch" and reason in choice.reason


def test_older_cards_take_the_reference(monkeypatch):
    monkeypatch.setattr("loong_core.parallel.varlen_attention.compute_capability", lambda: (7, 5))
    assert "7.5" in str(supports(OpRequest("cuda", "bfloat16", {}, {})))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_call_is_that_of_the_reference(case, monkeypatch):
    """Heads contiguous, lengths by their bounds alone: a value of the offsets is never asked for."""
    calls = []

    def play(query, key, value, query_offsets, key_offsets, *longest):
        assert all(part.stride(-1) == 1 for part in (query, key, value))
        calls.append(longest)
        return reference(query, key, value, query_offsets, key_offsets, longest).unflatten(1, query.shape[1:])

    monkeypatch.setattr(varlen, "varlen_attn", play)
    tensors = {name: part.mT.contiguous().mT for name, part in case.draw(torch.float64, "cpu").items()}
    torch.testing.assert_close(case.call(ragged_attention, tensors), case.exact(tensors))
    assert calls == [case.others["longest"]] * bool(len(tensors["query"]))


class Varlen(OpContract):
    op = "ragged_attention"
    implementation = "varlen"
    backend = "cuda"
    device = "cuda"
    dtypes = ("bfloat16", "float16")
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cuda.probe().devices == 0, reason="needs a CUDA device")]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            cases = (*CASES, *LARGE)
            metafunc.parametrize("case", cases, ids=[case.name for case in cases])
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes)


class TestVarlen(Varlen):
    deterministic = False  # gradients of several blocks are added in any order


class TestVarlenDeterministic(Varlen):
    dtypes = ("bfloat16",)

    @pytest.fixture(autouse=True)
    def asked_for(self):
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)
