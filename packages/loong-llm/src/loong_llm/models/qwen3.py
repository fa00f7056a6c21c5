"""Qwen3 dense: the LLaMA block plus an RMS norm over every head's queries and keys."""

from __future__ import annotations

from loong_core.types import ModelFamily
from loong_core.weights import copy, gate_up, qkv
from loong_llm.hf_config import ROPE_RULES

QWEN3 = ModelFamily(
    name="qwen3",
    summary="Qwen3 dense",
    hf_architectures=("Qwen3ForCausalLM",),
    describe="loong_llm.shape:describe",
    builder="loong_llm.decoder:build",
    presets="loong_llm.models:qwen3_presets",
    arch={"qk_norm": True, "head_dim": 128},
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
        "qkv_bias": "attention_bias?",
        "out_bias": "attention_bias?",
        **ROPE_RULES,
    },
    weights=(
        copy("embed", "model.embed_tokens.weight"),
        copy("layers.*.attn.norm", "model.layers.*.input_layernorm.weight"),
        qkv("layers.*.attn.qkv", "model.layers.*.self_attn.{}_proj.weight"),
        qkv("layers.*.attn.qkv_bias", "model.layers.*.self_attn.{}_proj.bias"),
        copy("layers.*.attn.q_norm", "model.layers.*.self_attn.q_norm.weight"),
        copy("layers.*.attn.k_norm", "model.layers.*.self_attn.k_norm.weight"),
        copy("layers.*.attn.out", "model.layers.*.self_attn.o_proj.weight"),
        copy("layers.*.attn.out_bias", "model.layers.*.self_attn.o_proj.bias"),
        copy("layers.*.mlp.norm", "model.layers.*.post_attention_layernorm.weight"),
        gate_up("layers.*.mlp.up", "model.layers.*.mlp.{}_proj.weight"),
        copy("layers.*.mlp.down", "model.layers.*.mlp.down_proj.weight"),
        copy("final_norm", "model.norm.weight"),
        copy("head", "lm_head.weight"),
    ),
)
