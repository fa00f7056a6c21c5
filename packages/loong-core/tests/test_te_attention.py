"""Transformer Engine's attention as far as a machine without a GPU shows it: packing, choice, and the calls made.

Its numbers are compared with the reference where there is a GPU (mark `gpu`).
"""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

from loong_core.ops import OPS, choose
from loong_core.parallel import segments as packed_segments
from loong_core.parallel import te_attention
from loong_core.references.attention import attention as reference
from loong_core.testing.ranks import run_ranks
from loong_core.types import OpRequest

SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2], [4, 4, -1, -1, -1, -1], [9, 9, 9, 9, 9, 9]])


class Recorded:
    """Stands where Transformer Engine's module stands: computes the same from the arguments it documents."""

    made: list[dict] = []

    def __init__(self, heads, channels, **settings):
        Recorded.made.append({"heads": heads, "channels": channels, **settings})
        self.settings = Recorded.made[-1]

    def __call__(self, query, key, value, **packing):
        scale = self.settings["softmax_scale"]
        if self.settings["qkv_format"] == "sbhd":
            assert not packing and self.settings["attn_mask_type"] == "causal"
            return reference(query, key, value, scale=scale)
        offsets = packing["cu_seqlens_q"]
        assert self.settings["attn_mask_type"] == "padding_causal" and offsets.dtype == torch.int32
        assert packing["cu_seqlens_kv"] is offsets and packing["max_seqlen_q"] == packing["max_seqlen_kv"]
        assert query.dim() == 3 and packing["max_seqlen_q"] >= int(offsets.diff().max())
        parts = [
            reference(*(part[start:end, None] for part in (query, key, value)), scale=scale)[:, 0]
            for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        ]
        return torch.cat(parts)


@pytest.fixture
def recorded(monkeypatch):
    """`transformer_engine.pytorch.DotProductAttention` replaced for one test."""
    module = types.ModuleType("transformer_engine.pytorch")
    module.DotProductAttention = Recorded
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    te_attention._module.cache_clear()
    Recorded.made.clear()
    yield Recorded
    te_attention._module.cache_clear()


def qkv(s, b, h, g, d, e):
    torch.manual_seed(1)
    return [torch.randn(s, b, heads, width, requires_grad=True) for heads, width in ((h, d), (g, d), (g, e))]


@pytest.mark.parametrize("segments", [None, SEGMENTS])
@pytest.mark.parametrize("sizes", [(6, 2, 8, 8), (3, 1, 4, 6)])
def test_layout_of_calls_reproduces_the_reference(recorded, segments, sizes):
    h, g, d, e = sizes
    inputs = qkv(6, 3, h, g, d, e)
    pair = None if segments is None else (segments, segments)
    out = te_attention.attention(*inputs, scale=0.3, segments=pair)
    expected = reference(*inputs, scale=0.3, segments=pair)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(expected)
    for found, wanted in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    (made,) = recorded.made
    assert made["heads"] == h and made["num_gqa_groups"] == g and made["channels"] == (d if d == e else (d, e))


def test_a_module_is_made_once_per_configuration(recorded):
    inputs = qkv(6, 3, 6, 2, 8, 8)
    for dropout in (0.0, 0.1, 0.0):
        te_attention.attention(*inputs, scale=0.3, dropout=dropout)
    assert [made["attention_dropout"] for made in recorded.made] == [0.0, 0.1]


def test_offsets_are_derived_once_per_micro_batch(recorded, monkeypatch):
    calls = []
    true = packed_segments.packing_of
    monkeypatch.setattr(packed_segments, "packing_of", lambda *both: calls.append(1) or true(*both))
    segments = SEGMENTS.clone()
    inputs = qkv(6, 3, 2, 2, 4, 4)
    for _ in range(3):
        out = te_attention.attention(*inputs, scale=0.3, segments=(segments, segments))
    assert len(calls) == 1
    torch.testing.assert_close(out, reference(*inputs, scale=0.3, segments=(segments, segments)))


def test_one_packed_row_is_passed_on_without_copies(recorded, monkeypatch):
    """The kernel reads the projection's own memory, strides included, and its result is handed on as it is."""
    passed = []
    true = Recorded.__call__

    def noted(self, *tensors, **packing):
        result = true(self, *tensors, **packing)
        passed.append((*tensors, result))
        return result

    monkeypatch.setattr(Recorded, "__call__", noted)
    mixed = torch.randn(6, 1, 12, 8)
    inputs = mixed.split([6, 3, 3], dim=2)
    segments = torch.tensor([[0, 0, 0, 1, 1, 2]])
    out = te_attention.attention(*inputs, scale=0.3, segments=(segments, segments))
    assert [part.data_ptr() for part in passed[0]] == [part.data_ptr() for part in (*inputs, out)]
    assert out.shape == (6, 1, 48) and out.is_contiguous()


def test_it_is_chosen_on_cuda_in_half_precision_without_context_parallelism(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: object() if name == "transformer_engine" else found(name, *more),
    )

    def chosen(backend, dtype, cp):
        return choose(OPS, OpRequest(backend, dtype, {"cp": cp}, {}), {})["attention"]

    assert chosen("cuda", "bfloat16", 1).name == "transformer_engine"
    assert "backend cuda" in chosen("cpu", "bfloat16", 1).reason
    assert "not in float32" in chosen("cuda", "float32", 1).reason
    assert "zigzag" in chosen("cuda", "bfloat16", 2).reason


def test_without_transformer_engine_the_torch_op_is_chosen_with_the_reason():
    if importlib.util.find_spec("transformer_engine") is not None:
        pytest.skip("Transformer Engine is installed here")
    chosen = choose(OPS, OpRequest("cuda", "bfloat16", {"cp": 1}, {}), {})["attention"]
    assert chosen.name == "torch" and "not installed" in chosen.reason


def test_the_layer_provider_says_what_to_install():
    if importlib.util.find_spec("transformer_engine") is not None:
        pytest.skip("Transformer Engine is installed here")

    def provide(rank):
        from loong_core.errors import Unsupported
        from loong_core.ops import bind
        from loong_core.parallel.te_layers import TELayerProvider

        try:
            TELayerProvider(bind(OPS, OpRequest("cpu", "float32", {}, {}), {}))
        except Unsupported as error:
            return str(error)

    assert "loong-train[nvidia]" in run_ranks(1, provide)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_numbers_on_a_gpu(segments):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    pytest.importorskip("transformer_engine")
    inputs = [part.detach().cuda().bfloat16().requires_grad_() for part in qkv(6, 3, 4, 2, 64, 64)]
    pair = None if segments is None else (segments.cuda(), segments.cuda())
    out = te_attention.attention(*inputs, scale=0.125, segments=pair)
    expected = reference(*inputs, scale=0.125, segments=pair)
    upstream = torch.randn_like(expected)
    results = zip(
        (out, *torch.autograd.grad(out, inputs, upstream)),
        (expected, *torch.autograd.grad(expected, inputs, upstream)),
        strict=True,
    )
    for found, wanted in results:
        assert found.isfinite().all()
        assert ((found - wanted).float().abs().max() / wanted.float().abs().max()).item() < 2e-2
