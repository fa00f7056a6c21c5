"""Whether the kernels can run, asked in the parent process as well: this loads no tensor library."""

from __future__ import annotations

import importlib.util
import os

from loong_core.types import OpRequest

INTERPRETER = "TRITON_INTERPRET"
DTYPES = ("bfloat16", "float16", "float32")


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter: on a CPU, slowly, for tests."""
    return os.environ.get(INTERPRETER) == "1"


def triton(request: OpRequest) -> str | None:
    """None, or why Triton kernels cannot serve the request."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if request.backend == "cpu" and not interpreted():
        return f"on a CPU its kernels run under Triton's interpreter only ({INTERPRETER}=1), which is meant for tests"
    if request.dtype not in DTYPES:
        return f"its kernels compute in {', '.join(DTYPES)}, not in {request.dtype}"
    return None


def quack(request: OpRequest) -> str | None:
    """None, or why QuACK's products cannot serve the request."""
    from loong_core.backends.cuda import compute_capability

    packages = {"quack": "quack-kernels", "cutlass": "nvidia-cutlass-dsl", "triton": "triton"}
    if missing := [package for name, package in packages.items() if importlib.util.find_spec(name) is None]:
        return f"{' and '.join(missing)}: not installed"
    if request.dtype != "bfloat16":
        return f"its tiles are chosen for bfloat16, not for {request.dtype}"
    capability = compute_capability()
    if capability is not None and capability[0] != 9:
        return f"its tiles are chosen for Hopper, not for compute capability {capability[0]}.{capability[1]}"
    return None
