"""What a planner wants to know of a GR00T beforehand, estimated: how much a sample computes, and how much it keeps.

How many cameras a robot has and how long its instructions are is not in a model's configuration. The estimates are of
two cameras and 48 rows of text, the published fine-tuning setting; measured runs report their own figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from loong_core.types import ParameterSpec
from loong_vla.groot_parameters import cross_blocks, trained_layer

CAMERAS = 2
TEXT_ROWS = 48


class Costs(NamedTuple):
    """`tokens` rows of the prompt of one sample; `active` is the number of weights that would give the FLOPs of a
    sample if every row passed them and all were trained; `kept` elements are kept for backward by row and layer."""

    tokens: int
    active: int
    kept: float


def costs(fields: Mapping[str, Any], specs: Sequence[ParameterSpec], layers: int) -> Costs:
    """Estimates for one sample; a frozen weight counts a third, for it has a forward pass alone."""
    tokens = CAMERAS * fields["image_tokens"] + TEXT_ROWS
    products = sum(
        spec.size * _rows(fields, spec, tokens) / (3 if spec.frozen else 1) for spec in specs if len(spec.shape) > 1
    )
    return Costs(tokens, round(products / tokens), _kept(fields, tokens) / (layers * tokens))


def _rows(fields: Mapping[str, Any], spec: ParameterSpec, tokens: int) -> int:
    """Rows of a sample that pass a weight."""
    role, actions = spec.role, 1 + fields["horizon"]
    if role.startswith(("vision.merger", "vision.deep")):
        return int(CAMERAS * fields["image_tokens"])
    if role.startswith("vision") and role != "vision.positions":
        return int(CAMERAS * fields["image_tokens"] * fields["merge"] ** 2)
    if role.startswith(("llm", "refiner")):
        return tokens
    if role.startswith("slots"):
        return actions if spec.expert == fields["embodiments"][0] else 0
    if role.endswith(".kv"):
        return TEXT_ROWS if spec.layer in cross_blocks(fields)[0] else int(CAMERAS * fields["image_tokens"])
    if role.startswith("dit") and "modulation" not in role and "time" not in role:
        return actions
    return 0  # looked up, or applied once a sample


def _kept(fields: Mapping[str, Any], tokens: int) -> float:
    """Elements that backward needs: of a block about 18 times its width a row (inputs of both norms, of all products,
    the heads), of a language layer the same with its own MLP; and all keys and values."""
    width, actions = fields["dit_hidden"], 1 + fields["horizon"]
    kept = 18.0 * width * actions * fields["dit_layers"] + width * fields["dit_layers"] / 2 * tokens
    if fields["tune_vlln"]:
        kept += 18.0 * fields["hidden"] * tokens * fields["refiner_layers"]
    trained = sum(trained_layer(fields, layer) for layer in range(fields["layers"]))
    heads = (3 * fields["heads"] + 4 * fields["kv_heads"]) * fields["head_dim"]
    kept += (4 * fields["hidden"] + heads + 3 * fields["ffn"]) * tokens * trained
    if fields["tune_visual"]:
        patches = CAMERAS * fields["image_tokens"] * fields["merge"] ** 2
        kept += 18.0 * fields["vision_hidden"] * patches * fields["vision_layers"]
    return kept
