"""What a planner wants to know of a Pi0.5 beforehand, estimated: how much a sample computes, and how much it keeps.

The cameras are those that the policy's configuration names, else two; prompts are taken to have 64 tokens unless
padding is computed too. Measured runs report their own figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from loong_core.types import ParameterSpec

CAMERAS = 2
WORDS = 64


class Costs(NamedTuple):
    """`tokens` rows of one sample's prefix; `active` is the number of weights, and `width` that of attention, that
    would give the FLOPs of a sample if every row passed them, all were trained, and attention were causal; `kept`
    elements are kept for backward by row and layer."""

    tokens: int
    active: int
    width: int
    kept: float


def costs(fields: Mapping[str, Any], specs: Sequence[ParameterSpec], cameras: int) -> Costs:
    """Estimates for one sample; a frozen weight counts a third, for it has a forward pass alone."""
    patches = (cameras or CAMERAS) * fields["image_tokens"]
    tokens = patches + (min(WORDS, fields["prompt_length"]) if fields["skip_padding"] else fields["prompt_length"])
    rows = {"vision": patches, "projector": patches, "prefix": tokens, "expert": fields["horizon"]}
    products = sum(
        spec.size * _rows(spec.role, rows) / (3 if spec.frozen else 1) for spec in specs if len(spec.shape) > 1
    )
    kept = _kept(fields, patches, tokens)
    return Costs(tokens, round(products / tokens), _width(fields, patches, tokens), kept / (fields["layers"] * tokens))


def _rows(role: str, rows: Mapping[str, int]) -> int:
    """Rows of a sample that pass a weight; those of modulations, of time and of actions are few."""
    if role == "vision.positions" or "modulation" in role:
        return 0
    return next((rows[word] for word in role.split(".") if word in rows), 0)


def _width(fields: Mapping[str, Any], patches: int, tokens: int) -> int:
    """Every row of a prefix sees all of it, every row of a suffix both, every patch its image; causal is half of it."""
    horizon = fields["horizon"]
    joint = (fields["layers"] - 1) * tokens**2 + fields["layers"] * horizon * (tokens + horizon)
    seen = fields["query_rows"] * joint
    seen += fields["vision_layers"] * fields["vision_hidden"] * patches * fields["image_tokens"]
    return round(2 * seen / tokens**2)


def _kept(fields: Mapping[str, Any], patches: int, tokens: int) -> float:
    """Elements that backward needs: of each layer the inputs of norms and products, the heads, and of the MLP what
    goes in, comes out, and what it multiplies."""
    heads = (3 * fields["heads"] + 4 * fields["kv_heads"]) * fields["head_dim"]
    expert = 8 * fields["expert_hidden"] + heads + 3 * fields["expert_ffn"]
    kept = float(expert * fields["horizon"] * fields["layers"])
    kept += 2 * fields["kv_heads"] * fields["head_dim"] * tokens * fields["layers"]
    if not fields["expert_only"]:
        kept += (4 * fields["hidden"] + heads + 3 * fields["ffn"]) * tokens * (fields["layers"] - 1)
        if not fields["freeze_vision"]:
            block = 8 * fields["vision_hidden"] + 2 * fields["vision_ffn"]
            kept += block * patches * fields["vision_layers"]
    return kept
