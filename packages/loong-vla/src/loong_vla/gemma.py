"""One layer of two transformers that attend together: the prefix (Gemma 2B) and the action expert (Gemma 300M).

Each has weights of its own. Prefix rows see the prefix of their sample; suffix rows see it and all of their suffix. So
the prefix never depends on the suffix, and both attend without a mask. The expert's norms are adaptive: what scales,
shifts and gates them is made of the time of the flow.

Sources: Gemma (arXiv 2403.08295); pi0.5 (arXiv 2504.16054) and its public PyTorch implementations; adaptive norms after
DiT (arXiv 2212.09748). Shape legend: r rows of the packed prefix, b samples, h suffix tokens of each, w width of the
prefix, e of the expert, g key-value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loong_core.ops import Ops
from loong_vla.packing import Packing, permuted


class Rows(NamedTuple):
    """Where rows lie, and how far their heads turn: angles [r,1,d] and [b*h,1,d], float32 in radians. `longest` are
    bounds on the length of a sample's prefix, of its suffix, and of both."""

    packing: Packing
    prefix_angles: Tensor
    suffix_angles: Tensor
    longest: tuple[int, int, int]


class Memory(NamedTuple):
    """Keys and values of the prefix in one layer, [r,g,d] each: all that the suffix sees of it."""

    keys: Tensor
    values: Tensor


class JointLayer(nn.Module):
    """A layer of both. In the last one the prefix has only keys and values: nothing reads what it would go on to."""

    def __init__(self, fields: Mapping[str, Any], ops: Ops, last: bool) -> None:
        super().__init__()
        self.prefix = PrefixLast(fields, ops) if last else PrefixLayer(fields, ops)
        self.expert = ExpertLayer(fields, ops)

    def forward(
        self,
        prefix: Tensor,
        suffix: Tensor | None,
        condition: Tensor | None,
        rows: Rows,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Tensor | None, Memory]:
        """prefix [r,w], suffix [b,h,e], condition [b,e] -> the first two after this layer, and the prefix's memory.

        With a `memory` the prefix is not computed again; without a suffix only the prefix is.
        """
        if memory is None:
            prefix, memory = self.prefix(prefix, rows)
        if suffix is not None:
            suffix = self.expert(suffix, condition, memory, rows)
        return prefix, suffix, memory


class PrefixLayer(nn.Module):
    """[r,w] -> [r,w] and the layer's memory."""

    def __init__(self, fields: Mapping[str, Any], ops: Ops) -> None:
        super().__init__()
        self.shape = _heads(fields)
        self.ops = ops
        self.attn = nn.ModuleDict(
            {
                "norm": RmsNorm(fields["hidden"], fields["norm_epsilon"], ops),
                **_projections(fields, fields["hidden"]),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "norm": RmsNorm(fields["hidden"], fields["norm_epsilon"], ops),
                **_feed_forward(fields["hidden"], fields["ffn"]),
            }
        )

    def forward(self, hidden: Tensor, rows: Rows) -> tuple[Tensor, Memory]:
        normed, hidden = self.attn["norm"](hidden)
        mixed = self.ops.linear(normed, self.attn["qkv"].weight)
        query, key, value = turned(mixed, self.shape, rows.prefix_angles, self.ops)
        offsets, longest = rows.packing.offsets, rows.longest[0]
        seen = self.ops.ragged_attention(query, key, value, offsets, offsets, (longest, longest))
        hidden = hidden + self.ops.linear(seen, self.attn["out"].weight)
        normed, hidden = self.mlp["norm"](hidden)
        hidden = hidden + feed_forward(normed, self.mlp, self.ops)
        return hidden, Memory(key, value)


class PrefixLast(nn.Module):
    """The memory of the last layer; its hidden states [r,w] pass through, for nobody."""

    def __init__(self, fields: Mapping[str, Any], ops: Ops) -> None:
        super().__init__()
        self.shape = _heads(fields)
        self.ops = ops
        rows = 2 * fields["kv_heads"] * fields["head_dim"]
        norm = RmsNorm(fields["hidden"], fields["norm_epsilon"], ops)
        self.attn = nn.ModuleDict({"norm": norm, "kv": nn.Linear(fields["hidden"], rows, bias=False)})

    def forward(self, hidden: Tensor, rows: Rows) -> tuple[Tensor, Memory]:
        normed, hidden = self.attn["norm"](hidden)
        mixed = self.ops.linear(normed, self.attn["kv"].weight)
        keys, values = mixed.view(len(hidden), 2, self.shape[0], self.shape[2]).unbind(1)
        return hidden, Memory(rotated(keys, rows.prefix_angles), values)


class ExpertLayer(nn.Module):
    """suffix [b,h,e], condition [b,e] and the prefix's memory -> [b,h,e]."""

    def __init__(self, fields: Mapping[str, Any], ops: Ops) -> None:
        super().__init__()
        width = fields["expert_hidden"]
        self.shape = _heads(fields)
        self.ops = ops
        self.epsilon = fields["norm_epsilon"]
        self.attn = nn.ModuleDict({"modulation": nn.Linear(width, 3 * width), **_projections(fields, width)})
        self.mlp = nn.ModuleDict(
            {"modulation": nn.Linear(width, 3 * width), **_feed_forward(width, fields["expert_ffn"])}
        )

    def forward(self, hidden: Tensor, condition: Tensor, memory: Memory, rows: Rows) -> Tensor:
        normal, hidden, gate = adaptive_norm(hidden, self.attn["modulation"](condition), self.epsilon, self.ops)
        mixed = self.ops.linear(normal.flatten(0, 1), self.attn["qkv"].weight)
        query, *own = turned(mixed, self.shape, rows.suffix_angles, self.ops)
        packing, (_, suffix, both) = rows.packing, rows.longest
        keys, values = (
            permuted(torch.cat(parts), packing.joint, packing.joint_back) for parts in zip(memory, own, strict=True)
        )
        offsets = packing.suffix_offsets, packing.joint_offsets
        seen = self.ops.ragged_attention(query, keys, values, *offsets, (suffix, both))
        branch = self.ops.linear(seen, self.attn["out"].weight).view_as(hidden)
        hidden = self.ops.gated_residual(hidden, branch, gate)
        normal, hidden, gate = adaptive_norm(hidden, self.mlp["modulation"](condition), self.epsilon, self.ops)
        return self.ops.gated_residual(hidden, feed_forward(normal, self.mlp, self.ops), gate)


class RmsNorm(nn.Module):
    """Gemma's norm, x / sqrt(mean(x^2) + epsilon) * (1 + weight), rounded once: [r,w] -> [r,w], and x for the branch to
    be added to. In float32."""

    def __init__(self, width: int, epsilon: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.epsilon = epsilon
        self.ops = ops

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # Its weight is what an adaptive norm has for each sample; here there is one, of all rows.
        normed, x = self.ops.residual_ada_rms_norm(x[None], self.weight[None], None, self.epsilon)
        # Not [0], whose gradient would be a tensor of zeros, filled in part.
        return normed.squeeze(0), x.squeeze(0)


def adaptive_norm(x: Tensor, modulation: Tensor, epsilon: float, ops: Ops) -> tuple[Tensor, Tensor, Tensor]:
    """x [b,h,e], modulation [b,3e] (scale, shift, gate) -> norm(x) * (1 + scale) + shift in x's dtype, x for the branch
    to be added to, gate [b,e]."""
    scale, shift, gate = modulation.chunk(3, dim=-1)
    return *ops.residual_ada_rms_norm(x, scale, shift, epsilon), gate


def feed_forward(x: Tensor, layers: nn.ModuleDict, ops: Ops) -> Tensor:
    """Two products with a gated GELU between them (Shazeer, 2020), in its tanh form."""
    return ops.gated_mlp(x, layers["up"].weight, layers["down"].weight, activation="gelu")


def turned(mixed: Tensor, shape: tuple[int, int, int], angles: Tensor, ops: Ops) -> tuple[Tensor, Tensor, Tensor]:
    """One projection [r, g*(h/g+2)*d] -> queries [r,h,d] and keys [r,g,d], rotated, and values [r,g,d]."""
    parts = ops.rotary_qkv(mixed.view(len(mixed), 1, *shape), angles[:, None], None, None, 0.0)
    query, key, value = (part.squeeze(1) for part in parts)
    return query, key, value


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Every head of x [r,g,d] turned by angles [r,1,d], as `rotary_qkv` does it (RoFormer, arXiv 2104.09864)."""
    wide = _wide(x)
    first, second = wide.chunk(2, dim=-1)
    return (wide * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()).to(x.dtype)


def angles(positions: Tensor, size: int, base: float) -> Tensor:
    """positions [r] -> [r,1,size] float32 in radians, both halves equal."""
    exponents = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
    half = positions.float()[:, None] * (1.0 / base**exponents)
    return torch.cat((half, half), dim=-1)[:, None]


def _heads(fields: Mapping[str, Any]) -> tuple[int, int, int]:
    """Groups, heads of a group with its key and value, head size."""
    return fields["kv_heads"], fields["heads"] // fields["kv_heads"] + 2, fields["head_dim"]


def _projections(fields: Mapping[str, Any], width: int) -> dict[str, nn.Module]:
    groups, heads, size = _heads(fields)
    return {
        "qkv": nn.Linear(width, groups * heads * size, bias=False),
        "out": nn.Linear(fields["heads"] * size, width, bias=False),
    }


def _feed_forward(width: int, inner: int) -> dict[str, nn.Module]:
    return {"up": nn.Linear(width, 2 * inner, bias=False), "down": nn.Linear(inner, width, bias=False)}


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
