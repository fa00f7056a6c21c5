"""One picture of a dataset: some episodes, each with its first, middle and last frame of every camera."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from loong_core.errors import DataError
from loong_vla.lerobot.layout import Dataset, Episode
from loong_vla.lerobot.video import FrameReader

_EPISODES = 12
_TILE = 160
_LINE = 16
_MARGIN = 4


def contact_sheet(dataset: Dataset, episodes: Sequence[Episode], file: Path, tolerance: float = 1e-4) -> int:
    """Write a PNG with at most 12 episodes, evenly spread; returns their number. A frame that cannot be had is a cross.

    Raises:
        DataError: the dataset has no camera, or no episode, or the file cannot be written.
    """
    if not dataset.cameras or not episodes:
        raise DataError(f"`{dataset.root}` has no {'camera' if episodes else 'episode'}: there is nothing to show.")
    chosen = [episodes[number] for number in _spread(len(episodes), _EPISODES)]
    rows = [(_heading(dataset, item), _frames(dataset, item, tolerance)) for item in chosen]
    cell = _TILE + _MARGIN
    width = 3 * len(dataset.cameras) * cell + _MARGIN
    height = len(rows) * (_LINE + cell) + 2 * _LINE + _MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, camera in enumerate(dataset.cameras):
        draw.text((_MARGIN + 3 * number * cell, _MARGIN), camera, "black", font)
    for number, (heading, tiles) in enumerate(rows):
        top = 2 * _LINE + number * (_LINE + cell)
        draw.text((_MARGIN, top), heading, "black", font)
        for column, tile in enumerate(tiles):
            left, middle = _MARGIN + column * cell, top + _LINE
            if tile is None:
                draw.rectangle((left, middle, left + _TILE, middle + _TILE), "lightgrey", "red")
                draw.line((left, middle, left + _TILE, middle + _TILE), "red", 2)
                draw.line((left, middle + _TILE, left + _TILE, middle), "red", 2)
            else:
                sheet.paste(ImageOps.contain(Image.fromarray(tile), (_TILE, _TILE)), (left, middle))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(file, format="png")
    except OSError as error:
        raise DataError(f"`{file}` cannot be written: {error.strerror or error}. Name another file.") from None
    return len(chosen)


def _spread(count: int, most: int) -> list[int]:
    return sorted({round(number) for number in np.linspace(0, count - 1, min(count, most)).tolist()})


def _heading(dataset: Dataset, episode: Episode) -> str:
    task = " / ".join(episode.tasks)
    return f"episode {episode.index}, {episode.length} frames, {episode.length / dataset.fps:.1f} s: {task}"


def _frames(dataset: Dataset, episode: Episode, tolerance: float) -> list[np.ndarray | None]:
    result: list[np.ndarray | None] = []
    with FrameReader(dataset, tolerance) as reader:
        for camera in dataset.cameras:
            for row in (0, (episode.length - 1) // 2, episode.length - 1):
                try:
                    result.append(reader.frames(episode, camera, [row])[0])
                except DataError:
                    result.append(None)
    return result
