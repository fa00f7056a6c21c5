"""What of a GR00T batch has to be computed, worked out on the CPU: the device is never asked for a length.

Absent cameras are not looked at, padding of the text is nobody's key, and rows are sorted into those of text and those
of images, because different blocks of the action head read the one or the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loong_core.errors import DataError
from loong_core.train.engine import Batch

PREFIX = "pack_"
TEXT_BUCKET = 16
"""Rows of text are filled up to a multiple of it, so that few different shapes occur."""


class Packing(NamedTuple):
    """b samples, c cameras, l rows of the prompt, of which at most x are text and y are of images.

    `cameras` [i] are positions among the b*c images that are looked at. `seen` [l,b] is, for a row of an image, its
    place among the i*t tokens of these images. `is_image` [l,b,1] bool. `positions` [3,l,b] are those of the rotary
    embedding: time, row, column. `text_rows` [b,x] and `image_rows` [b,y] are the prompt's rows of either kind; `text`
    [b,x] and `images` [b,y] say which of them exist, `keys` [b,x+y] which the refining blocks see; None: all. `slots`
    [b] are places among the embodiments of the model. `real` [l,b,1]: where padding is seen, which rows are none.
    """

    cameras: Tensor
    seen: Tensor
    is_image: Tensor
    positions: Tensor
    text_rows: Tensor
    image_rows: Tensor
    slots: Tensor
    text: Tensor | None = None
    images: Tensor | None = None
    keys: Tensor | None = None
    real: Tensor | None = None


def packing_of(batch: Batch) -> Packing | None:
    """The packing that a batch carries, if it does."""
    if PREFIX + "text_rows" not in batch:
        return None
    return Packing(**{name: batch.get(PREFIX + name) for name in Packing._fields})  # type: ignore[arg-type]


def pack(batch: Batch, fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """The `Packing` of a batch as tensors to add to it, named `pack_text_rows` and so on, on the batch's device.

    On a device other than the CPU this waits for the batch. Raises `DataError` where a prompt does not hold as many
    image tokens as its cameras give, or where an embodiment is not one of those that the model was built for.
    """
    device = batch["tokens"].device
    tokens, valid, cameras = (batch[name].cpu() for name in ("tokens", "token_mask", "camera_mask"))
    unit = fields["patch"] * fields["merge"]
    grid = (batch["images"].shape[2] // unit, batch["images"].shape[3] // unit)
    found = arrange(tokens, valid, cameras, grid, fields["image_token"], fields["padding_as_keys"])
    if not fields["rope_sections"]:  # a language model that counts rows, whatever they are
        found = found._replace(
            positions=torch.arange(tokens.shape[1])[None, :, None].expand_as(found.positions).clone()
        )
    slots = _places(batch["embodiment"].cpu(), fields["embodiments"])
    packed = found._replace(slots=slots)._asdict()
    return {PREFIX + name: part.to(device) for name, part in packed.items() if part is not None}


def arrange(
    tokens: Tensor, valid: Tensor, cameras: Tensor, grid: tuple[int, int], image_token: int, padding_as_keys: bool
) -> Packing:
    """As `pack`, from tensors on the CPU; `grid` are the rows and columns of an image's tokens."""
    each = grid[0] * grid[1]
    is_image = (tokens == image_token) & valid
    _check(is_image, cameras, each, valid)
    counted = is_image.cumsum(1) - 1
    first = cameras.sum(1).cumsum(0) - cameras.sum(1)  # of each sample's images, among all that are looked at
    seen = torch.where(is_image, first[:, None] * each + counted, 0)
    positions = _positions(is_image, counted % each, grid)
    is_text = valid & ~is_image
    if padding_as_keys:  # the peer fills up to the longest sample of the batch
        padding = ~valid & (torch.arange(valid.shape[1]) < valid.sum(1).max())
    else:
        padding = torch.zeros_like(valid)
    text_rows, image_rows, text, images, keys = _rows(is_text, padding, is_image)
    return Packing(
        cameras=cameras.flatten().nonzero().flatten(),
        seen=seen.t().contiguous(),
        is_image=is_image.t().contiguous()[..., None],
        positions=positions.transpose(1, 2).contiguous(),
        text_rows=text_rows,
        image_rows=image_rows,
        slots=torch.zeros(0),
        text=None if text.all() else text,
        images=None if images.all() else images,
        keys=None if keys.all() else keys,
        real=valid.t().contiguous()[..., None] if padding.any() else None,
    )


def _check(is_image: Tensor, cameras: Tensor, each: int, valid: Tensor) -> None:
    if (valid[:, 1:] & ~valid[:, :-1]).any():
        raise DataError("token_mask: padding has to follow the prompt, but a sample has tokens behind padding.")
    have, want = is_image.sum(1), cameras.sum(1) * each
    for sample in (have != want).nonzero().flatten().tolist():
        raise DataError(
            f"Sample {sample} of the batch has {have[sample]} image tokens in its prompt, but "
            f"{int(cameras[sample].sum())} cameras of {each} tokens each. The prompt is made for another image size or "
            "number of cameras."
        )


def _places(embodiment: Tensor, used: tuple[int, ...]) -> Tensor:
    places = {slot: place for place, slot in enumerate(used)}
    if unknown := sorted(set(embodiment.tolist()) - set(places)):
        raise DataError(
            f"The batch holds embodiment {', '.join(map(str, unknown))}, but the model was built for "
            f"{', '.join(map(str, used))}. Set model.config.embodiments to the slots of the data."
        )
    return torch.tensor([places[slot] for slot in embodiment.tolist()])


def _positions(is_image: Tensor, place: Tensor, grid: tuple[int, int]) -> Tensor:
    """[3,b,l]: a row of text advances all three by one; the tokens of an image share a time and count rows and columns
    from it, and the text behind goes on after the longer side."""
    longer = max(grid)
    advance = torch.where(is_image, torch.where(place == 0, longer, 0), 1)
    before = advance.cumsum(1) - torch.where(is_image, longer, 1)
    row, column = place // grid[1], place % grid[1]
    return torch.stack([before, before + is_image * row, before + is_image * column])


def _rows(is_text: Tensor, padding: Tensor, is_image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of text (and behind it of padding that is seen) and of images of each sample; which of either exist, and
    which of both are keys."""
    length = is_text.shape[1]
    kept = is_text | padding
    room = min(-(-int(kept.sum(1).max()) // TEXT_BUCKET) * TEXT_BUCKET, length)
    images = int(is_image.sum(1).max())
    order = torch.argsort(torch.where(is_text, 0, torch.where(padding, 1, 2)), dim=1, stable=True)
    image_order = torch.argsort(~is_image, dim=1, stable=True)
    place = torch.arange(room)
    text = place < is_text.sum(1)[:, None]
    image = torch.arange(images) < is_image.sum(1)[:, None]
    keys = torch.cat([place < kept.sum(1)[:, None], image], dim=1)
    return order[:, :room], image_order[:, :images], text, image, keys
