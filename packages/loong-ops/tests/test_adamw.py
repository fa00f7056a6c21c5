"""The fused AdamW under the contract of its op, and compiled for a Hopper device: wide accesses, nothing spilled."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, ClassVar

import pytest
import torch

from loong_core.testing import AdamWContract
from loong_ops import adamw as fused


class TestInterpreted(AdamWContract):
    implementation = "triton"
    sizes: ClassVar[tuple[int, ...]] = (1, 5, 1000, 2051)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGpu(AdamWContract):
    implementation = "triton"
    backend = "cuda"
    device = "cuda"
    sizes: ClassVar[tuple[int, ...]] = (1, 5, 1000, 4099, 1 << 20)


SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "decay": 0.1, "step": 7}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("block", [64, 256, 2048])
def test_block_size_does_not_show(block: int) -> None:
    results = []
    for config in (None, {"BLOCK": block, "num_warps": 1}):
        start = torch.linspace(-3, 3, 1500, device=device())
        tensors = [start.bfloat16(), torch.cos(start), start * 0.1, start.square(), torch.zeros_like(start).short()]
        scale = torch.tensor(0.5, device=device())
        fused.adamw(*tensors, **SETTINGS, scale=scale, _config=config)
        results.append(tensors)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_bfloat16_gradients_and_moments_are_widened() -> None:
    start = torch.linspace(-3, 3, 100, device=device())
    narrow = [start.clone(), *(tensor.bfloat16() for tensor in (torch.cos(start), start, start.square()))]
    wide = [tensor.float().clone() for tensor in narrow]
    for tensors in (wide, narrow):
        scale = torch.ones((), device=device())
        fused.adamw(*tensors, None, **SETTINGS, scale=scale)
    assert torch.equal(wide[0], narrow[0])
    for one, other in zip(wide[2:], narrow[2:], strict=True):  # the interpreter truncates where a device rounds
        torch.testing.assert_close(other.float(), one, rtol=2**-7, atol=0.0)


COMPILE = """
import re
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from loong_ops.adamw import CONFIG, _adamw_kernel

pointers = ["*bf16", sys.argv[1], "*fp32", "*fp32", "*i16", "*fp32"]
types = [*pointers, "i64", *["fp32"] * 7, "constexpr", "constexpr"]
signature = dict(zip(_adamw_kernel.arg_names, types, strict=True))
aligned = {(index,): [["tt.divisibility", 16]] for index in range(7)}
source = ASTSource(_adamw_kernel, signature, {(14,): True, (15,): CONFIG["BLOCK"]}, aligned)
kernel = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": CONFIG["num_warps"]})
found = re.findall(r"(ld|st)\\.global\\.(v[24])?", kernel.asm["ptx"])
print(kernel.metadata.shared, sorted(kind + width for kind, width in found))
"""


@pytest.mark.parametrize(("gradient", "load"), [("*fp32", "ldv4"), ("*bf16", "ldv2")])
def test_compiled_for_hopper_every_access_is_wide(gradient: str, load: str) -> None:
    """One 16-byte access a thread for each float32 tensor, one of 8 bytes for each 2-byte tensor; nothing goes through
    shared memory. The one narrow load is the scale's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, gradient]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    accesses = sorted([load, "ld", "ldv2", "ldv2", "ldv4", "ldv4", "stv2", "stv2", "stv4", "stv4"])
    assert done.stdout.strip() == f"0 {accesses}"
