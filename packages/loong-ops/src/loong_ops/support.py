"""Whether the kernels can run, asked in the parent process as well: this loads no tensor library."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

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


def flash4(request: OpRequest) -> str | None:
    """None, or why FlashAttention-4 cannot serve the request."""
    from loong_core.backends.cuda import compute_capability

    if missing := [name for name, there in _flash4_packages().items() if not there]:
        return f"{' and '.join(missing)}: not installed (package flash-attn-4)"
    if request.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 or float16, not in {request.dtype}"
    if request.degrees.get("cp", 1) > 1:
        return "context-parallel rows in zigzag order need a mask that it does not take"
    if request.fields.get("dropout"):
        return "it has no dropout (model.dropout)"
    capability = compute_capability()
    if capability is not None and capability[0] not in _FLASH4_WIDTHS:
        return f"its backward runs on Hopper and Blackwell, not on compute capability {capability[0]}.{capability[1]}"
    width = request.fields.get("head_dim")
    widths = _FLASH4_WIDTHS[9 if capability is None else capability[0]]
    if width is not None and (width % 8 or not any(width in allowed for allowed in widths)):
        return f"it has no kernel for heads of {width} elements"
    return None


_FLASH4_WIDTHS: dict[int, tuple[range, ...]] = {9: (range(8, 257),), 10: (range(8, 129), range(256, 257))}
"""Major compute capability -> head sizes for which FlashAttention-4 has forward and backward kernels."""


def _flash4_packages() -> dict[str, bool]:
    """What FlashAttention-4 consists of. `flash_attn` may also be FlashAttention-2, which holds no `cute`, and which
    looking for the submodule by name would import, torch and all."""
    spec = importlib.util.find_spec("flash_attn")
    places = [] if spec is None else spec.submodule_search_locations or []
    found = any((Path(place) / "cute" / "interface.py").is_file() for place in places)
    return {"flash_attn.cute": found, "the CUTLASS DSL": importlib.util.find_spec("cutlass") is not None}
