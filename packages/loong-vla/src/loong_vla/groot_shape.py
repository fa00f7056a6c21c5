"""What a GR00T model consists of, worked out in plain Python: plans need neither GPU nor weights.

A policy is described by up to three files: LeRobot's `config.json` (which parts are tuned, which robot), the base
model's (sizes of the action head) and its backbone's (sizes of the vision-language model). Where the first two name a
local folder, its `config.json` is read; the published backbones are recorded here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loong_core.errors import CheckpointError, RecipeError, Unsupported
from loong_core.types import ModelFamily, ModelShape
from loong_vla.groot_costs import costs
from loong_vla.groot_parameters import specs

EMBODIMENTS: dict[str, int] = {
    "simpler_env_google": 0,
    "simpler_env_widowx": 1,
    "libero_sim": 2,
    "new_embodiment": 10,
    "oxe_droid_relative_eef_relative_joint": 24,
    "real_g1_relative_eef_relative_joints": 25,
    "unitree_g1_full_body_with_waist_height_nav_cmd": 25,
    "real_r1_pro_sharpa_relative_eef": 26,
    "xdof_relative_eef_relative_joint": 27,
}
"""Slots of the published GR00T N1.7 weights by LeRobot's names; `embodiment_id.json` of a base model comes first."""


def describe(family: ModelFamily, config: Mapping[str, Any]) -> ModelShape:
    """The full model that `config` (LeRobot's, or a base model's) describes.

    Raises:
        RecipeError: a size is missing or of the wrong kind, or an embodiment does not exist.
        Unsupported: the configuration asks for something that loong would not compute.
    """
    fields = resolve(family, config)
    parameters = tuple(specs(fields))
    # Layers are numbered within a stack: a planner sees the tower, the language model and the head side by side.
    layers = max(fields["vision_layers"], fields["layers"], fields["dit_layers"])
    estimate = costs(fields, parameters, layers)
    return ModelShape(
        family=family.name,
        fields={**fields, "sample_tokens": estimate.tokens},
        layers=layers,
        hidden=fields["hidden"],
        parameters=parameters,
        vocabulary=fields["vocabulary"],
        active_parameters=estimate.active,
        activation_replicated=estimate.kept,
    )


# --------------------------------------------------------------------------------------------- configuration
def resolve(family: ModelFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    """The family's fields of `config`, checked, with derived ones filled in (see `describe` for what is raised)."""
    merged, folder = merge(config)
    _refuse(family, merged)
    fields = dict(family.arch)
    problems = []
    for name, rule in family.from_hf.items():
        paths = rule.removesuffix("?").split("|")
        value = next((found for path in paths if (found := look_up(merged, path)) is not None), None)
        if value is not None:
            fields[name] = value
    if isinstance(fields["image_size"], (list, tuple)):
        if len(set(fields["image_size"])) != 1:
            problems.append(f"config.json: `image_target_size` must be square, not {list(fields['image_size'])}.")
        fields["image_size"] = max(fields["image_size"], default=0)
    problems += _kind_problems(fields)
    if problems:
        raise RecipeError(problems)
    fields["embodiments"] = _slots(fields, merged, folder)
    fields["mask_token"] = fields["mask_token"] and fields["state_dropout"] > 0
    fields["dit_hidden"] = fields["dit_heads"] * fields["dit_head_dim"]
    fields["image_tokens"] = (fields["image_size"] // (fields["patch"] * fields["merge"])) ** 2
    _relations(fields)
    return fields


def merge(config: Mapping[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """`config` over the `config.json` of its `base_model_path`, and over the backbone's under `backbone_config`.

    Only local folders are read. Returns the merged mapping and the folder of the base model, if it is a local one.
    """
    folder = _folder(config.get("base_model_path"))
    base = _read(folder) if folder is not None else {}
    # LeRobot's file repeats sizes that only its preprocessing uses; those of the network are the base model's.
    own = {name: value for name, value in config.items() if not (base and name in ("max_state_dim", "max_action_dim"))}
    merged = {**base, **own}
    backbone = _folder(merged.get("model_name"))
    if "backbone_config" not in merged and backbone is not None:
        merged["backbone_config"] = _read(backbone)
    return merged, folder


def embodiment(config: Mapping[str, Any]) -> int | None:
    """The slot that a LeRobot `config.json` trains (its `embodiment_tag`), None where it names no embodiment."""
    tag = config.get("embodiment_tag")
    if tag is None:
        return None
    folder = _folder(config.get("base_model_path"))
    table = folder / "embodiment_id.json" if folder is not None else None
    known = {**EMBODIMENTS, **(_read_json(table) if table is not None and table.is_file() else {})}
    return int(known.get(str(tag), 0))  # as LeRobot: an unknown name is slot 0


def look_up(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, None where it, or a mapping on the way to it, is absent or null."""
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def _folder(name: object) -> Path | None:
    return Path(name) if isinstance(name, str) and (Path(name) / "config.json").is_file() else None


def _read(folder: Path) -> dict[str, Any]:
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}. Copy or download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return content


_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("use_vlln", (True,), "the norm before the action head is always built"),
    ("add_pos_embed", (True,), "the learned positions of actions are always built"),
    ("use_alternate_vl_dit", (True,), "every second cross-attention reads text, the others images"),
    ("diffusion_model_cfg.interleave_self_attention", (True,), "blocks alternate cross- and self-attention"),
    ("diffusion_model_cfg.positional_embeddings", (None,), "the action head has no further positions"),
    ("diffusion_model_cfg.final_dropout", (True,), "dropout follows every branch"),
    ("diffusion_model_cfg.norm_type", ("ada_norm",), "norms are modulated by time"),
    ("vl_self_attention_cfg.positional_embeddings", (None,), "the refining blocks have no positions"),
    ("vl_self_attention_cfg.final_dropout", (True,), "dropout follows every branch"),
    ("state_history_length", (1,), "the policy sees one state"),
    ("reproject_vision", (False,), "it is not built"),
    ("exclude_state", (False,), "it is not built"),
    ("state_additive_noise_scale", (0,), "noise on the state is not built"),
)


def _refuse(family: ModelFamily, config: Mapping[str, Any]) -> None:
    found = [(path, look_up(config, path), allowed, why) for path, allowed, why in _REFUSED]
    problems = [
        f"config.json: `{path}` = {value!r} is not supported by {family.name}: {why} (allowed: {allowed[0]!r})."
        for path, value, allowed, why in found
        if value is not None and value not in allowed
    ]
    if problems:
        raise Unsupported(problems)


_COUNTS = (
    *("vision_layers", "vision_hidden", "vision_heads", "vision_ffn", "vision_positions", "patch", "merge"),
    *("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocabulary", "slots", "state_size", "image_size"),
    *("action_size", "horizon", "dit_layers", "dit_heads", "dit_head_dim", "dit_out", "head_hidden", "positions"),
    *("text_every", "time_buckets", "sampling_steps"),
)
_SHARES = ("dropout", "refiner_dropout", "state_dropout")
_FLAGS = ("tune_llm", "tune_visual", "tune_projector", "tune_diffusion", "tune_vlln", "padding_as_keys")


def _kind_problems(fields: Mapping[str, Any]) -> list[str]:
    problems = [
        f"config.json: {name} must be a positive integer, not {fields[name]!r}."
        for name in _COUNTS
        if not (isinstance(fields[name], int) and fields[name] is not True and fields[name] > 0)
    ]
    problems += [
        f"config.json: {name} must be a whole number, not {fields[name]!r}."
        for name in ("refiner_layers", "tune_top_layers")
        if not (isinstance(fields[name], int) and not isinstance(fields[name], bool) and fields[name] >= 0)
    ]
    problems += [
        f"config.json: {name} must be true or false, not {fields[name]!r}."
        for name in _FLAGS
        if not isinstance(fields[name], bool)
    ]
    return problems + [
        f"config.json: {name} must be a number from 0 to below 1, not {fields[name]!r}."
        for name in _SHARES
        if not (isinstance(fields[name], (int, float)) and 0 <= fields[name] < 1)
    ]


def _slots(fields: Mapping[str, Any], config: Mapping[str, Any], folder: Path | None) -> tuple[int, ...]:
    """The embodiments that are trained: those asked for, LeRobot's one, or all."""
    asked = config.get("embodiments")
    if asked is None and (one := embodiment(config)) is not None and one < fields["slots"]:
        asked = [one]
    if asked is None:
        return tuple(range(fields["slots"]))
    if not isinstance(asked, (list, tuple)) or not asked or not all(isinstance(slot, int) for slot in asked):
        raise RecipeError(f"model.config.embodiments must be a list of slot numbers, not {asked!r}.")
    if wrong := [slot for slot in asked if not 0 <= slot < fields["slots"]]:
        raise RecipeError(
            f"model.config.embodiments: {', '.join(map(str, wrong))} is no slot of the model, which has 0 to "
            f"{fields['slots'] - 1}."
        )
    return tuple(sorted(set(asked)))


def _relations(fields: Mapping[str, Any]) -> None:
    """Sizes that are fine one by one and do not fit together."""
    problems = []
    if fields["vision_hidden"] % fields["vision_heads"]:
        problems.append("config.json: the vision tower's hidden_size is not a multiple of its num_heads.")
    if fields["heads"] % fields["kv_heads"]:
        problems.append("config.json: num_key_value_heads does not divide num_attention_heads.")
    side = round(fields["vision_positions"] ** 0.5)
    if side * side != fields["vision_positions"]:
        problems.append("config.json: num_position_embeddings is not a square.")
    if fields["image_size"] % (fields["patch"] * fields["merge"]):
        unit = fields["patch"] * fields["merge"]
        problems.append(f"config.json: `image_target_size` {fields['image_size']} is not a multiple of {unit} pixels.")
    if fields["rope_sections"] and 2 * sum(fields["rope_sections"]) != fields["head_dim"]:
        problems.append("config.json: mrope_section does not add up to half of head_dim.")
    if fields["refiner_layers"] and fields["refiner_heads"] * fields["refiner_head_dim"] != fields["hidden"]:
        problems.append("config.json: vl_self_attention_cfg: heads x head size is not the backbone's hidden size.")
    if fields["dit_layers"] <= 2 * fields["text_every"] - 2:
        problems.append("config.json: diffusion_model_cfg: with so few layers no block reads images.")
    if fields["tune_top_layers"] > fields["layers"]:
        problems.append(f"config.json: tune_top_llm_layers is more than the {fields['layers']} layers.")
    if problems:
        raise RecipeError(problems)
