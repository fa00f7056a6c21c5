"""The CPU device: every name is restored, CUDA arguments mean the CPU, random state, backward, fork, refusals."""

from __future__ import annotations

import os
import sys
import types

import pytest
import torch
import torch.distributed as dist

from loong_core.backends import cpu_device, gloo
from loong_core.errors import Unsupported
from loong_core.testing.ranks import run_ranks


@pytest.fixture
def device():
    """The CPU device active for one test."""
    cpu_device.activate()
    yield
    cpu_device.deactivate()


def replaced():
    """Everything that activation replaces, as it is now."""
    found = {}
    for name in cpu_device.TORCH_CUDA:
        owner = torch.cuda
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        found[name] = getattr(owner, last, None)
    found.update({f"dist.{name}": getattr(dist, name) for name in gloo.WRAPPERS})
    found["compile"] = torch.compile
    found["backward"] = torch.autograd._engine_run_backward
    return found


def test_activation_is_reversible_and_repeatable():
    cpu_device.deactivate()  # a command that another test ran here leaves it on
    before = replaced()
    for _ in range(2):
        assert not cpu_device.active()
        cpu_device.activate()
        cpu_device.activate()  # a second call changes nothing
        assert cpu_device.active()
        during = replaced()
        assert all(during[name] is not before[name] for name in before)
        cpu_device.deactivate()
        cpu_device.deactivate()
        after = replaced()
        assert all(after[name] is before[name] for name in before)
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


def test_device_arguments_that_name_cuda_mean_the_cpu(device):
    here = torch.cuda.current_device()
    made = [
        torch.zeros(2, device="cuda"),
        torch.empty(2, device="cuda:3"),
        torch.ones(2, device=here),
        torch.tensor([1, 2], device=torch.device("cuda")),
        torch.zeros(2).cuda(),
        torch.zeros(2).to("cuda"),
        torch.zeros(2).to(0),
        torch.zeros(2).to(device="cuda", dtype=torch.float64),
        torch.zeros(2).new_empty(3, device="cuda"),
        torch.zeros(2, pin_memory=True),
        torch.zeros(2).pin_memory(),
        torch.nn.Linear(2, 2, device="cuda").cuda().weight,
    ]
    assert all(tensor.device.type == "cpu" for tensor in made)
    assert torch.zeros(2).to(torch.float16).dtype == torch.float16
    assert torch.zeros(1, device="meta").device.type == "meta"
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_is_available_tells_the_truth(device):
    assert not torch.cuda.is_available()


def test_streams_and_events(device):
    stream, start, end = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    with torch.cuda.stream(stream):
        value = torch.ones(2).sum()
    stream.wait_stream(torch.cuda.current_stream())
    end.record(stream)
    torch.cuda.synchronize()
    assert stream == torch.cuda.current_stream() and end.query() and start.elapsed_time(end) >= 0.0
    assert value.item() == 2.0


def test_the_cuda_generator_is_the_cpu_generator(device):
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(4))
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(4, device="cuda"))


def test_the_device_is_on_inside_backward_and_recomputation(device):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.full((1,), 2.0, device="cuda")

    x = torch.ones(3, requires_grad=True)
    Doubled.apply(x).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0, 2.0]

    y = torch.ones(3, requires_grad=True)
    recomputed = torch.utils.checkpoint.checkpoint(
        lambda value: value * torch.full((1,), 3.0, device="cuda"), y, use_reentrant=True
    )
    torch.autograd.backward(recomputed.sum())
    assert y.grad.tolist() == [3.0, 3.0, 3.0]


def test_compile_is_the_identity(device):
    def double(x):
        return x * 2

    assert torch.compile(double) is double
    assert torch.compile(mode="max-autotune")(double) is double


def test_a_forked_child_is_active_too(device):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            tensor = torch.ones(2, device="cuda", requires_grad=True)
            (tensor * 2).sum().backward()
            os.write(write, str(tensor.grad.tolist()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert os.read(read, 100) == b"[2.0, 2.0]"
    os.close(read)


def test_a_visible_gpu_is_refused_unless_forced(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(Unsupported, match="CUDA_VISIBLE_DEVICES"):
        cpu_device.activate()
    assert not cpu_device.active()
    cpu_device.activate(force=True)
    assert cpu_device.active()
    cpu_device.deactivate()


def test_a_failed_activation_leaves_nothing_behind(monkeypatch):
    before = replaced()
    monkeypatch.setitem(gloo.WRAPPERS, "all_gather", lambda function: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cpu_device.activate()
    assert not cpu_device.active()
    after = replaced()
    assert all(after[name] is before[name] for name in before)


def test_megatron_imported_first_is_refused(monkeypatch):
    monkeypatch.setattr(cpu_device, "_activated_before", False)
    monkeypatch.setitem(sys.modules, "megatron.core", types.ModuleType("megatron.core"))
    with pytest.raises(Unsupported, match="megatron.core was imported before"):
        cpu_device.activate()
    assert not cpu_device.active()


def test_megatron_random_states_on_the_cpu():
    def draw(rank):
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

        tracker = CudaRNGStatesTracker()
        torch.manual_seed(1)
        outside = torch.rand(3)
        tracker.add("other", 7)
        torch.manual_seed(1)
        with tracker.fork("other"):
            inside = torch.rand(3)
        same = torch.rand(3)
        torch.manual_seed(7)
        return [torch.equal(outside, same), torch.equal(inside, torch.rand(3))]

    assert run_ranks(1, draw) == [[True, True]]
