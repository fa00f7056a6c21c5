"""The module behind `loong_core.testing.decoder`: its parameters are made uninitialised, in the policy's dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from loong_core.parallel.build import BuildContext
from loong_core.train.engine import Batch, LocalParameter
from loong_core.types import ModelShape


def build(shape: ModelShape, context: BuildContext) -> list[nn.Module]:
    """The whole model in one module."""
    return [Decoder(shape, context)]


def _empty(context: BuildContext, *sizes: int, dtype: torch.dtype | None = None, trained: bool = True) -> nn.Parameter:
    dtype = dtype or getattr(torch, context.precision.parameters)
    return nn.Parameter(torch.empty(*sizes, dtype=dtype, device=context.device), requires_grad=trained)


class Layer(nn.Module):
    """x [b,s,n] -> [b,s,n]: causal attention with dropout, and a GELU of odd width."""

    def __init__(self, width: int, heads: int, context: BuildContext) -> None:
        super().__init__()
        self.heads, self.dropout = heads, context.dropout
        self.norm = _empty(context, width)
        self.qkv = _empty(context, 3 * width, width)
        self.up = nn.Linear(width, 2 * width + 1, device="meta")
        self.up.weight, self.up.bias = _empty(context, 2 * width + 1, width), _empty(context, 2 * width + 1)
        self.down = _empty(context, width, 2 * width + 1)

    def forward(self, x: Tensor) -> Tensor:
        mixed = functional.linear(functional.rms_norm(x, x.shape[-1:], self.norm), self.qkv)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in mixed.chunk(3, -1))
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + functional.dropout(seen, self.dropout, self.training)
        return x + functional.linear(functional.gelu(self.up(x)), self.down)


class Decoder(nn.Module):
    """The whole model; see `loong_core.testing.decoder` for what is special in it."""

    def __init__(self, shape: ModelShape, context: BuildContext) -> None:
        super().__init__()
        self.shape, width = shape, shape.hidden
        self.embed = _empty(context, shape.vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, shape.fields["heads"], context) for _ in range(shape.layers))
        self.head = self.embed
        self.memory = _empty(context, 5, width, trained=False)
        self.idle = _empty(context, 7, width)
        self.scale = _empty(context, width, dtype=torch.float32)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [b,s,vocabulary] in float32."""
        x = functional.embedding(batch["tokens"], self.embed) + self.memory.sum(0)
        for layer in self.layers:
            x = layer(x)
        x = (functional.rms_norm(x.float(), x.shape[-1:]) * self.scale).to(x.dtype)
        return functional.linear(x, self.head).float()

    def units(self) -> list[nn.Module]:
        """The layers."""
        return list(self.layers)

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def local_parameters(self) -> Iterator[LocalParameter]:
        """Every described parameter; queries, keys and values are parts of one tensor."""
        specs = {spec.role: spec for spec in self.shape.parameters}
        width = self.shape.hidden
        for name, parameter in self.named_parameters():
            role = name.replace("up.weight", "up").replace("up.bias", "up_bias")
            if not role.endswith("qkv"):
                yield LocalParameter(specs[role], parameter)
                continue
            for index, part in enumerate("qkv"):
                view = parameter.detach()[index * width : (index + 1) * width]
                spec = specs[role.removesuffix("qkv") + part]
                yield LocalParameter(spec, view, owner=parameter, offset=index * width * width)
