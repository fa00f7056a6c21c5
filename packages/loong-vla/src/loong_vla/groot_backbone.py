"""GR00T's eyes and reading: the vision tower over all cameras at once, and the lower layers of a language model.

Both are frozen in ordinary fine-tuning. Images have one size, so the tower is a plain batch [images, patches, width]
with one attention call a layer and tables computed once for that size; nothing asks the device for a number. No head
over words is computed. Sources: Qwen3-VL (arXiv 2511.21631) and its public implementation; DeepStack (arXiv
2406.04334).

Shape legend: i images, y and x pixels, p patches of an image, t tokens of it (2x2 patches each), v width of the tower,
n width of the language model, l rows of text, b batch, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from loong_core.ops import Ops
from loong_vla.groot_blocks import Block, norm

EPSILON = 1e-6
"""Of the tower's layer norms."""


def normalised(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images [i,y,x,3] as the towers were trained on them: bytes become [-1, 1]; floating point already is."""
    if images.dtype == torch.uint8:
        images = images.float() / 127.5 - 1.0
    return images.to(dtype)


def patchified(images: Tensor, size: int, merge: int) -> Tensor:
    """[i,y,x,3] -> [i,p,3,size,size], the merge x merge patches of a token one after the other."""
    count, height, width, _ = images.shape
    unit = size * merge
    grid = images.view(count, height // unit, merge, size, width // unit, merge, size, 3)
    return grid.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(count, -1, 3, size, size)


def token_major(table: Tensor, merge: int) -> Tensor:
    """A table over the grid of patches [rows, columns, ...] in the order of `patchified`: [p, ...]."""
    rows, columns = table.shape[:2]
    grid = table.view(rows // merge, merge, columns // merge, merge, *table.shape[2:])
    return grid.transpose(1, 2).flatten(0, 3)


class Tables(NamedTuple):
    """Of one image size: which learned positions make that of a patch ([4,p]) with which weights ([4,p,1]), and how far
    the heads of every patch turn, [1,p,1,d] in radians."""

    corners: Tensor
    shares: Tensor
    angles: Tensor


class QwenTower(nn.Module):
    """Qwen3-VL's vision tower: images [i,y,x,3] -> tokens [i,t,n] and, of some layers, more of them for DeepStack."""

    patch: Tensor
    patch_bias: Tensor
    positions: Tensor

    def __init__(self, fields: Mapping[str, Any], ops: Ops) -> None:
        super().__init__()
        self.size, self.merge, self.frames = fields["patch"], fields["merge"], fields["patch_frames"]
        self.head_dim = fields["vision_hidden"] // fields["vision_heads"]
        self.side = round(fields["vision_positions"] ** 0.5)
        self.taps = {layer: index for index, layer in enumerate(fields["deepstack"])}
        self.layers = nn.ModuleList(Block(ops, fields["vision_heads"], EPSILON) for _ in range(fields["vision_layers"]))
        self.merger = Merger(norm_first=True)
        self.deep = nn.ModuleList(Merger(norm_first=False) for _ in self.taps)
        self._tables: dict[tuple[int, int, torch.device], Tables] = {}

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        tables = self._tables_of(images.shape[1], images.shape[2], images.device)
        patches = patchified(normalised(images, self.patch.dtype), self.size, self.merge)
        # A still image is a film of equal frames.
        patches = patches.unsqueeze(3).expand(-1, -1, -1, self.frames, -1, -1).flatten(2)
        x = functional.linear(patches, self.patch.flatten(1), self.patch_bias)
        x = x + (self.positions[tables.corners].float() * tables.shares).sum(0).to(x.dtype)
        deep: list[Tensor] = [x] * len(self.taps)
        for index, layer in enumerate(self.layers):
            x = layer(x, tables.angles)
            if index in self.taps:
                tap = self.taps[index]
                deep[tap] = self.deep[tap](x, self.merge**2)
        return self.merger(x, self.merge**2), deep

    def _tables_of(self, height: int, width: int, device: torch.device) -> Tables:
        key = (height, width, device)
        if key not in self._tables:
            made = self._make_tables(height // self.size, width // self.size)
            self._tables[key] = Tables(*(part.to(device) for part in made))
        return self._tables[key]

    def _make_tables(self, rows: int, columns: int) -> Tables:
        """Learned positions are a square grid, resized bilinearly with aligned corners; rotation is by row and column,
        half of the pairs each."""
        row, column = torch.linspace(0, self.side - 1, rows), torch.linspace(0, self.side - 1, columns)
        top, left = row.int(), column.int()
        down, right = row - top, column - left
        below, beside = (top + 1).clamp(max=self.side - 1), (left + 1).clamp(max=self.side - 1)
        corners = [(y.long()[:, None] * self.side + x.long()) for y in (top, below) for x in (left, beside)]
        shares = [y[:, None] * x for y in (1 - down, down) for x in (1 - right, right)]
        frequencies = 10000.0 ** -(torch.arange(0, self.head_dim // 2, 2).float() / (self.head_dim // 2))
        turns = torch.cat(
            [
                (torch.arange(rows)[:, None, None] * frequencies).expand(rows, columns, -1),
                (torch.arange(columns)[:, None] * frequencies).expand(rows, columns, -1),
            ],
            dim=-1,
        )
        turns = token_major(turns.repeat(1, 1, 2), self.merge)
        corner, share = (token_major(torch.stack(part, -1), self.merge).t() for part in (corners, shares))
        return Tables(corner.contiguous(), share[..., None].contiguous(), turns[None, :, None])


class Merger(nn.Module):
    """The 2x2 patches of a token become one row of the language model: [i,p,v] -> [i,t,n]."""

    norm: Tensor
    norm_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first

    def forward(self, x: Tensor, patches: int) -> Tensor:
        merged = (x.shape[0], x.shape[1] // patches, x.shape[2] * patches)
        if self.norm_first:
            x = norm(x, self.norm, self.norm_bias, EPSILON).view(merged)
        else:
            x = norm(x.view(merged), self.norm, self.norm_bias, EPSILON)
        inner = functional.gelu(functional.linear(x, self.up, self.up_bias))
        return functional.linear(inner, self.down, self.down_bias)


class Language(nn.Module):
    """Qwen3's decoder layers over rows [l,b,n], and its final norm where the policy reads behind it.

    `deep` are added to rows of images after the first layers: each [l,b,n], zero elsewhere. Layers below
    `first_trained` are computed without gradients.
    """

    norm: Tensor

    def __init__(self, fields: Mapping[str, Any], ops: Ops, first_trained: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LanguageLayer(fields, ops) for _ in range(fields["layers"]))
        self.first_trained = first_trained
        self.final_norm = fields["final_norm"]
        self.epsilon, self.rms_norm = fields["norm_epsilon"], ops.rms_norm

    def forward(self, x: Tensor, angles: Tensor, real: Tensor | None, deep: Sequence[Tensor]) -> Tensor:
        return self.trained(self.frozen(x, angles, real, deep), angles, real, deep)

    @torch.no_grad()
    def frozen(self, x: Tensor, angles: Tensor, real: Tensor | None, deep: Sequence[Tensor]) -> Tensor:
        """The layers below `first_trained`."""
        return self._through(range(self.first_trained), x, angles, real, deep)

    def trained(self, x: Tensor, angles: Tensor, real: Tensor | None, deep: Sequence[Tensor] = ()) -> Tensor:
        """The other layers, and the final norm."""
        x = self._through(range(self.first_trained, len(self.layers)), x, angles, real, deep)
        return self.rms_norm(x, self.norm, self.epsilon) if self.final_norm else x

    def _through(self, layers: range, x: Tensor, angles: Tensor, real: Tensor | None, deep: Sequence[Tensor]) -> Tensor:
        for index in layers:
            x = self.layers[index](x, angles, real)
            if index < len(deep):
                x = x + deep[index]
        return x


class LanguageLayer(nn.Module):
    """One layer: x [l,b,n], angles [l,b,1,d] in radians -> [l,b,n]. Where `real` [l,b,1] is 0, attention gives 0."""

    norm1: Tensor
    qkv: Tensor
    q_norm: Tensor
    k_norm: Tensor
    out: Tensor
    norm2: Tensor
    up: Tensor
    down: Tensor

    def __init__(self, fields: Mapping[str, Any], ops: Ops) -> None:
        super().__init__()
        self.ops, self.epsilon = ops, fields["norm_epsilon"]
        self.head_dim, self.groups = fields["head_dim"], fields["kv_heads"]

    def forward(self, x: Tensor, angles: Tensor, real: Tensor | None) -> Tensor:
        ops, (rows, batch, _) = self.ops, x.shape
        normal, x = ops.residual_rms_norm(x, self.norm1, self.epsilon)
        mixed = ops.linear(normal, self.qkv)
        mixed = mixed.view(rows, batch, self.groups, -1, self.head_dim)
        query, key, value = ops.rotary_qkv(mixed, angles, self.q_norm, self.k_norm, self.epsilon)
        seen = ops.attention(query, key, value, scale=self.head_dim**-0.5)
        if real is not None:
            seen = seen * real
        x = x + ops.linear(seen, self.out)
        normal, x = ops.residual_rms_norm(x, self.norm2, self.epsilon)
        return x + ops.gated_mlp(normal, self.up, self.down)


def rotary_angles(positions: Tensor, size: int, base: float, sections: Sequence[int] | None) -> Tensor:
    """Angles [l,b,1,size] float32 of positions [3,l,b] (time, row, column), both halves equal.

    With `sections`, pairs take turns: pair j is turned by time, row, column for j mod 3 = 0, 1, 2 as far as the section
    of row and column reach, the rest by time. Without, all by time. Source: Qwen3-VL's interleaved MRoPE.
    """
    axis, frequencies = _frequencies(size, base, None if sections is None else tuple(sections), positions.device)
    angles = positions.permute(1, 2, 0)[..., axis].float() * frequencies
    return torch.cat((angles, angles), dim=-1).unsqueeze(2)


@cache
def _frequencies(
    size: int, base: float, sections: tuple[int, ...] | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of each pair: which of the three positions turns it, and how fast. Kept, so that no step copies to the device."""
    pairs = torch.arange(size // 2)
    axis = torch.zeros_like(pairs)
    for which in (1, 2) if sections is not None else ():
        axis[which : sections[which] * 3 : 3] = which  # type: ignore[index]
    return axis.to(device), (base ** -(pairs.float() * 2 / size)).to(device)
