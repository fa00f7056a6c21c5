"""The CPU backend: real megatron-core over gloo, for tests and first steps. Always there, and last in `auto`."""

from __future__ import annotations

import logging
import os
import platform
import sys
from typing import Any, cast

from loong_core.types import Backend, Probe

ENVIRONMENT = {
    # Workers must not see a GPU: megatron-core would compute on it although everything else is on the CPU.
    "CUDA_VISIBLE_DEVICES": "",
    # megatron-core asks for it under tensor parallelism, whatever the device.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}


def probe() -> Probe:
    """One device with the machine's memory (bytes). `backend: auto` prefers any accelerator that is found."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        memory = 0
    return Probe(devices=1, memory=memory, device_name=_processor())


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() in ("model name", "Model name") and value.strip():
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def setup(local_rank: int) -> str:
    """Hide every GPU from this process, make `torch.cuda` mean the CPU, set the number of threads; returns `"cpu"`.

    Threads come from OMP_NUM_THREADS (the launcher shares the cores out among workers), else torch decides.
    """
    # Whoever runs this chose the cpu backend, by name or because no accelerator was found.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # It warns that nvcc is here and no GPU is, whenever something imports it: true, and of no use to anybody here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # megatron-core takes their CUDA kernels for its optimizer wherever they can be imported.
    for library in ("transformer_engine", "apex"):
        sys.modules.setdefault(library, cast(Any, None))
    import torch

    from loong_core.backends import cpu_device

    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > 0:
        torch.set_num_threads(int(threads))
    cpu_device.activate()
    return "cpu"


def peak_flops(device_name: str, dtype: str) -> float:
    """0 (unknown): a CPU's peak depends on clocks and vector units that nobody can name portably."""
    return 0.0


BACKEND = Backend(
    name="cpu",
    device_type="cpu",
    collective="gloo",
    probe="loong_core.backends.cpu:probe",
    setup="loong_core.backends.cpu:setup",
    layer_provider="loong_core.parallel.torch_layers:TorchLayerProvider",
    peak_flops="loong_core.backends.cpu:peak_flops",
    env=ENVIRONMENT,
    capabilities=frozenset({"bf16"}),
    priority=0,
    summary="Plain CPUs over gloo: tests, laptops, first steps.",
)
