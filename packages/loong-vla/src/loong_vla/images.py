"""Camera images at a policy's size, and what training changes in them.

Resizing runs in decoding threads and is each peer's own: padded bilinear for Pi0.5, cropped bicubic or area for GR00T.
Augmentation runs on the device from uint8, by numbers that the stream drew for every image, so that neither the layout
of a run nor a wait for the device decides what is seen. Sources: lerobot 0.6 and OpenPI (`resize_with_pad_torch`,
`_transform_n1_7_image_for_vlm_torch`, `preprocess_observation_pytorch`); OpenCV's documentation of INTER_AREA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Position = tuple[float, float]
"""Where a crop lies: 0 is top or left, 1 is bottom or right, 0.5 the middle."""
Resize = Callable[[np.ndarray, "Position | None"], np.ndarray]
"""An image uint8 [y, x, 3], and where to crop it (None: the middle) -> uint8 [height, width, 3]."""

DRAWS = 7
"""Numbers in [0, 1) that `augment` wants for each image: crop row, crop column, angle, brightness, contrast,
saturation, and whether the camera moves with the hand (0 or 1), which keeps its geometry as it is."""


# ------------------------------------------------------------------------------------------------------- on the CPU
def pad_resize(height: int, width: int) -> Resize:
    """Pi0.5's: the whole image as large as it fits, bilinear without smoothing, black bars around the middle."""

    def resize(image: np.ndarray, position: Position | None = None) -> np.ndarray:
        rows, columns = image.shape[:2]
        if (rows, columns) == (height, width):
            return image
        ratio = max(columns / width, rows / height)
        inner = int(rows / ratio), int(columns / ratio)
        result = np.zeros((height, width, 3), np.uint8)
        top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
        result[top : top + inner[0], left : left + inner[1]] = _separable(image, inner, "bilinear")
        return result

    return resize


def square_resize(height: int, width: int, *, edge: int | None, crop: float | None, letterbox: bool = False) -> Resize:
    """GR00T's for checkpoints without albumentations: to a square of `edge` pixels (None: `height`), the middle `crop`
    of it, to the model's size; bicubic with smoothing. `letterbox` makes the image square with bars first."""
    from PIL import Image

    side = edge or height

    def resize(image: np.ndarray, position: Position | None = None) -> np.ndarray:
        image = _letterboxed(image) if letterbox else image
        found = Image.fromarray(image)
        found = found if found.size == (side, side) else found.resize((side, side), Image.Resampling.BICUBIC)
        if crop is not None and 0.0 < crop < 1.0:
            kept = max(1, round(side * crop))
            begin = (side - kept) // 2
            found = found.crop((begin, begin, begin + kept, begin + kept))
        if found.size != (width, height):
            found = found.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(found)

    return resize


def edge_resize(height: int, *, edge: int | None, crop: float | None, letterbox: bool = False, unit: int = 1) -> Resize:
    """GR00T's for checkpoints with albumentations: the shorter side to `edge` pixels (None: `height`), a window of the
    share `crop`, the shorter side to `edge` again; by area. Images keep their proportions, but for the rounding of both
    sides to multiples of `unit`, bicubic. The window lies where `position` says: training draws one for a sample and
    uses it for all of its cameras."""
    from PIL import Image

    side = edge or height

    def resize(image: np.ndarray, position: Position | None = None) -> np.ndarray:
        image = _shortest(_letterboxed(image) if letterbox else image, side)
        if crop is not None and 0.0 < crop < 1.0:
            rows, columns = image.shape[:2]
            kept = max(1, int(rows * crop)), max(1, int(columns * crop))
            if position is None:
                top, left = (rows - kept[0]) // 2, (columns - kept[1]) // 2
            else:
                top = round((rows - kept[0]) * min(max(position[0], 0.0), 1.0))
                left = round((columns - kept[1]) * min(max(position[1], 0.0), 1.0))
            image = image[top : top + kept[0], left : left + kept[1]]
        image = _shortest(image, side)
        rows, columns = (max(1, round(extent / unit)) * unit for extent in image.shape[:2])
        if image.shape[:2] == (rows, columns):
            return image
        return np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BICUBIC))

    return resize


def _shortest(image: np.ndarray, side: int) -> np.ndarray:
    shorter = min(image.shape[:2])
    if shorter == side:
        return image
    scale = side / float(shorter)
    rows, columns = (max(1, round(extent * scale)) for extent in image.shape[:2])
    return _separable(image, (rows, columns), "area")


def _letterboxed(image: np.ndarray) -> np.ndarray:
    rows, columns = image.shape[:2]
    if rows == columns:
        return image
    side = max(rows, columns)
    result = np.zeros((side, side, 3), np.uint8)
    top, left = (side - rows) // 2, (side - columns) // 2
    result[top : top + rows, left : left + columns] = image
    return result


def _separable(image: np.ndarray, size: tuple[int, int], kind: str) -> np.ndarray:
    """Rows, then columns, as weighted sums of a few neighbours: uint8 [y,x,3] -> uint8 [*size,3]. Plain numpy, because
    torch would start threads of its own in every thread that decodes."""
    if kind == "area" and not all(new <= old for new, old in zip(size, image.shape, strict=False)):
        kind = "area_up"  # OpenCV smooths by area only where both sides shrink
    found = image
    for axis, new in enumerate(size):
        if found.shape[axis] != new:
            indices, weights = _taps(found.shape[axis], new, kind)
            shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
            parts = (
                np.take(found, index, axis).astype(np.float32, copy=False) * weight.reshape(shape)
                for index, weight in zip(indices, weights, strict=True)
            )
            total = next(parts)
            for part in parts:
                total += part
            found = total
    return found if found.dtype == np.uint8 else np.clip(np.rint(found), 0, 255).astype(np.uint8)


@lru_cache(256)
def _taps(old: int, new: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Which elements of `old` make each of `new`, and with which weight: int64 and float32 [taps, new]."""
    scale, at = old / new, np.arange(new)
    if kind == "area":
        begin, end = at * scale, np.minimum((at + 1) * scale, old)
        first = np.floor(begin + 1e-9).astype(np.int64)
        count = int((np.ceil(end - 1e-9) - first).max())
        indices = first + np.arange(count)[:, None]
        shares = np.clip(np.minimum(indices + 1, end) - np.maximum(indices, begin), 0, None)
        return np.minimum(indices, old - 1), (shares / shares.sum(0)).astype(np.float32)
    if kind == "area_up":
        first = np.floor(at * scale)
        share = (at + 1) - (first + 1) / scale
        share = np.where(share <= 0, 0, share - np.floor(share))
    else:
        place = np.maximum((at + 0.5) * scale - 0.5, 0)
        first = np.floor(place)
        share = place - first
    low = np.minimum(first.astype(np.int64), old - 1)
    return np.stack([low, np.minimum(low + 1, old - 1)]), np.stack([1 - share, share]).astype(np.float32)


# ---------------------------------------------------------------------------------------------------- on the device
def looked_at(batch: Mapping[str, Tensor], index: Tensor) -> Tensor:
    """The images of a batch at positions `index` [n] of its b*c, [n,y,x,3]: as they are, or augmented where the batch
    carries draws for that (`augmentation` [b,c,DRAWS]), which only training batches do."""
    images = batch["images"].flatten(0, 1).index_select(0, index)
    draws = batch.get("augmentation")
    return images if draws is None else augmented(images, draws.flatten(0, 1).index_select(0, index))


def augmented(images: Tensor, draws: Tensor) -> Tensor:
    """OpenPI's training augmentation: images [n,y,x,3] uint8 and draws [n,DRAWS] -> float32 in [-1, 1].

    A window of 95 % of the image, turned by up to 5 degrees (bilinear, black outside), then brightness 0.7 to 1.3,
    contrast 0.6 to 1.4 and saturation 0.5 to 1.5. OpenPI draws once for a whole batch; here every image has its own.
    Nothing waits for the device.
    """
    import torch
    import torch.nn.functional as functional

    _, rows, columns, _ = images.shape
    pixels, draw = images.permute(0, 3, 1, 2).float() / 255.0, draws.float()
    moved = functional.grid_sample(pixels, _grid(draw, rows, columns), mode="bilinear", align_corners=False)
    pixels = torch.where(draw[:, 6, None, None, None] > 0.5, pixels, moved)
    brightness, contrast, saturation = (
        (low + (high - low) * draw[:, 3 + index])[:, None, None, None]
        for index, (low, high) in enumerate(((0.7, 1.3), (0.6, 1.4), (0.5, 1.5)))
    )
    pixels = pixels * brightness
    mean = pixels.mean((1, 2, 3), keepdim=True)
    pixels = (pixels - mean) * contrast + mean
    grey = pixels.mean(1, keepdim=True)
    pixels = ((pixels - grey) * saturation + grey).clamp(0, 1) * 2 - 1
    return pixels.permute(0, 2, 3, 1)


CROP, ANGLE = 0.95, 5.0
"""The share of each side that a crop keeps, and the most an image is turned, in degrees."""


def _grid(draw: Tensor, rows: int, columns: int) -> Tensor:
    """Where each pixel comes from, [i,y,x,2] in grid_sample's units: turned about the middle of the chosen window."""
    import torch

    angle = (draw[:, 2] * 2 - 1) * math.radians(ANGLE)
    middle = (draw[:, :2] * 2 - 1) * (1 - CROP)
    cosine, sine = angle.cos() * CROP, angle.sin() * CROP
    aspect = columns / rows
    matrix = torch.stack(
        [
            torch.stack([cosine, -sine / aspect, middle[:, 1]], 1),
            torch.stack([sine * aspect, cosine, middle[:, 0]], 1),
        ],
        dim=1,
    )
    grid: Tensor = torch.nn.functional.affine_grid(matrix, [len(draw), 3, rows, columns], align_corners=False)
    return grid
