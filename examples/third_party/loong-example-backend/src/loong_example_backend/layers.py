"""Layers of the example chip: those in plain torch, with a norm that hands the chip as many rows as it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from loong_core.parallel.torch_layers import TorchLayerProvider
from loong_example_backend.device import ROWS


class BlockNorm(torch.nn.Module):
    """Put before a norm in the order of bases: the same norm, block of rows by block of rows."""

    def forward(self, x: Tensor) -> Tensor:
        """[sequence, ..., hidden] -> the same shape and dtype."""
        return torch.cat([super(BlockNorm, self).forward(rows) for rows in x.split(ROWS)])


class ExampleLayerProvider(TorchLayerProvider):
    """As `TorchLayerProvider`, with the chip's norm."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        """The norm of this run's ops, in blocks."""
        return type("BlockNorm", (BlockNorm, super().layer_norm(rms_norm, for_qk, has_residual)), {})
