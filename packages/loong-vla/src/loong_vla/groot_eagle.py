"""The vision tower of GR00T N1.6 (Eagle 3): SigLIP 2, and a projector that takes four patches at a time.

All images in one plain batch. The public implementation lays all images of a batch into one sequence and relies on
attention kernels for packed sequences to keep them apart. Sources: SigLIP 2 (arXiv 2502.14786), Eagle 2.5 (arXiv
2504.15271) and the public implementation in Isaac-GR00T. Shape legend: i images, y and x pixels, p patches, t tokens
(2x2 patches each), v width of the tower, n width of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as functional
from torch import Tensor, nn

from loong_core.ops import Ops
from loong_vla.groot_backbone import EPSILON, normalised, patchified, token_major
from loong_vla.groot_blocks import Block, norm


class EagleTower(nn.Module):
    """Images [i,y,x,3] -> tokens [i,t,n]; nothing for DeepStack."""

    patch: Tensor
    patch_bias: Tensor
    positions: Tensor
    norm: Tensor
    norm_bias: Tensor

    def __init__(self, fields: Mapping[str, Any], ops: Ops) -> None:
        super().__init__()
        self.size, self.merge = fields["patch"], fields["merge"]
        self.side = round(fields["vision_positions"] ** 0.5)
        self.layers = nn.ModuleList(Block(ops, fields["vision_heads"], EPSILON) for _ in range(fields["vision_layers"]))
        self.merger = Projector()

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        patches = patchified(normalised(images, self.patch.dtype), self.size, self.merge)
        # Patches are stored pixel by pixel, colours last.
        x = functional.linear(patches.permute(0, 1, 3, 4, 2).flatten(2), self.patch, self.patch_bias)
        x = x + self._positions(images.shape[1] // self.size, images.shape[2] // self.size)
        for layer in self.layers:
            x = layer(x)
        return self.merger(norm(x, self.norm, self.norm_bias, EPSILON), self.merge**2), []

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The learned grid of positions, resized to the image's: [p,v]."""
        grid = self.positions.view(self.side, self.side, -1)
        if (rows, columns) != (self.side, self.side):
            resized = functional.interpolate(
                grid.float().permute(2, 0, 1)[None], (rows, columns), mode="bilinear", antialias=True
            )
            grid = resized[0].permute(1, 2, 0).to(grid.dtype)
        return token_major(grid, self.merge)


class Projector(nn.Module):
    """Four patches become one row of the language model: [i,p,v] -> [i,t,n]."""

    norm: Tensor
    norm_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor

    def forward(self, x: Tensor, patches: int) -> Tensor:
        count, rows, width = x.shape
        # The four values of a channel lie together, as after torch's pixel_unshuffle.
        merged = x.view(count, rows // patches, patches, width).transpose(2, 3).flatten(2)
        inner = functional.linear(norm(merged, self.norm, self.norm_bias, 1e-5), self.up, self.up_bias)
        return functional.linear(functional.gelu(inner), self.down, self.down_bias)
