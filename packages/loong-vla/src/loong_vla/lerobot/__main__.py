"""`python -m loong_vla.lerobot FOLDER` writes a small dataset to try things on: see `generate`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Version(StrEnum):
    """Dataset versions that can be written."""

    new = "v3.0"
    old = "v2.1"


def main(
    folder: Annotated[Path, typer.Argument(help="New or empty folder.")],
    version: Annotated[Version, typer.Option(help="Version of the dataset's layout.")] = Version.new,
    episodes: Annotated[int, typer.Option(min=1)] = 8,
    frames: Annotated[int, typer.Option(min=1, help="Frames of every episode.")] = 40,
    fps: Annotated[int, typer.Option(min=1)] = 10,
    side: Annotated[int, typer.Option(min=16, help="Height and width of the two cameras.")] = 64,
    state: Annotated[int, typer.Option(min=1, help="Numbers of the state.")] = 8,
    action: Annotated[int, typer.Option(min=1, help="Numbers of an action.")] = 7,
    codec: Annotated[str, typer.Option(help="h264, hevc, av1 or mpeg4.")] = "h264",
    seed: int = 0,
) -> None:
    """Write a small LeRobot dataset: an arm wanders, two cameras see it as a square.

    \b
    Example:
      python -m loong_vla.lerobot robot-data --episodes 20
    """
    from loong_vla.lerobot.generate import CAMERAS, generate

    cameras = dict.fromkeys(CAMERAS, (side, side))
    try:
        dataset = generate(folder, version.value, episodes, frames, fps, cameras, state, action, seed, codec)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(
        f"{folder}: {len(dataset.episodes)} episodes, {dataset.frames} frames. Look: loong data inspect {folder}"
    )


if __name__ == "__main__":
    typer.run(main)
