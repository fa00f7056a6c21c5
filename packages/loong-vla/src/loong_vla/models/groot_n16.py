"""GR00T N1.6: the head of N1.7 without its refining blocks, on Eagle 3, whose top language layers are trained too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loong_core.weights import copy, twin
from loong_vla.groot_rows import head, language, siglip_tower
from loong_vla.models.groot import GROOT_N17, HEAD_RULES

EAGLE = "backbone.model"
_TEXT = "backbone_config.text_config"
_VISION = "backbone_config.vision_config"

GROOT_N16 = replace(
    GROOT_N17,
    name="groot_n16",
    summary="GR00T N1.6: Eagle 3 (SigLIP 2, Qwen3 1.7B) and a diffusion transformer of 1.1B",
    hf_architectures=("Gr00tN1d6",),
    presets="loong_vla.models.groot_n16:presets",
    arch={
        **GROOT_N17.arch,
        **{"tower": "siglip2", "vision_layers": 27, "vision_hidden": 1152, "vision_heads": 16, "vision_ffn": 4304},
        **{"patch": 14, "patch_frames": 1, "vision_positions": 256, "deepstack": (), "image_size": 224},
        **{"vocabulary": 151680, "rope_base": 1e6, "rope_sections": None, "image_token": 151669, "final_norm": True},
        **{"state_size": 29, "action_size": 29, "horizon": 16, "state_dropout": 0.0, "mask_token": True},
        **{"refiner_layers": 0, "tune_top_layers": 4},
    },
    from_hf={
        **HEAD_RULES,
        "hidden": f"{_TEXT}.hidden_size?",
        "ffn": f"{_TEXT}.intermediate_size?",
        "heads": f"{_TEXT}.num_attention_heads?",
        "kv_heads": f"{_TEXT}.num_key_value_heads?",
        "head_dim": f"{_TEXT}.head_dim?",
        "vocabulary": f"{_TEXT}.vocab_size?",
        "norm_epsilon": f"{_TEXT}.rms_norm_eps?",
        "rope_base": f"{_TEXT}.rope_theta?",
        "vision_layers": f"{_VISION}.num_hidden_layers?",
        "vision_hidden": f"{_VISION}.hidden_size?",
        "vision_heads": f"{_VISION}.num_attention_heads?",
        "vision_ffn": f"{_VISION}.intermediate_size?",
        "vision_positions": f"{_VISION}.num_patches?",
        "patch": f"{_VISION}.patch_size?",
        "image_token": "backbone_config.image_token_index?",
    },
    weights=(
        *language(f"{EAGLE}.language_model.model"),
        twin("embed", f"{EAGLE}.language_model.lm_head.weight"),
        copy("llm.norm", f"{EAGLE}.language_model.model.norm.weight"),
        *siglip_tower(f"{EAGLE}.vision_model.vision_model", f"{EAGLE}.mlp1"),
        *head(),
    ),
)


def presets() -> Mapping[str, Mapping[str, Any]]:
    """Size name -> config.json: the published base model (`nvidia/GR00T-N1.6-3B`)."""
    return {
        "groot_n16": {
            "architectures": ["Gr00tN1d6"],
            "model_type": "Gr00tN1d6",
            "model_name": "nvidia/Eagle-Block2A-2B-v2",
            "select_layer": 16,
            "tune_top_llm_layers": 4,
            "action_horizon": 50,
            "max_state_dim": 128,
            "max_action_dim": 128,
            "max_num_embodiments": 32,
        }
    }
