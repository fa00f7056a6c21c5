"""Pi0.5 (Physical Intelligence): PaliGemma and an action expert that attends to it, trained by flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loong_core.types import ModelFamily
from loong_core.weights import concat, copy, drop, gate_up, prefixed, qkv, unused

TOWER = "paligemma_with_expert.paligemma.model.vision_tower.vision_model"
LANGUAGE = "paligemma_with_expert.paligemma.model.language_model"
EXPERT = "paligemma_with_expert.gemma_expert.model"
BLOCK = f"{TOWER}.encoder.layers.*"
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"

VISION = (
    copy("vision.patch", f"{TOWER}.embeddings.patch_embedding.weight"),
    copy("vision.patch_bias", f"{TOWER}.embeddings.patch_embedding.bias"),
    copy("vision.positions", f"{TOWER}.embeddings.position_embedding.weight"),
    *(
        row
        for end, suffix in (("weight", ""), ("bias", "_bias"))
        for row in (
            copy(f"vision.layers.*.attn.norm{suffix}", f"{BLOCK}.layer_norm1.{end}"),
            concat(f"vision.layers.*.attn.qkv{suffix}", [f"{BLOCK}.self_attn.{part}_proj.{end}" for part in "qkv"]),
            copy(f"vision.layers.*.attn.out{suffix}", f"{BLOCK}.self_attn.out_proj.{end}"),
            copy(f"vision.layers.*.mlp.norm{suffix}", f"{BLOCK}.layer_norm2.{end}"),
            copy(f"vision.layers.*.mlp.up{suffix}", f"{BLOCK}.mlp.fc1.{end}"),
            copy(f"vision.layers.*.mlp.down{suffix}", f"{BLOCK}.mlp.fc2.{end}"),
            copy(f"vision.norm{suffix}", f"{TOWER}.post_layernorm.{end}"),
            copy(f"projector{suffix}", f"paligemma_with_expert.paligemma.model.multi_modal_projector.linear.{end}"),
        )
    ),
)
PREFIX = (
    copy("embed", f"{LANGUAGE}.embed_tokens.weight"),
    copy("embed", LM_HEAD),  # OpenPI stores the embedding as the head that was tied to it
    copy("layers.*.prefix.attn.norm", f"{LANGUAGE}.layers.*.input_layernorm.weight"),
    qkv("layers.*.prefix.attn.qkv", f"{LANGUAGE}.layers.*.self_attn.{{}}_proj.weight"),
    concat("layers.*.prefix.attn.kv", [f"{LANGUAGE}.layers.*.self_attn.{part}_proj.weight" for part in "kv"]),
    copy("layers.*.prefix.attn.out", f"{LANGUAGE}.layers.*.self_attn.o_proj.weight"),
    copy("layers.*.prefix.mlp.norm", f"{LANGUAGE}.layers.*.post_attention_layernorm.weight"),
    gate_up("layers.*.prefix.mlp.up", f"{LANGUAGE}.layers.*.mlp.{{}}_proj.weight"),
    copy("layers.*.prefix.mlp.down", f"{LANGUAGE}.layers.*.mlp.down_proj.weight"),
)
ACTIONS = (
    qkv("layers.*.expert.attn.qkv", f"{EXPERT}.layers.*.self_attn.{{}}_proj.weight"),
    copy("layers.*.expert.attn.out", f"{EXPERT}.layers.*.self_attn.o_proj.weight"),
    gate_up("layers.*.expert.mlp.up", f"{EXPERT}.layers.*.mlp.{{}}_proj.weight"),
    copy("layers.*.expert.mlp.down", f"{EXPERT}.layers.*.mlp.down_proj.weight"),
    *(
        row
        for end, suffix in (("weight", ""), ("bias", "_bias"))
        for row in (
            copy(f"layers.*.expert.attn.modulation{suffix}", f"{EXPERT}.layers.*.input_layernorm.dense.{end}"),
            copy(f"layers.*.expert.mlp.modulation{suffix}", f"{EXPERT}.layers.*.post_attention_layernorm.dense.{end}"),
            copy(f"modulation{suffix}", f"{EXPERT}.norm.dense.{end}"),
            copy(f"actions.embed{suffix}", f"action_in_proj.{end}"),
            copy(f"actions.time_in{suffix}", f"time_mlp_in.{end}"),
            copy(f"actions.time_in{suffix}", f"action_time_mlp_in.{end}"),
            copy(f"actions.time_out{suffix}", f"time_mlp_out.{end}"),
            copy(f"actions.time_out{suffix}", f"action_time_mlp_out.{end}"),
            copy(f"velocity{suffix}", f"action_out_proj.{end}"),
        )
    ),
)
# What the last layer of the prefix computes beyond its keys and values goes nowhere; neither do heads over words.
IDLE = (
    unused(LM_HEAD, "vocabulary", "hidden"),
    unused("paligemma_with_expert.gemma_expert.lm_head.weight", "vocabulary", "expert_hidden"),
    unused(f"{LANGUAGE}.norm.weight", "hidden"),
    unused(f"{LANGUAGE}.layers.*.self_attn.q_proj.weight", "query_rows", "hidden"),
    unused(f"{LANGUAGE}.layers.*.self_attn.o_proj.weight", "hidden", "query_rows"),
    unused(f"{LANGUAGE}.layers.*.post_attention_layernorm.weight", "hidden"),
    unused(f"{LANGUAGE}.layers.*.mlp.gate_proj.weight", "ffn", "hidden"),
    unused(f"{LANGUAGE}.layers.*.mlp.up_proj.weight", "ffn", "hidden"),
    unused(f"{LANGUAGE}.layers.*.mlp.down_proj.weight", "hidden", "ffn"),
    drop("state_proj.weight"),
    drop("state_proj.bias"),
)

PI05 = ModelFamily(
    name="pi05",
    summary="Pi0.5: PaliGemma 3B with a flow-matching action expert of 300M",
    hf_architectures=("pi05", "PI05Policy"),
    describe="loong_vla.pi05_shape:describe",
    builder="loong_vla.pi05:build",
    presets="loong_vla.models.pi05:presets",
    planner="torch",
    task="flow_matching",
    sidecars="loong_vla.pi05_export:sidecars",
    single_file=True,
    arch={
        **{"vision_hidden": 1152, "vision_ffn": 4304, "vision_layers": 27, "vision_heads": 16, "patch": 14},
        **{"vision_norm_epsilon": 1e-6, "norm_epsilon": 1e-6, "rope_base": 10000.0, "vocabulary": 257152},
        **{"image_size": 224, "state_size": 32, "prompt_length": 200, "sampling_steps": 10},
        **{"shortest_period": 4e-3, "longest_period": 4.0},
        **{"freeze_vision": False, "expert_only": False, "skip_padding": True},
    },
    from_hf={
        "prefix_variant": "paligemma_variant",
        "expert_variant": "action_expert_variant",
        "horizon": "chunk_size|action_horizon",
        "action_size": "max_action_dim|action_dim",
        "state_size": "max_state_dim?",
        "image_size": "image_resolution?",
        "prompt_length": "tokenizer_max_length|max_token_len?",
        "sampling_steps": "num_inference_steps?",
        "shortest_period": "min_period?",
        "longest_period": "max_period?",
        "freeze_vision": "freeze_vision_encoder?",
        "expert_only": "train_expert_only?",
        "skip_padding": "skip_padding?",
    },
    weights=prefixed((*VISION, *PREFIX, *ACTIONS, *IDLE), "model."),
)


def presets() -> Mapping[str, Mapping[str, Any]]:
    """Size name -> config.json: the published policy, as in LeRobot's `lerobot/pi05_base`."""
    return {
        "pi05": {
            "type": "pi05",
            "paligemma_variant": "gemma_2b",
            "action_expert_variant": "gemma_300m",
            "chunk_size": 50,
            "n_action_steps": 50,
            "max_state_dim": 32,
            "max_action_dim": 32,
            "image_resolution": [224, 224],
            "tokenizer_max_length": 200,
            "num_inference_steps": 10,
        }
    }
