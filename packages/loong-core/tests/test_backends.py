"""The CPU and CUDA backends: probes that never raise and load nothing, set-up, environment, peaks, precision."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from loong_core.backends import cpu, cuda
from loong_core.precision import POLICIES
from loong_core.registry import resolve
from loong_core.testing.ranks import run_ranks
from loong_core.types import Probe

BACKENDS = [cpu.BACKEND, cuda.BACKEND]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_descriptors_are_complete(backend):
    for ref in (backend.probe, backend.setup, backend.peak_flops):
        assert callable(resolve(ref))
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in backend.env.items())
    assert "bf16" in backend.capabilities and backend.summary
    assert cuda.BACKEND.priority > cpu.BACKEND.priority


def test_probing_loads_no_tensor_library():
    code = (
        "import sys\n"
        "from loong_core.backends import cpu, cuda\n"
        "assert cpu.probe().devices == 1 and cuda.probe().devices >= 0\n"
        "bad = {'torch', 'numpy', 'megatron', 'transformer_engine'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_cpu_probe_tells_the_machines_memory():
    probe = cpu.probe()
    assert probe.devices == 1 and probe.device_name and not probe.reason
    total = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]
    assert probe.memory == pytest.approx(int(total) * 1024, rel=1e-3)


def test_cpu_setup_in_a_worker():
    def set_up(rank):
        import torch

        from loong_core.backends import cpu_device

        cpu_device.deactivate()
        os.environ.update(OMP_NUM_THREADS="2", CUDA_VISIBLE_DEVICES="0")
        device = cpu.setup(3)
        return [device, cpu_device.active(), torch.get_num_threads(), os.environ["CUDA_VISIBLE_DEVICES"]]

    assert run_ranks(1, set_up, megatron=False) == [["cpu", True, 2, ""]]


# ------------------------------------------------------------------------------------------------------ cuda
class Library:
    """Stands where libcuda stands: two GPUs, or a failure of one call."""

    def __init__(self, fails=None, code=100, devices=(("NVIDIA H200", 141 << 30), ("NVIDIA H100", 80 << 30))):
        self.fails, self.code, self.devices = fails, code, devices
        self.capabilities = {75: (9, 8), 76: (0, 6)}

    def __getattr__(self, name):
        def call(*arguments):
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"no CUDA-capable device is detected"
                return 0
            if name == self.fails:
                return self.code
            answer = getattr(type(self), "_" + name, None)
            return 0 if answer is None else answer(self, *arguments)

        return call

    def _cuDeviceGetCount(self, number):
        number._obj.value = len(self.devices)
        return 0

    def _cuDeviceGet(self, device, index):
        device._obj.value = index.value
        return 0

    def _cuDeviceGetName(self, name, length, device):
        name.value = self.devices[device.value][0].encode()
        return 0

    def _cuDeviceTotalMem_v2(self, memory, device):
        memory._obj.value = self.devices[device.value][1]
        return 0

    def _cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.capabilities[attribute.value][device.value]
        return 0


@pytest.fixture
def library(monkeypatch):
    """Replace libcuda; call with a Library or an exception."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def use(value):
        def load(name):
            if isinstance(value, Exception):
                raise value
            return value

        monkeypatch.setattr(cuda.ctypes, "CDLL", load)

    return use


def test_the_cuda_probe_describes_the_smallest_gpu(library):
    library(Library())
    assert cuda.probe() == Probe(devices=2, memory=80 << 30, device_name="NVIDIA H100")


def test_the_lowest_compute_capability_counts(library):
    library(Library())
    assert cuda.compute_capability() == (8, 6)
    for silent in (Library(devices=()), Library(fails="cuDeviceGetAttribute"), OSError("no driver")):
        library(silent)
        assert cuda.compute_capability() is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (OSError("libcuda.so.1: cannot open shared object file"), "no NVIDIA driver"),
        (Library(fails="cuInit"), "cuInit failed with code 100: no CUDA-capable device is detected"),
        (Library(fails="cuDeviceTotalMem_v2", code=3), "cuDeviceTotalMem_v2 failed with code 3"),
        (Library(devices=()), "shows no GPU"),
    ],
)
def test_the_cuda_probe_gives_its_reason_in_words(library, value, reason):
    library(value)
    probe = cuda.probe()
    assert probe.devices == 0 and reason in probe.reason


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_the_reason(library, monkeypatch, hidden):
    library(Library())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    probe = cuda.probe()
    assert probe.devices == 0 and "CUDA_VISIBLE_DEVICES" in probe.reason


def test_cuda_setup_without_a_gpu_says_what_to_do():
    import torch

    from loong_core.errors import Unsupported

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(Unsupported, match="sees no GPU.*backend: cpu"):
        cuda.setup(0)


@pytest.mark.parametrize(("visible", "rank", "device"), [(8, 3, "cuda:3"), (1, 5, "cuda:0")])
def test_cuda_setup_binds_the_local_rank(monkeypatch, visible, rank, device):
    import torch

    bound = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    assert cuda.setup(rank) == device
    assert bound == [int(device[-1])]


def test_cuda_setup_refuses_more_workers_than_gpus(monkeypatch):
    import torch

    from loong_core.errors import Unsupported

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(Unsupported, match="launch.devices <= 2"):
        cuda.setup(2)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA GH200 480GB", "bfloat16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA H20", "bfloat16", 148e12),
        ("Something else", "bfloat16", 0.0),
        ("NVIDIA A100-SXM4-80GB", "float8", 0.0),
    ],
)
def test_peaks(name, dtype, peak):
    assert cuda.peak_flops(name, dtype) == peak
    assert cpu.peak_flops(name, dtype) == 0.0


def test_precision_policies_name_torch_dtypes_and_known_capabilities():
    import torch

    policies = {policy.name: policy for policy in POLICIES}
    assert set(policies) == {"fp32", "bf16", "bf16_gradients"}
    for policy in POLICIES:
        for dtype in (policy.parameters, policy.activations, policy.gradients, policy.master, policy.optimizer_state):
            assert isinstance(getattr(torch, dtype), torch.dtype)
        assert policy.summary and all(policy.needs <= backend.capabilities for backend in BACKENDS)
    assert policies["bf16"].parameters == "bfloat16" and policies["bf16"].master == "float32"
    narrow = replace(policies["bf16_gradients"], gradients="float32", name="bf16", summary=policies["bf16"].summary)
    assert narrow == policies["bf16"]
