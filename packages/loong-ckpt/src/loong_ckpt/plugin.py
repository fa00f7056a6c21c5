"""What loong-ckpt offers; the only file of the package with hook implementations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from loong_core.hookspecs import hookimpl

if TYPE_CHECKING:
    import typer

    from loong_core.types import CheckpointFormat


@hookimpl
def loong_checkpoint_formats() -> Iterable[CheckpointFormat]:
    """Hugging Face folders, and loong's own sharded checkpoints."""
    from loong_core.types import CheckpointFormat

    return [
        CheckpointFormat(
            name="native",
            claims="loong_ckpt.native_folder:claims",
            check="loong_ckpt.native_folder:check",
            load="loong_ckpt.native:load",
            save="loong_ckpt.native:save",
            store="loong_ckpt.store:Store",
            summary="sharded weights and optimizer state, resumable under any layout",
        ),
        CheckpointFormat(
            name="hf",
            claims="loong_ckpt.hf_folder:claims",
            check="loong_ckpt.hf_folder:check",
            load="loong_ckpt.hf:load",
            save="loong_ckpt.hf:save",
            summary="Hugging Face folder: config.json and safetensors",
        ),
    ]


@hookimpl
def loong_cli_commands(group: typer.Typer) -> None:
    """`loong ckpt`."""
    from loong_ckpt.cli import app

    group.add_typer(app, name="ckpt")
