"""A chip that is emulated on the CPU. No tensor library is imported before `setup`."""

from __future__ import annotations

import os

from loong_core import Backend, Probe
from loong_core.backends import cpu

DEVICES = "EXAMPLE_CHIP_DEVICES"
ROWS = 6
"""Rows (sequence positions) that the chip's norm unit takes at a time."""


def probe() -> Probe:
    """One chip, or as many as the environment plays. Never raises: nonsense there means none, with the reason."""
    text = os.environ.get(DEVICES, "1")
    if not text.isdigit() or int(text) == 0:
        return Probe(devices=0, reason=f"{DEVICES} is {text!r}: this machine has no example chip")
    return Probe(devices=int(text), memory=cpu.probe().memory // int(text), device_name="Example Chip 1")


def setup(local_rank: int) -> str:
    """Make megatron-core run where the chip is emulated; returns the torch device."""
    return cpu.setup(local_rank)


def peak_flops(device_name: str, dtype: str) -> float:
    """Of the one chip there is; 0 for any other."""
    return {"float32": 1.0e9, "bfloat16": 2.0e9}.get(dtype, 0.0) if device_name == "Example Chip 1" else 0.0


BACKEND = Backend(
    name="example_chip",
    device_type="cpu",
    collective="gloo",
    probe="loong_example_backend.device:probe",
    setup="loong_example_backend.device:setup",
    layer_provider="loong_example_backend.layers:ExampleLayerProvider",
    peak_flops="loong_example_backend.device:peak_flops",
    env={**cpu.ENVIRONMENT, "EXAMPLE_CHIP_QUEUE": "4"},
    capabilities=frozenset({"bf16", "row_blocks"}),
    priority=-1,  # below the cpu backend's 0: chosen by name only
    summary="A chip with a small norm unit, emulated on the CPU.",
)
