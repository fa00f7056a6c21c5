"""GR00T (NVIDIA): a frozen vision-language backbone and a diffusion transformer that turns noise into action chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loong_core.types import ModelFamily
from loong_core.weights import prefixed, twin, unused
from loong_vla.groot_rows import QWEN, head, language, qwen_tower

_TEXT = "backbone_config.text_config"
_VISION = "backbone_config.vision_config"
_ACTIONS = "diffusion_model_cfg"
HEAD_RULES: dict[str, str] = {
    "layers": "select_layer?",
    "padding_as_keys": "padding_as_keys?",
    "tune_llm": "tune_llm?",
    "tune_visual": "tune_visual?",
    "tune_top_layers": "tune_top_llm_layers?",
    "tune_projector": "tune_projector?",
    "tune_diffusion": "tune_diffusion_model?",
    "tune_vlln": "tune_vlln?",
    "image_size": "image_target_size?",
    "state_size": "max_state_dim?",
    "action_size": "max_action_dim?",
    "horizon": "action_horizon?",
    "slots": "max_num_embodiments?",
    "head_hidden": "hidden_size?",
    "positions": "max_seq_len?",
    "state_dropout": "state_dropout_prob?",
    "sampling_steps": "num_inference_timesteps?",
    "time_buckets": "num_timestep_buckets?",
    "time_alpha": "noise_beta_alpha?",
    "time_beta": "noise_beta_beta?",
    "time_scale": "noise_s?",
    "text_every": "attend_text_every_n_blocks?",
    "dit_layers": f"{_ACTIONS}.num_layers?",
    "dit_heads": f"{_ACTIONS}.num_attention_heads?",
    "dit_head_dim": f"{_ACTIONS}.attention_head_dim?",
    "dit_out": f"{_ACTIONS}.output_dim?",
    "dropout": f"{_ACTIONS}.dropout?",
}
"""Where the settings of the action head stand in the base model's `config.json`."""

GROOT_N17 = ModelFamily(
    name="groot_n17",
    summary="GR00T N1.7: Cosmos-Reason2 2B (Qwen3-VL) and a diffusion transformer of 1.1B",
    hf_architectures=("Gr00tN1d7", "GR00TN17", "groot"),
    describe="loong_vla.groot_shape:describe",
    builder="loong_vla.groot:build",
    presets="loong_vla.models.groot:n17_presets",
    planner="torch",
    task="flow_matching",
    sidecars="loong_vla.groot_export:sidecars",
    single_file="type",  # a policy of LeRobot's has it, NVIDIA's base models have not
    arch={
        **{"tower": "qwen3_vl", "vision_layers": 24, "vision_hidden": 1024, "vision_heads": 16, "vision_ffn": 4096},
        **{"patch": 16, "patch_frames": 2, "merge": 2, "vision_positions": 2304, "deepstack": (5, 11, 17)},
        **{"layers": 16, "hidden": 2048, "ffn": 6144, "heads": 16, "kv_heads": 8, "head_dim": 128, "final_norm": False},
        **{"vocabulary": 151936, "norm_epsilon": 1e-6, "rope_base": 5e6, "rope_sections": (24, 20, 20)},
        **{"image_token": 151655, "image_size": 256, "padding_as_keys": False, "tune_top_layers": 0},
        **{"tune_llm": False, "tune_visual": False, "tune_projector": True, "tune_diffusion": True, "tune_vlln": True},
        **{"state_size": 132, "action_size": 132, "horizon": 40, "slots": 32, "head_hidden": 1024, "positions": 1024},
        **{"state_dropout": 0.2, "mask_token": False, "sampling_steps": 4, "time_buckets": 1000, "time_waves": 256},
        **{"time_alpha": 1.5, "time_beta": 1.0, "time_scale": 0.999, "text_every": 2, "dropout": 0.2},
        **{"dit_layers": 32, "dit_heads": 32, "dit_head_dim": 48, "dit_out": 1024},
        **{"refiner_layers": 4, "refiner_heads": 32, "refiner_head_dim": 64, "refiner_dropout": 0.2},
    },
    from_hf={
        **HEAD_RULES,
        "refiner_layers": "vl_self_attention_cfg.num_layers?",
        "refiner_heads": "vl_self_attention_cfg.num_attention_heads?",
        "refiner_head_dim": "vl_self_attention_cfg.attention_head_dim?",
        "refiner_dropout": "vl_self_attention_cfg.dropout?",
        "hidden": f"{_TEXT}.hidden_size?",
        "ffn": f"{_TEXT}.intermediate_size?",
        "heads": f"{_TEXT}.num_attention_heads?",
        "kv_heads": f"{_TEXT}.num_key_value_heads?",
        "head_dim": f"{_TEXT}.head_dim?",
        "vocabulary": f"{_TEXT}.vocab_size?",
        "norm_epsilon": f"{_TEXT}.rms_norm_eps?",
        "rope_base": f"{_TEXT}.rope_parameters.rope_theta|{_TEXT}.rope_theta?",
        "rope_sections": f"{_TEXT}.rope_parameters.mrope_section|{_TEXT}.rope_scaling.mrope_section?",
        "vision_layers": f"{_VISION}.depth?",
        "vision_hidden": f"{_VISION}.hidden_size?",
        "vision_heads": f"{_VISION}.num_heads?",
        "vision_ffn": f"{_VISION}.intermediate_size?",
        "vision_positions": f"{_VISION}.num_position_embeddings?",
        "deepstack": f"{_VISION}.deepstack_visual_indexes?",
        "patch": f"{_VISION}.patch_size?",
        "patch_frames": f"{_VISION}.temporal_patch_size?",
        "merge": f"{_VISION}.spatial_merge_size?",
        "image_token": "backbone_config.image_token_id?",
    },
    weights=prefixed(
        (
            *language(f"{QWEN}.language_model"),
            twin("embed", "backbone.model.lm_head.weight"),
            unused(f"{QWEN}.language_model.norm.weight", "hidden"),  # features are taken before the final norm
            *qwen_tower(),
            *head(),
        ),
        "_groot_model.",
    ),
)


def n17_presets() -> Mapping[str, Mapping[str, Any]]:
    """Size name -> config.json: the published base model (`nvidia/GR00T-N1.7-3B`)."""
    return {
        "groot_n17": {
            "architectures": ["Gr00tN1d7"],
            "model_type": "Gr00tN1d7",
            "model_name": "nvidia/Cosmos-Reason2-2B",
            "select_layer": 16,
            "action_horizon": 40,
            "max_state_dim": 132,
            "max_action_dim": 132,
            "max_num_embodiments": 32,
        }
    }
