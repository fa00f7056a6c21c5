"""`loong ckpt`: look into checkpoints, verify them, turn one format into another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Look into checkpoints, verify them, convert them. Example: loong ckpt verify runs/demo",
)
Checkpoint = Annotated[
    Path, typer.Argument(help="A native checkpoint, a Hugging Face folder, or a run folder (its newest checkpoint).")
]
Out = Annotated[Path, typer.Argument(help="The folder to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def inspect(
    checkpoint: Checkpoint,
    json: Json = False,
    every: Annotated[bool, typer.Option("--all", help="One line per tensor instead of one per kind.")] = False,
) -> None:
    """Show what a checkpoint holds, from headers alone.

    \b
    Examples:
      loong ckpt inspect runs/demo
      loong ckpt inspect models/Qwen3-0.6B --all
    """
    from loong_ckpt import verify as checks
    from loong_core.cli import output

    found = checks.describe(checks.find(checkpoint))
    if json:
        output.as_json(found)
    elif found["kind"] == "native":
        keys = ("path", "step", "seed", "saved", "family")
        layout = " ".join(f"{name} {found['plan'][name]}" for name in ("tp", "pp", "cp", "ep", "dp"))
        output.pairs(
            [
                *((key, str(found[key])) for key in keys),
                ("layout", layout),
                ("size", output.memory(found["size"])),
            ]
        )
        output.say()
        output.table(("bytes", "file"), [(f"{size:,}", name) for name, size in found["files"].items()])
    else:
        by_dtype = ", ".join(
            f"{dtype} {output.count(number)}" for dtype, number in found["parameters_by_dtype"].items()
        )
        output.pairs(
            [
                ("path", found["path"]),
                ("architecture", str(found["architecture"])),
                ("parameters", f"{found['parameters']:,} ({by_dtype})"),
                ("size", output.memory(found["size"])),
            ]
        )
        output.say()
        rows = checks.grouped(found["tensors"])
        if every:
            rows = [(name, 1, row["dtype"], row["shape"]) for name, row in found["tensors"].items()]
        output.table(
            ("count", "dtype", "shape", "tensor"),
            [(str(count), dtype, "x".join(map(str, shape)) or "scalar", name) for name, count, dtype, shape in rows],
        )


@app.command()
def verify(checkpoint: Checkpoint, json: Json = False) -> None:
    """Compare a native checkpoint with its hashes, or a Hugging Face folder's index and headers with its files.

    \b
    Example:
      loong ckpt verify runs/demo/checkpoints/step-00000500
    """
    from loong_ckpt import verify as checks
    from loong_core.cli import output
    from loong_core.errors import CheckpointError

    report = checks.verify(checks.find(checkpoint))
    if json:
        output.as_json({**vars(report), "ok": not report.problems})
        raise typer.Exit(2 if report.problems else 0)
    for note in report.notes:
        output.say(f"note: {note}")
    if report.problems:
        raise CheckpointError(report.problems)
    how = "all hashes match" if report.kind == "native" else "index, headers and sizes agree"
    output.say(f"{report.path}: {report.kind}, {report.files} files, {output.memory(report.size)}: {how}.")


@app.command()
def export(checkpoint: Checkpoint, out: Out) -> None:
    """Write a native checkpoint as a Hugging Face folder, on the CPU.

    The names, dtypes, config.json and tokenizer are those the run started from.

    \b
    Example:
      loong ckpt export runs/demo exported
    """
    _convert(checkpoint, out, "hf")


@app.command()
def convert(
    checkpoint: Checkpoint,
    out: Out,
    to: Annotated[str | None, typer.Option(help="Format to write. Default: hf from native, native from hf.")] = None,
) -> None:
    """Turn a checkpoint of one format into another, on the CPU.

    \b
    Example:
      loong ckpt convert models/Qwen3-0.6B native-qwen --to native
    """
    _convert(checkpoint, out, to)


def _convert(checkpoint: Path, out: Path, kind: str | None) -> None:
    """Check in this process, convert in one of its own: it needs torch and megatron-core."""
    import subprocess
    import sys

    from loong_ckpt import native_folder
    from loong_ckpt import verify as checks
    from loong_core.cli import output
    from loong_core.errors import CheckpointError

    found = checks.find(checkpoint)
    kind = kind or ("hf" if native_folder.claims(found) else "native")
    report = checks.verify(found)
    if report.problems:
        raise CheckpointError(report.problems)
    command = [sys.executable, "-P", "-W", "ignore", "-m", "loong_ckpt.convert", str(found), str(out), kind]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise typer.Exit(code if code in (1, 2) else 1)
    output.say(f"{out}: {kind}, from {found}.")
