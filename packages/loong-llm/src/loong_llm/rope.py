"""Rotary angles as data: they follow the positions in the batch, so packing and context parallelism need no code here.

Inverse frequencies are computed in float32 by the formulas that public checkpoints were trained with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def _plain(fields: Mapping[str, Any]) -> Tensor:
    exponents = torch.arange(0, fields["head_dim"], 2, dtype=torch.float32, device="cpu") / fields["head_dim"]
    return 1.0 / (fields["rope_base"] ** exponents)


def _linear(fields: Mapping[str, Any]) -> Tensor:
    return _plain(fields) / fields["rope_factor"]


def _llama3(fields: Mapping[str, Any]) -> Tensor:
    frequencies = _plain(fields)
    factor, low, high = (fields[name] for name in ("rope_factor", "rope_low_frequency", "rope_high_frequency"))
    original = fields["rope_original_positions"]
    wavelengths = 2 * math.pi / frequencies
    long, short = wavelengths > original / low, wavelengths < original / high
    stretched = torch.where(long, frequencies / factor, frequencies)
    blend = (original / wavelengths - low) / (high - low)
    between = (1 - blend) * stretched / factor + blend * stretched
    return torch.where(long | short, stretched, between)


_FORMULAS = {"default": _plain, "linear": _linear, "llama3": _llama3}


def inverse_frequencies(fields: Mapping[str, Any]) -> Tensor:
    """[head_dim / 2] float32 on the CPU, in radians per position.

    Source: RoFormer (arXiv 2104.09864) for `default`, position interpolation (arXiv 2306.15595) for `linear`, the
    Llama 3.1 release for `llama3`; the numbers are those of `transformers.modeling_rope_utils`.
    """
    return _FORMULAS[fields["rope_type"]](fields)


class RotaryAngles(nn.Module):
    """Angles of every token of a batch, in the form megatron-core's attention takes them."""

    inverse_frequencies: Tensor

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        # Not a checkpoint entry, and kept out of bf16 conversions of parameters and buffers by `forward`.
        self.register_buffer("inverse_frequencies", inverse_frequencies(fields), persistent=False)
        self._fields = dict(fields)

    def forward(self, positions: Tensor) -> Tensor:
        """positions [batch, sequence] integers -> angles [sequence, batch, 1, head_dim] float32, both halves equal."""
        frequencies = self.inverse_frequencies
        if frequencies.dtype != torch.float32:  # somebody called `module.bfloat16()`: rounded angles are wrong angles
            frequencies = inverse_frequencies(self._fields).to(positions.device)
            self.inverse_frequencies = frequencies
        angles = positions.transpose(0, 1)[..., None].float() * frequencies
        return torch.cat((angles, angles), dim=-1)[:, :, None, :]
