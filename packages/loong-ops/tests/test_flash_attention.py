"""FlashAttention-4 as an attention op: the contract on a GPU; elsewhere the calls made, on a stand-in for its kernels.

Shape legend: s rows, b batch, h query heads, g key-value heads, d and e head sizes.
"""

from __future__ import annotations

import importlib.util
import json
import types
from typing import Any

import flash_stand_ins
import pytest
import torch

from loong_core import cli
from loong_core.backends import cuda
from loong_core.errors import Unsupported
from loong_core.ops import choose
from loong_core.parallel import segments as packed_segments
from loong_core.plugins import load
from loong_core.references.attention import attention as reference
from loong_core.registry import Registry
from loong_core.testing import OpContract
from loong_core.testing.cases.attention import define_attention
from loong_core.testing.cases.case import OpCase
from loong_core.types import OpRequest
from loong_ops import support
from loong_ops.flash_attention import attention

SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2], [4, 4, -1, -1, -1, -1], [9, 9, 9, 9, 9, 9]])
ROW = torch.tensor([[0, 0, 1, 1, 1, -1]])


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(packed_segments, "_KNOWN", {})
    return flash_stand_ins.install(monkeypatch)


def qkv(s, b, h, g, d, e):
    torch.manual_seed(1)
    return [torch.randn(s, b, heads, width, requires_grad=True) for heads, width in ((h, d), (g, d), (g, e))]


@pytest.mark.parametrize("segments", [None, SEGMENTS, ROW, torch.full((1, 6), -1), torch.zeros(1, 6)])
@pytest.mark.parametrize("sizes", [(6, 2, 8, 8), (3, 1, 4, 6)])
def test_layout_of_calls_reproduces_the_reference(kernels, segments, sizes):
    inputs = qkv(6, 2 if segments is None else len(segments), *sizes)
    pair = None if segments is None else (segments, segments)
    out = attention(*inputs, scale=0.3, segments=pair)
    expected = reference(*inputs, scale=0.3, segments=pair)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(expected)
    for found, wanted in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("batch", "segments"), [(3, None), (1, None), (1, ROW)])
def test_kernels_work_on_the_layers_own_memory(kernels, batch, segments):
    """Inputs may be strided views of one projection; the result and the gradients are contiguous in [s,b,...]."""
    mixed = torch.randn(6, batch, 12, 32, requires_grad=True)
    inputs = mixed.split([6, 3, 3], dim=2)
    out = attention(*inputs, scale=0.3, segments=None if segments is None else (segments, segments))
    upstream = torch.randn_like(out)
    out.backward(upstream)
    forward, backward = (call["tensors"] for call in kernels.calls)
    pointers = [part.data_ptr() for part in (*inputs, out)]
    assert [part.data_ptr() for part in forward] == pointers
    assert [part.data_ptr() for part in backward[:5]] == [*pointers, upstream.data_ptr()]
    assert out.is_contiguous()
    for gradient in backward[5:]:
        assert (gradient.transpose(0, 1) if segments is None else gradient).is_contiguous()


@pytest.mark.parametrize(
    ("sizes", "widths"),
    [
        ((3, 1, 80, 80), (96, 96)),
        ((3, 3, 80, 64), (96, 64)),
        ((3, 1, 16, 64), (64, 64)),
        ((2, 2, 120, 120), (120, 120)),
        ((2, 1, 144, 144), (144, 144)),
        ((2, 2, 112, 40), (128, 64)),
    ],
)
def test_heads_whose_gradients_would_be_wrong_are_widened(kernels, sizes, widths):
    inputs = qkv(9, 1, *sizes)
    out = attention(*inputs, scale=sizes[2] ** -0.5)
    expected = reference(*inputs, scale=sizes[2] ** -0.5)
    upstream = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(result, inputs, upstream) for result in (out, expected))
    torch.testing.assert_close((out, *found), (expected, *wanted))
    assert (kernels.calls[0]["tensors"][0].shape[-1], kernels.calls[0]["tensors"][2].shape[-1]) == widths


def test_the_tail_is_zero_whatever_the_memory_held(kernels):
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        inputs = qkv(6, 1, 4, 2, 8, 8)
        out = attention(*inputs, scale=0.3, segments=(ROW, ROW))
        gradients = torch.autograd.grad(out, inputs, torch.full_like(out, 1e30))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not out[5:].any() and not any(gradient[5:].any() for gradient in gradients)
    assert all(call["tensors"][0].shape[0] == 5 for call in kernels.calls)


def test_frozen_inputs_have_no_gradient(kernels):
    query, key, value = qkv(6, 1, 4, 2, 8, 8)
    attention(query, key.detach(), value, scale=0.3).sum().backward()
    assert query.grad is not None and value.grad is not None


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_as_torch_is(kernels, wanted):
    inputs = qkv(6, 1, 4, 2, 8, 8)
    torch.use_deterministic_algorithms(wanted)
    try:
        out = attention(*inputs, scale=0.3)
    finally:
        torch.use_deterministic_algorithms(False)
    out.sum().backward()
    assert kernels.calls[1]["deterministic"] is wanted


def test_dropout_is_refused():
    with pytest.raises(Unsupported, match="model.dropout"):
        attention(*qkv(6, 1, 4, 2, 8, 8), scale=0.3, dropout=0.1)


# ------------------------------------------------------------------------------------------------------- choice
@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A machine with FlashAttention-4, Transformer Engine and one Hopper GPU, as far as looking shows it."""
    (tmp_path / "cute").mkdir()
    (tmp_path / "cute" / "interface.py").write_text("raise ImportError('looking must not import')")
    true = importlib.util.find_spec
    flash = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    found = {"flash_attn": flash, "cutlass": object(), "transformer_engine": object()}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: found.get(name) or true(name, *more))
    monkeypatch.setattr(cuda, "compute_capability", lambda: (9, 0))
    return found


def request(backend="cuda", dtype="bfloat16", cp=1, **fields):
    return OpRequest(backend, dtype, {"cp": cp}, {"head_dim": 128, "dropout": 0.0, **fields})


def chosen(asked):
    capabilities = frozenset({"transformer_engine"})
    return choose(Registry(load()).ops(), asked, {}, capabilities)["attention"]


def test_it_is_chosen_before_transformer_engine(installed):
    assert chosen(request()).name == "flash4"
    assert chosen(request(head_dim=256)).name == "flash4"
    for asked, reason in (
        (request(dtype="float32"), "not in float32"),
        (request(cp=2), "zigzag"),
        (request(dropout=0.1), "no dropout"),
        (request(head_dim=100), "heads of 100"),
        (request(head_dim=512), "heads of 512"),
        (request(backend="cpu"), "backend cuda"),
    ):
        choice = chosen(asked)
        assert choice.name != "flash4" and reason in choice.reason
    assert chosen(request(dropout=0.1)).name == "transformer_engine"


def test_it_wants_a_gpu_with_a_backward_kernel(installed, monkeypatch):
    monkeypatch.setattr(cuda, "compute_capability", lambda: (8, 0))
    assert "compute capability 8.0" in chosen(request()).reason
    monkeypatch.setattr(cuda, "compute_capability", lambda: (10, 0))
    assert chosen(request()).name == "flash4" and "heads of 192" in chosen(request(head_dim=192)).reason
    monkeypatch.setattr(cuda, "compute_capability", lambda: None)  # a laptop that plans
    assert chosen(request()).name == "flash4"


def test_a_plan_with_dropout_takes_another(installed, tmp_path, capsys):
    pytest.importorskip("loong_llm", reason="needs a real model family")
    recipe = {"model": {"family": "qwen3", "config": "qwen3-0.6b"}, "data": {"seq_len": 64}, "precision": "bf16"}
    (tmp_path / "r.json").write_text(json.dumps(recipe | {"backend": "cuda"}))
    for dropout in (0.0, 0.1):
        assert cli.run(["plan", str(tmp_path / "r.json"), f"model.dropout={dropout}", "--json"]) == 0
        choice = json.loads(capsys.readouterr().out)["ops"]["attention"]
        assert (choice["name"] == "flash4") == (dropout == 0) == ("no dropout" not in choice["reason"])


def test_flash_attention_2_is_another_package(installed, tmp_path):
    (tmp_path / "cute" / "interface.py").unlink()
    assert "flash_attn.cute: not installed" in str(support.flash4(request()))


def test_without_the_package_the_reason_names_it():
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("FlashAttention is installed here")
    assert "flash-attn-4" in str(support.flash4(request()))


# -------------------------------------------------------------------------------------------------- on a device
def case(name, s, b, h, g, d, e=None, lengths=None):
    """One call at sizes the kernels have; `lengths` are the samples of each packed row, the rest of it is padding."""
    others: dict[str, Any] = {"scale": d**-0.5}
    if lengths is not None:
        rows = [[number for number, length in enumerate(row) for _ in range(length)] for row in lengths]
        numbers = torch.tensor([row + [-1] * (s - len(row)) for row in rows])
        others["segments"] = (numbers, numbers)
    shapes = {"query": (s, b, h, d), "key": (s, b, g, d), "value": (s, b, g, e or d)}
    return OpCase(name=name, tensors=shapes, others=others, define=define_attention)


CASES = (
    case("one_token", 1, 1, 2, 2, 64),
    case("odd", 131, 2, 3, 3, 64),
    case("grouped", 129, 2, 8, 1, 128),
    case("one_key_head", 65, 3, 3, 1, 80),
    case("narrow_heads", 131, 2, 2, 2, 16),
    case("heads_of_120", 67, 1, 4, 2, 120),
    case("wide_heads", 33, 1, 2, 1, 256),
    case("packed", 193, 1, 8, 2, 128, lengths=[[1, 64, 127, 1]]),
    case("packed_with_tail", 200, 1, 4, 4, 64, lengths=[[130, 7, 3]]),
    case("packed_rows", 70, 3, 4, 2, 64, lengths=[[70], [3, 5], [1, 66]]),
)


class Flash4(OpContract):
    op = "attention"
    implementation = "flash4"
    backend = "cuda"
    device = "cuda"
    dtypes = ("bfloat16", "float16")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", CASES, ids=[case.name for case in CASES])
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes)


class TestFlash4(Flash4):
    pytestmark = flash_stand_ins.needs_flash
    deterministic = False  # gradients of several blocks are added in any order


class TestFlash4Deterministic(Flash4):
    pytestmark = flash_stand_ins.needs_flash

    @pytest.fixture(autouse=True)
    def asked_for(self):
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)
