"""What loong-ops offers; the only file of the package with hook implementations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from loong_core.hookspecs import hookimpl

if TYPE_CHECKING:
    import typer

    from loong_core.types import OpImpl


@hookimpl
def loong_ops() -> Iterable[OpImpl]:
    """Triton kernels for every op that has one, on CUDA devices (and under Triton's interpreter, for tests), and what
    other libraries of kernels do better."""
    from loong_core.types import OpImpl
    from loong_ops.support import interpreted

    kernels = [
        OpImpl(
            op=op,
            name="triton",
            target=f"loong_ops.{module}:{op}",
            backends=frozenset({"cuda", "cpu"}),
            supports="loong_ops.support:triton",
            # Interpreted kernels are for whoever names them: `auto` shall not train a whole model with them.
            rank=-1 if interpreted() else 20,
        )
        for op, module in TRITON.items()
    ]
    flash = [
        OpImpl(
            op=op,
            name="flash4",
            target=f"loong_ops.{module}:{op}",
            backends=frozenset({"cuda"}),
            supports="loong_ops.support:flash4",
            rank=15,
        )
        for op, module in FLASH.items()
    ]
    quack = [
        OpImpl(
            op=op,
            name="quack",
            target=f"loong_ops.{module}:{op}",
            backends=frozenset({"cuda"}),
            supports="loong_ops.support:quack",
            rank=30,  # measured: experts take 12.8 ms forward and backward where the Triton kernels take 20.3
        )
        for op, module in QUACK.items()
    ]
    cublas = [
        OpImpl(op=op, name="cublas", target=f"loong_ops.linear:{op}", backends=frozenset({"cuda"}), rank=10)
        for op in ("linear", "linear_gelu")
    ]
    return [*kernels, *flash, *cublas, *quack]


@hookimpl
def loong_cli_commands(group: typer.Typer) -> None:
    """`loong bench`."""
    from loong_ops.cli import app

    group.add_typer(app, name="bench")


TRITON: dict[str, str] = {
    "experts": "experts",
    "adamw": "adamw",
    "cross_entropy": "cross_entropy",
    "linear_cross_entropy": "linear_cross_entropy",
    "rms_norm": "rms_norm",
    "residual_rms_norm": "rms_norm",
    "layer_norm": "layer_norm",
    "residual_layer_norm": "layer_norm",
    "rotary_qkv": "rotary_qkv",
    "swiglu": "swiglu",
    "geglu": "geglu",
    "gated_mlp": "gated_mlp",
    "ada_rms_norm": "modulation",
    "residual_ada_rms_norm": "modulation",
    "layer_norm_modulate": "modulation",
    "gated_residual": "gated_residual",
    "dropout_add": "dropout",
    "sum_of_squares": "sum_of_squares",
    "sum_parts": "sum_parts",
    "route": "route",
}
"""Op -> the module of its Triton implementation; the function is named after the op."""

FLASH: dict[str, str] = {
    "attention": "flash_attention",
    "ragged_attention": "flash_ragged_attention",
}
"""Op -> the module of its implementation by FlashAttention-4, likewise."""

QUACK: dict[str, str] = {
    "experts": "quack_experts",
    "linear": "quack_linear",
    "gated_mlp": "quack_mlp",
    "linear_cross_entropy": "quack_linear_cross_entropy",
}
"""Op -> the module of its implementation by QuACK's products, likewise."""
