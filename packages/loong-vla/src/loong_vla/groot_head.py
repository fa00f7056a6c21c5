"""GR00T's action head: a diffusion transformer over one state and a chunk of noisy actions, looking at text and images.

Everything that depends on the observation alone is computed once: keys and values of all blocks that read text come
from one matrix product over the text rows, those of the others from one over the image rows, and the modulations of all
norms from one product with the time embedding. Nothing is masked that can be left out.

Sources: GR00T N1 (arXiv 2503.14734) and its public implementations; DiT (arXiv 2212.09748). Shape legend: b batch, s
rows (state, then h actions), n width of the transformer, k rows of text or images, f width of the backbone's features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from loong_core.ops import Ops
from loong_vla.groot_blocks import Block, attend, split, twice
from loong_vla.groot_parameters import cross_blocks

EPSILON = 1e-5
"""Of the layer norms in blocks."""


class Memory(NamedTuple):
    """Of every block that reads text (or images): keys and values [blocks] of ([b,k,h,d], [b,k,h,d]), and which rows of
    them are seen, [b,k] (None: all)."""

    pairs: list[tuple[Tensor, Tensor]]
    seen: Tensor | None


class Refiner(nn.Module):
    """Blocks over the backbone's features [b,k,f], text and images together, before the transformer reads them."""

    norm: Tensor
    norm_bias: Tensor

    def __init__(self, fields: Mapping[str, Any], ops: Ops) -> None:
        super().__init__()
        rate = fields["refiner_dropout"] if fields["tune_vlln"] else 0.0
        self.ops = ops
        self.layers = nn.ModuleList(
            Block(ops, fields["refiner_heads"], EPSILON, rate) for _ in range(fields["refiner_layers"])
        )

    def forward(self, features: Tensor, keys: Tensor | None) -> Tensor:
        x = self.ops.layer_norm(features, self.norm, self.norm_bias, EPSILON)
        for layer in self.layers:
            x = layer(x, None, keys)
        return x


class DiffusionBlock(nn.Module):
    """One block: x [b,s,n] -> [b,s,n]. Even ones look at a memory, odd ones at x itself."""

    q: Tensor
    q_bias: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    out_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor

    def __init__(self, heads: int, dropout: float, ops: Ops) -> None:
        super().__init__()
        self.heads, self.dropout, self.ops = heads, dropout, ops

    def forward(
        self,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        pair: tuple[Tensor, Tensor] | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """`scale` and `shift` [b,n] are those of the first norm; `pair` is the memory of an even block."""
        linear, rate = self.ops.linear, self.dropout if self.training else 0.0
        normal = self.ops.layer_norm_modulate(x, scale, shift, EPSILON)
        if pair is None:
            query, key, value = split(linear(normal, self.qkv, self.qkv_bias), 3, self.heads).unbind(2)
        else:
            query = split(linear(normal, self.q, self.q_bias), 1, self.heads)[:, :, 0]
            key, value = pair
        found = attend(query, key, value, seen)
        x = self.ops.dropout_add(linear(found, self.out, self.out_bias), x, twice(rate))
        normal, x = self.ops.residual_layer_norm(x, None, None, EPSILON)
        inner = self.ops.linear_gelu(normal, self.up, self.up_bias, dropout=rate)
        return self.ops.dropout_add(linear(inner, self.down, self.down_bias), x, rate)


class Diffusion(nn.Module):
    """The transformer: rows [b,s,n] at time bucket [b], with memories of text and images -> [b,s,out]."""

    time_in: Tensor
    time_in_bias: Tensor
    time_out: Tensor
    time_out_bias: Tensor
    modulation: Tensor
    modulation_bias: Tensor
    text_kv: Tensor
    text_kv_bias: Tensor
    image_kv: Tensor
    image_kv_bias: Tensor
    out: Tensor
    out_bias: Tensor

    def __init__(self, fields: Mapping[str, Any], ops: Ops) -> None:
        super().__init__()
        rate = fields["dropout"] if fields["tune_diffusion"] else 0.0
        self.ops = ops
        self.heads, self.waves = fields["dit_heads"], fields["time_waves"]
        self.text_blocks = set(cross_blocks(fields)[0])
        self.layers = nn.ModuleList(DiffusionBlock(self.heads, rate, ops) for _ in range(fields["dit_layers"]))

    def remember(
        self, text: Tensor, images: Tensor, text_seen: Tensor | None, images_seen: Tensor | None
    ) -> list[Memory]:
        """Memories of text [b,k,f] and of images: one matrix product each, for all blocks that read them."""
        return [
            Memory(self._pairs(self.ops.linear(text, self.text_kv, self.text_kv_bias)), text_seen),
            Memory(self._pairs(self.ops.linear(images, self.image_kv, self.image_kv_bias)), images_seen),
        ]

    def forward(self, x: Tensor, memories: Sequence[Memory], bucket: Tensor) -> Tensor:
        width = x.shape[-1]
        time = functional.silu(self._time(bucket, x.dtype))
        modulation = self.ops.linear(time, self.modulation, self.modulation_bias)
        scales = paired(modulation.view(x.shape[0], -1, width).unbind(1))
        text, images = (iter(memory.pairs) for memory in memories)
        for index, layer in enumerate(self.layers):
            scale, shift = scales[index]
            if index % 2:
                x = layer(x, scale, shift)
            elif index in self.text_blocks:
                x = layer(x, scale, shift, next(text), memories[0].seen)
            else:
                x = layer(x, scale, shift, next(images), memories[1].seen)
        shift, scale = scales[-1]  # the last one is stored the other way round
        return self.ops.linear(self.ops.layer_norm_modulate(x, scale, shift, 1e-6), self.out, self.out_bias)

    def _time(self, bucket: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.waves // 2
        rates = torch.exp(torch.arange(half, device=bucket.device) * (-math.log(10000.0) / (half - 1)))
        phase = bucket[:, None].float() * rates
        waves = torch.cat((phase.cos(), phase.sin()), dim=1).to(dtype)
        inner = functional.silu(self.ops.linear(waves, self.time_in, self.time_in_bias))
        return self.ops.linear(inner, self.time_out, self.time_out_bias)

    def _pairs(self, mixed: Tensor) -> list[tuple[Tensor, Tensor]]:
        return paired(split(mixed, mixed.shape[-1] // self.out.shape[1], self.heads).unbind(2))


def paired(parts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Neighbours, two by two. Of one `unbind`, so that backward puts all their gradients together at once."""
    return list(zip(parts[::2], parts[1::2], strict=True))


class Slot(nn.Module):
    """The layers of one embodiment, without a forward of their own (`Embodiments`)."""


class Embodiments(nn.ModuleList):
    """Layers of which every embodiment has its own; a batch may mix those in `used`.

    With one embodiment a layer is a plain matrix product. With several, each sample's weight is picked by a product
    with a one-hot matrix, whose gradient needs no scattered additions.
    """

    def __init__(self, slots: int, used: Sequence[int]) -> None:
        super().__init__(Slot() for _ in range(slots))
        self.used = tuple(used)

    def apply_layer(self, part: str, x: Tensor, choice: Tensor) -> Tensor:
        """Layer `part` of each sample's embodiment: x [b,s,i] -> [b,s,o]; choice [b] are places in `used`."""
        weights = [getattr(self[slot], part) for slot in self.used]
        biases = [getattr(self[slot], f"{part}_bias") for slot in self.used]
        if len(weights) == 1:
            return functional.linear(x, weights[0].t(), biases[0])
        pick = functional.one_hot(choice, len(weights)).to(x.dtype)
        weight = (pick @ torch.stack(weights).flatten(1)).view(-1, *weights[0].shape)
        return torch.baddbmm((pick @ torch.stack(biases))[:, None], x, weight)


def sinusoids(bucket: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Sines, then cosines of bucket [b], as the actions see time: [b,1,width]."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=bucket.device) * (-math.log(10000.0) / half))
    phase = bucket[:, None, None].float() * rates
    return torch.cat((phase.sin(), phase.cos()), dim=-1).to(dtype)
