"""FlashAttention-4 as the op `ragged_attention`: the contract on a GPU; elsewhere the calls made, on a stand-in."""

from __future__ import annotations

import importlib.util
import types

import flash_stand_ins
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from loong_core.backends import cuda
from loong_core.ops import choose
from loong_core.plugins import load
from loong_core.registry import Registry
from loong_core.testing import OpContract
from loong_core.testing.cases.ragged_attention import CASES, LARGE, ragged_case
from loong_core.types import OpRequest
from loong_ops.flash_ragged_attention import ragged_attention


@pytest.fixture
def kernels(monkeypatch):
    return flash_stand_ins.install(monkeypatch)


def call(case, dtype=torch.float64, frozen=()):
    """The inputs, the result and the gradients that are asked for, with those of the definition."""
    inputs = {name: part.requires_grad_(name not in frozen) for name, part in case.draw(dtype, "cpu").items()}
    out, expected = case.call(ragged_attention, inputs), case.exact(inputs)
    upstream = torch.randn_like(expected)
    wanted = [part for part in inputs.values() if part.requires_grad]
    gradients = [torch.autograd.grad(result, wanted, upstream) for result in (out, expected)]
    return inputs, (out, *gradients[0]), (expected, *gradients[1])


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=[case.name for case in [*CASES, *LARGE]])
def test_calls_give_the_result_and_gradients_of_the_definition(kernels, case):
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        _, found, wanted = call(case)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, wanted)
    assert len(kernels.calls) == 2 * bool(sum(case.others["query_offsets"]))


def test_kernels_work_on_the_layers_own_memory(kernels):
    """Inputs may be strided views of one projection; lengths are bounds and offsets as they are."""
    mixed = torch.randn(6, 6, 256)
    query, key, value = (part.requires_grad_() for part in mixed.split([4, 1, 1], dim=1))
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    out = ragged_attention(query, key, value, offsets, offsets, (5, 9))
    upstream = torch.randn_like(out)
    out.backward(upstream)
    forward, backward = (call["tensors"] for call in kernels.calls)
    pointers = [part.data_ptr() for part in (query, key, value, out)]
    assert [part.data_ptr() for part in forward] == pointers
    assert [part.data_ptr() for part in backward[:5]] == [*pointers, upstream.data_ptr()]
    assert out.is_contiguous() and all(gradient.is_contiguous() for gradient in backward[5:])
    for made in kernels.calls:
        assert made["cu_seqlens_q"] is offsets and (made["max_seqlen_q"], made["max_seqlen_k"]) == (5, 9)


@pytest.mark.parametrize(
    ("width", "kernel"), [(16, 32), (72, 96), (80, 96), (112, 128), (120, 120), (144, 144), (256, 256)]
)
def test_heads_whose_gradients_would_be_wrong_are_widened(kernels, width, kernel):
    _, found, wanted = call(ragged_case("x", [5, 3], [4, 7], 4, 2, width))
    torch.testing.assert_close(found, wanted)
    assert {part.shape[-1] for made in kernels.calls for part in made["tensors"]} == {kernel}


@pytest.mark.parametrize("frozen", [("query",), ("key", "value")])
def test_frozen_inputs_have_no_gradient(kernels, frozen):
    _, found, wanted = call(ragged_case("x", [5, 3], [4, 7], 4, 2, 32), frozen=frozen)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_as_torch_is(kernels, wanted):
    inputs = {name: part.requires_grad_() for name, part in CASES[1].draw(torch.float32, "cpu").items()}
    torch.use_deterministic_algorithms(wanted)
    try:
        out = CASES[1].call(ragged_attention, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    out.sum().backward()
    assert kernels.calls[1]["deterministic"] is wanted


def test_the_device_is_never_asked_for_a_value(kernels, monkeypatch):
    """Traced with tensors that have shapes and no values, as a CUDA graph is captured: nothing may depend on one."""
    monkeypatch.setattr(kernels, "_compute", lambda q, k, v, *more: q * (k * v).sum())
    with FakeTensorMode():
        query, key = (torch.empty(rows, heads, 72, requires_grad=True) for rows, heads in ((6, 8), (9, 1)))
        offsets = torch.empty(4, dtype=torch.int32)
        out = ragged_attention(query, key, key, offsets, offsets, (6, 9))
        out.sum().backward()
    assert out.shape == (6, 8 * 72) and key.grad is not None and key.grad.shape == key.shape


# ------------------------------------------------------------------------------------------------------- choice
@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A machine with FlashAttention-4 and one Hopper GPU, as far as looking shows it."""
    (tmp_path / "cute").mkdir()
    (tmp_path / "cute" / "interface.py").touch()
    true = importlib.util.find_spec
    found = {"flash_attn": types.SimpleNamespace(submodule_search_locations=[str(tmp_path)]), "cutlass": object()}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: found.get(name) or true(name, *more))
    monkeypatch.setattr(cuda, "compute_capability", lambda: (9, 0))


def chosen(backend="cuda", dtype="bfloat16", **fields):
    request = OpRequest(backend, dtype, {"cp": 1}, {"head_dim": 256, "dropout": 0.0, **fields})
    return choose(Registry(load()).ops(), request, {})["ragged_attention"]


def test_it_is_chosen_before_torchs_kernels(installed):
    assert chosen().name == "flash4" and chosen(dtype="float16", head_dim=72).name == "flash4"
    for choice, name, reason in (
        (chosen(dtype="float32"), "torch", "flash4 passed over: it computes in bfloat16 or float16, not in float32"),
        (chosen(head_dim=264), "torch", "flash4 passed over: it has no kernel for heads of 264"),
        (chosen(backend="cpu"), "torch", "flash4 passed over: it runs on backend cuda"),
    ):
        assert choice.name == name and reason in choice.reason


def test_without_the_package_torchs_kernels_are(monkeypatch):
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("FlashAttention is installed here")
    monkeypatch.setattr("loong_core.parallel.varlen_attention.compute_capability", lambda: (9, 0))
    assert chosen().name == "varlen" and "flash-attn-4" in chosen().reason


# -------------------------------------------------------------------------------------------------- on a device
DEVICE = (*LARGE, ragged_case("no_queries_at_all", [0, 0], [3, 2], 8, 1, 256))


class Flash4(OpContract):
    op = "ragged_attention"
    implementation = "flash4"
    backend = "cuda"
    device = "cuda"
    dtypes = ("bfloat16", "float16")
    pytestmark = flash_stand_ins.needs_flash

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", DEVICE, ids=[case.name for case in DEVICE])
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes)


class TestFlash4(Flash4):
    deterministic = False  # gradients of several blocks are added in any order

    def test_in_a_cuda_graph(self) -> None:
        """Captured once and replayed on other lengths within the same bounds."""
        case = next(case for case in LARGE if case.name == "few_queries_of_256")
        inputs = {name: part.requires_grad_() for name, part in case.draw(torch.bfloat16, "cuda").items()}
        offsets = [case.others[name].cuda() for name in ("query_offsets", "key_offsets")]

        def run():
            out = ragged_attention(*inputs.values(), *offsets, (60, 220))
            return out, *torch.autograd.grad(out, list(inputs.values()), torch.ones_like(out))

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = run()
        for moved in (0, 7):
            offsets[0][2] = 100 - moved
            offsets[1][2] = 211 - moved
            graph.replay()
            torch.testing.assert_close(found, run(), rtol=2e-2, atol=2e-2)


class TestFlash4Deterministic(Flash4):
    dtypes = ("bfloat16",)

    @pytest.fixture(autouse=True)
    def asked_for(self):
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)
