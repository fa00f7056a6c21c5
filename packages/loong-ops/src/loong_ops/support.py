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
