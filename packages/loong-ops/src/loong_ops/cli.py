"""`loong bench`: how fast this card is. The measuring is a process of its own, because it needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Measure what this machine reaches. Example: loong bench ops attention",
)


@app.callback()
def bench() -> None:
    """Measure what this machine reaches. Example: loong bench ops attention"""


@app.command()
def ops(
    op: Annotated[list[str] | None, typer.Argument(help="Ops to measure; all where none.")] = None,
    shape: Annotated[str, typer.Option(help="Only shapes with this text in them.")] = "",
    every: Annotated[bool, typer.Option("--all", help="Variants too: block sizes and the like.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write the results to this file too.")] = None,
) -> None:
    """Time every op on this GPU: loong's kernels and the alternatives.

    A row shows milliseconds, TFLOP/s or TB/s, the share of what the card can do, and the memory that a call adds at
    its peak. What cannot run is shown with the reason.

    \b
    Examples:
      loong bench ops
      loong bench ops attention experts --shape t=32768 --json ops.json
    """
    import json as encoding
    import subprocess
    import sys

    from loong_core.backends import cuda
    from loong_core.errors import Unsupported

    probe = cuda.probe()
    if probe.devices == 0:
        raise Unsupported(f"loong bench ops measures on a CUDA device, and there is none here: {probe.reason}.")
    if json is not None and (json.is_dir() or not json.parent.is_dir()):
        raise Unsupported(f"--json {json}: cannot be written: {'is' if json.is_dir() else 'is not in'} a folder.")
    settings = {"ops": op or [], "shape": shape, "everything": every, "json": str(json) if json else None}
    command = [sys.executable, "-P", "-W", "ignore", "-m", "loong_ops.bench.run"]
    code = subprocess.run(command, input=encoding.dumps(settings), encoding="utf-8", check=False).returncode
    if code:
        raise typer.Exit(code if code in (1, 2) else 1)
