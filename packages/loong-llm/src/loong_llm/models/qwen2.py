"""Qwen1.5, Qwen2 and Qwen2.5: the LLaMA block with biases on queries, keys and values only.

The generations share one public architecture, so a `config.json` leads to `qwen2`; `qwen1_5` is its older sizes.
"""

from __future__ import annotations

from dataclasses import replace

from loong_core.types import ModelFamily
from loong_core.weights import copy, drop, gate_up, qkv
from loong_llm.hf_config import ROPE_RULES

QWEN2 = ModelFamily(
    name="qwen2",
    summary="Qwen2, Qwen2.5",
    hf_architectures=("Qwen2ForCausalLM",),
    describe="loong_llm.shape:describe",
    builder="loong_llm.decoder:build",
    presets="loong_llm.models:qwen2_presets",
    arch={"qkv_bias": True},
    from_hf={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "ffn": "intermediate_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads?",
        "head_dim": "head_dim?",
        "vocabulary": "vocab_size",
        "norm_epsilon": "rms_norm_eps?",
        "tied_embeddings": "tie_word_embeddings?",
        "pad_token": "pad_token_id?",
        "init_std": "initializer_range?",
        **ROPE_RULES,
    },
    weights=(
        copy("embed", "model.embed_tokens.weight"),
        copy("layers.*.attn.norm", "model.layers.*.input_layernorm.weight"),
        qkv("layers.*.attn.qkv", "model.layers.*.self_attn.{}_proj.weight"),
        qkv("layers.*.attn.qkv_bias", "model.layers.*.self_attn.{}_proj.bias"),
        copy("layers.*.attn.out", "model.layers.*.self_attn.o_proj.weight"),
        copy("layers.*.mlp.norm", "model.layers.*.post_attention_layernorm.weight"),
        gate_up("layers.*.mlp.up", "model.layers.*.mlp.{}_proj.weight"),
        copy("layers.*.mlp.down", "model.layers.*.mlp.down_proj.weight"),
        copy("final_norm", "model.norm.weight"),
        copy("head", "lm_head.weight"),
        drop("model.layers.*.self_attn.rotary_emb.inv_freq"),
    ),
)

QWEN1_5 = replace(
    QWEN2, name="qwen1_5", summary="Qwen1.5", hf_architectures=(), presets="loong_llm.models:qwen1_5_presets"
)
