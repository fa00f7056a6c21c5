"""The SigLIP vision tower: all images of a batch, of all cameras, in one call.

Source: Zhai et al., 2023 (arXiv 2303.15343); the layout of its public So400m/14 checkpoints. Shape legend: n images, y
and x pixels, p tokens of an image (its patches), v width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from loong_core.ops import Ops


class Block(nn.Module):
    """One pre-norm transformer block with full attention inside each image: [n,p,v] -> [n,p,v]."""

    def __init__(self, fields: Mapping[str, Any], ops: Ops) -> None:
        super().__init__()
        width, inner, epsilon = fields["vision_hidden"], fields["vision_ffn"], fields["vision_norm_epsilon"]
        self.heads = fields["vision_heads"]
        self.ops = ops
        self.attn = nn.ModuleDict(
            {
                "norm": nn.LayerNorm(width, epsilon),
                "qkv": nn.Linear(width, 3 * width),
                "out": nn.Linear(width, width),
            }
        )
        self.mlp = nn.ModuleDict(
            {"norm": nn.LayerNorm(width, epsilon), "up": nn.Linear(width, inner), "down": nn.Linear(inner, width)}
        )

    def forward(self, hidden: Tensor) -> Tensor:
        images, patches, width = hidden.shape
        normed, hidden = self._normed(self.attn["norm"], hidden)
        mixed = self._product(self.attn["qkv"], normed)
        # Heads stay behind the patches, where kernels read and write them: nothing is copied, either way.
        parts = mixed.view(images, patches, 3, self.heads, -1).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in parts)
        seen = functional.scaled_dot_product_attention(query, key, value)
        hidden = hidden + self._product(self.attn["out"], seen.transpose(1, 2).reshape(images, patches, width))
        normed, hidden = self._normed(self.mlp["norm"], hidden)
        up = self.mlp["up"]
        inner = self.ops.linear_gelu(normed, up.weight, up.bias)  # type: ignore[arg-type]
        return hidden + self._product(self.mlp["down"], inner)

    def _normed(self, norm: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The normed rows, and `hidden` for their branch to be added to."""
        return self.ops.residual_layer_norm(hidden, norm.weight, norm.bias, norm.eps)  # type: ignore[arg-type]

    def _product(self, layer: nn.Module, x: Tensor) -> Tensor:
        return self.ops.linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]


class Siglip(nn.Module):
    """Images [n,y,x,3], uint8 or floating point in [-1, 1], -> [n,p,v]; no pooling head."""

    def __init__(self, fields: Mapping[str, Any], ops: Ops) -> None:
        super().__init__()
        width, self.patch_size = fields["vision_hidden"], fields["patch"]
        self.patch = nn.Conv2d(3, width, self.patch_size, self.patch_size)
        self.positions = nn.Embedding((fields["image_size"] // self.patch_size) ** 2, width)
        self.layers = nn.ModuleList(Block(fields, ops) for _ in range(fields["vision_layers"]))
        self.norm = nn.LayerNorm(width, fields["vision_norm_epsilon"])
        self.ops = ops

    def forward(self, images: Tensor) -> Tensor:
        weight = self.patch.weight.flatten(1)
        patches = normalised(patchified(images, self.patch_size), weight.dtype)
        hidden = functional.linear(patches, weight, self.patch.bias) + self.positions.weight
        for layer in self.layers:
            hidden = layer(hidden)
        return self.ops.layer_norm(hidden, self.norm.weight, self.norm.bias, self.norm.eps)


def patchified(images: Tensor, size: int) -> Tensor:
    """Images [n,y,x,3] -> [n, patches, 3*size*size], each patch laid out as a convolution's weight [3,size,size]."""
    n, height, width, channels = images.shape
    grid = images.reshape(n, height // size, size, width // size, size, channels)
    return grid.permute(0, 1, 3, 5, 2, 4).reshape(n, -1, channels * size * size)


def normalised(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels as the tower was trained on them: bytes become [-1, 1]; what is floating point already is."""
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 127.5 - 1.0
    return pixels.to(dtype)
