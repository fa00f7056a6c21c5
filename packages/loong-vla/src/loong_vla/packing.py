"""Cuts padding out of a batch before the model sees it: which rows exist, in which order, as index tensors.

A policy's prefix (image tokens, then prompt tokens) differs in length from sample to sample: cameras are absent,
prompts are short. Everything a model needs to compute on real rows alone is worked out here, on the CPU, so that the
device is never asked how many there are. Nothing is duplicated and nothing is invented: rows are a permutation of
existing ones, and what fills up a length to its bucket are some of the padding rows themselves.

Shape legend: b samples, c cameras, p tokens of an image, l prompt tokens, h action tokens; n images and t prompt tokens
that are computed, r = n*p + t rows of the packed prefix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loong_core.train.engine import Batch

PREFIX = "pack_"
"""What the names of the tensors begin with that `pack` adds to a batch."""


class Packing(NamedTuple):
    """The order of a batch's rows. Sequence i < b is sample i, sequence b + i what padding of it is computed.

    `images` [n] are positions among the b*c images, `tokens` [t] among the b*l prompt tokens. Row k of the packed
    prefix is row `rows[k]` of (image tokens, then prompt tokens), [r]; `rows_back` is the inverse permutation.
    `positions` [r] count from 0 in each sequence, `suffix_positions` [b,h] go on from there. `offsets` [2b+1] are where
    the sequences of the prefix begin. `joint` [r + b*h] orders (prefix, then suffix) rows so that each sample's prefix
    is followed by its suffix; `joint_offsets` and `suffix_offsets` [2b+1] say where; padding has no suffix. Offsets
    are int32, the rest int64.
    """

    images: Tensor
    tokens: Tensor
    rows: Tensor
    rows_back: Tensor
    positions: Tensor
    suffix_positions: Tensor
    offsets: Tensor
    suffix_offsets: Tensor
    joint: Tensor
    joint_back: Tensor
    joint_offsets: Tensor


def pack(
    batch: Batch, image_tokens: int, *, skip_padding: bool = True, image_bucket: int = 1, token_bucket: int = 32
) -> dict[str, Tensor]:
    """The `Packing` of a batch as tensors to add to it, named `pack_images` and so on, on the batch's device.

    With `skip_padding`, absent cameras and prompt padding are left out, as far as the numbers of images and of prompt
    tokens, over the whole batch, are multiples of the buckets; without it every row is computed. Both give the same
    result, because a padding row is nobody's key. Reads `camera_mask` [b,c], `token_mask` [b,l] and the shape of
    `actions` or `noise` [b,h,a]; on a device other than the CPU this waits for the masks.
    """
    cameras, valid = batch["camera_mask"], batch["token_mask"]
    device, horizon = valid.device, (batch["noise"] if "noise" in batch else batch["actions"]).shape[1]
    found = arrange(
        cameras.cpu(),
        valid.cpu(),
        image_tokens,
        horizon,
        image_bucket if skip_padding else cameras.numel(),
        token_bucket if skip_padding else valid.numel(),
    )
    return {PREFIX + name: part.to(device) for name, part in found._asdict().items()}


def packing_of(batch: Batch) -> Packing | None:
    """The packing that a batch carries, if it does."""
    if PREFIX + "rows" not in batch:
        return None
    return Packing(**{name: batch[PREFIX + name] for name in Packing._fields})


def arrange(
    cameras: Tensor, valid: Tensor, image_tokens: int, horizon: int, image_bucket: int, token_bucket: int
) -> Packing:
    """As `pack`, from masks on the CPU: cameras [b,c] bool, valid [b,l] bool."""
    samples = cameras.shape[0]
    images, image_owner = _chosen(cameras, image_bucket)
    tokens, token_owner = _chosen(valid, token_bucket)
    owner = torch.cat([image_owner.repeat_interleave(image_tokens), token_owner])
    rows = torch.argsort(owner, stable=True)
    lengths = torch.bincount(owner, minlength=2 * samples)
    offsets = _offsets(lengths)
    sequence = owner[rows]
    positions = torch.arange(len(rows)) - offsets[sequence]
    suffix_positions = lengths[:samples, None] + torch.arange(horizon)
    # A sample's suffix stands behind its prefix because the sort is stable. Padding stays in sequences, of no queries:
    # kernels leave the gradients of keys outside of sequences as they find them in memory.
    joint_owner = torch.cat([sequence, torch.arange(samples).repeat_interleave(horizon)])
    joint = torch.argsort(joint_owner, stable=True)
    return Packing(
        images=images,
        tokens=tokens,
        rows=rows,
        rows_back=torch.argsort(rows),
        positions=positions,
        suffix_positions=suffix_positions,
        offsets=offsets.int(),
        suffix_offsets=torch.arange(2 * samples + 1, dtype=torch.int32).clamp(max=samples) * horizon,
        joint=joint,
        joint_back=torch.argsort(joint),
        joint_offsets=_offsets(torch.bincount(joint_owner, minlength=2 * samples)).int(),
    )


def _chosen(mask: Tensor, bucket: int) -> tuple[Tensor, Tensor]:
    """Which elements of mask [b,x] are computed, true ones first, and the sequence each belongs to."""
    samples, width = mask.shape
    count = min(-(-int(mask.sum()) // bucket) * bucket, mask.numel())
    chosen = torch.argsort(~mask.flatten(), stable=True)[:count]
    sample = chosen // width
    return chosen, torch.where(mask.flatten()[chosen], sample, sample + samples)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


class _Permuted(torch.autograd.Function):
    """Rows in another order. Its gradient is a gather too, where torch would scatter with atomic additions."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, back: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (back,) = ctx.saved_tensors
        return gradient.index_select(0, back), None, None


def permuted(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """x [r, ...] -> x[order], where `back` is the inverse of the permutation `order`."""
    result: Tensor = _Permuted.apply(x, order, back)
    return result
