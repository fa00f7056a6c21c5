"""What every op is tried on, and its definition in float64: written from the formula, not from any implementation.

Shape legend: s query rows, t key rows, b batch, h query heads, g key-value heads, d and e head sizes, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """One call of an op. `tensors` are the differentiable inputs, in positional order; `others` are passed as they are.

    `define(tensors, others)` is the op's definition for float64 tensors. `positional` names those of `others` that
    follow the tensors by position; the rest are keywords.
    """

    name: str
    tensors: Mapping[str, tuple[int, ...]]
    define: Callable[[Tensors, Mapping[str, Any]], Tensor]
    others: Mapping[str, Any] = field(default_factory=dict)
    positional: tuple[str, ...] = ()
    spread: float = 1.0

    def draw(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """The inputs, the same for every call: normal numbers of standard deviation `spread`, rounded to `dtype`."""
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))
        drawn = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64) * self.spread
            for name, shape in self.tensors.items()
        }
        return {name: tensor.to(dtype).to(device) for name, tensor in drawn.items()}

    def call(self, function: Callable[..., Tensor], tensors: Tensors) -> Tensor:
        """`function` on `tensors`, with the other arguments on the tensors' device."""
        device = next(iter(tensors.values())).device
        others = {name: _to(value, device) for name, value in self.others.items()}
        positional = [others.pop(name) for name in self.positional]
        return function(*tensors.values(), *positional, **others)

    def exact(self, tensors: Tensors) -> Tensor:
        """The definition, on float64 tensors of the CPU."""
        return self.define(tensors, self.others)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_to(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


# -------------------------------------------------------------------------------------------------- definitions
def define_rms_norm(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dim."""
    x, weight = tensors["x"], tensors["weight"]
    mean = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return x / torch.sqrt(mean + others["epsilon"]) * weight


def define_attention(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """One softmax per sample, head and query row over exactly the keys that row may see; padding rows give zeros."""
    query, key, value = tensors["query"], tensors["key"], tensors["value"]
    (s, batch, heads, _), (t, _, groups, _) = query.shape, key.shape
    query_rows, key_rows = others.get("rows") or (torch.arange(s), torch.arange(t))
    query_samples, key_samples = others.get("segments") or (torch.zeros(batch, s), torch.zeros(batch, t))
    rows = []
    for i in range(s):
        parts = []
        for j in range(batch):
            seen = (key_rows <= query_rows[i]) & (key_samples[j] == query_samples[j, i])
            for head in range(heads):
                group = head // (heads // groups)
                scores = key[seen, j, group] @ query[i, j, head] * others["scale"]
                part = torch.softmax(scores, 0) @ value[seen, j, group]
                parts.append(part * 0 if query_samples[j, i] == -1 else part)
        rows.append(torch.stack(parts).reshape(batch, -1))
    return torch.stack(rows)


def define_cross_entropy(tensors: Tensors, others: Mapping[str, Any]) -> Tensor:
    """log(sum(exp(logits))) - logits[target] over the true vocabulary; zero where the target is -100."""
    logits, targets = tensors["logits"][..., : others["vocabulary"]], others["targets"]
    counted = targets != -100
    picked = logits.gather(-1, torch.where(counted, targets, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(counted, torch.log(torch.exp(logits).sum(-1)) - picked, 0.0)


# -------------------------------------------------------------------------------------------------------- cases
def _rms_norm(name: str, shape: tuple[int, ...], spread: float = 1.0) -> OpCase:
    return OpCase(
        name=name,
        tensors={"x": shape, "weight": shape[-1:]},
        others={"epsilon": 1e-6},
        positional=("epsilon",),
        define=define_rms_norm,
        spread=spread,
    )


def _attention(name: str, s: int, b: int, h: int, g: int, d: int, e: int | None = None, **others: Any) -> OpCase:
    t = len(others["rows"][1]) if "rows" in others else s
    return OpCase(
        name=name,
        tensors={"query": (s, b, h, d), "key": (t, b, g, d), "value": (t, b, g, e or d)},
        others={"scale": 1 / math.sqrt(d), **others},
        define=define_attention,
    )


def _cross_entropy(name: str, targets: list[Any], width: int, vocabulary: int, spread: float = 1.0) -> OpCase:
    wanted = torch.tensor(targets)
    return OpCase(
        name=name,
        tensors={"logits": (*wanted.shape, width)},
        others={"targets": wanted, "vocabulary": vocabulary, "group": None},
        positional=("targets",),
        define=define_cross_entropy,
        spread=spread,
    )


_PACKED = torch.tensor([[0, 0, 1, 1, 1, 2, -1], [4, 4, 4, 4, 4, -1, -1]])
_ZIGZAG = (torch.tensor([2, 3, 4, 5]), torch.tensor([0, 1, 6, 7, 2, 3, 4, 5]))
_ROW = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1]])

CASES: dict[str, tuple[OpCase, ...]] = {
    "rms_norm": (
        _rms_norm("one_row", (1, 7)),
        _rms_norm("odd", (3, 2, 33)),
        _rms_norm("wide", (2, 257)),
        _rms_norm("narrow", (5, 3, 2)),
        _rms_norm("tiny_values", (4, 12), spread=1e-3),
        _rms_norm("large_values", (4, 12), spread=1e3),
        _rms_norm("heads", (3, 2, 5, 16)),
    ),
    "attention": (
        _attention("one_row", 1, 1, 1, 1, 8),
        _attention("odd", 7, 2, 3, 3, 10),
        _attention("grouped", 5, 2, 6, 2, 8),
        _attention("one_key_head", 9, 1, 3, 1, 16),
        _attention("narrow_values", 6, 1, 4, 2, 8, 4),
        _attention("packed", 7, 2, 4, 2, 8, segments=(_PACKED, _PACKED)),
        _attention("context_parallel", 4, 2, 4, 2, 8, rows=_ZIGZAG),
        _attention(
            "packed_context_parallel", 4, 1, 2, 1, 8,
            rows=_ZIGZAG, segments=(_ROW[:, _ZIGZAG[0]], _ROW[:, _ZIGZAG[1]]),
        ),
    ),
    "cross_entropy": (
        _cross_entropy("one_token", [0], 3, 3),
        _cross_entropy("odd", [[0, 6, 2], [3, 1, 5]], 7, 7),
        _cross_entropy("uncounted", [[-100, 6, -100, 2], [0, -100, -100, -100]], 7, 7),
        _cross_entropy("padded_vocabulary", [[0, 4, 3], [-100, 1, 2]], 8, 5),
        _cross_entropy("confident", [[0, 4, 3]], 16, 13, spread=4.0),
    ),
}  # fmt: skip
"""Op -> cases, small and odd: sizes of one, primes, groups, packing, padding."""
