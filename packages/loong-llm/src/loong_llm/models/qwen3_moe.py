"""Qwen3 with experts: Qwen3 attention, and top-k softmax routing in all layers that the config.json does not exempt."""

from __future__ import annotations

from loong_core.types import ModelFamily
from loong_core.weights import copy, gate_up, qkv, stack
from loong_llm.hf_config import ROPE_RULES

QWEN3_MOE = ModelFamily(
    name="qwen3_moe",
    summary="Qwen3 mixture of experts",
    hf_architectures=("Qwen3MoeForCausalLM",),
    describe="loong_llm.shape:describe",
    builder="loong_llm.decoder:build",
    presets="loong_llm.models:qwen3_moe_presets",
    arch={"qk_norm": True, "dense_layers": (), "sparse_step": 1, "norm_top_k": False, "aux_coefficient": 0.001},
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
        "experts": "num_experts|num_local_experts",
        "top_k": "num_experts_per_tok",
        "expert_ffn": "moe_intermediate_size",
        "dense_layers": "mlp_only_layers?",
        "sparse_step": "decoder_sparse_step?",
        "norm_top_k": "norm_topk_prob?",
        "aux_loss": "output_router_logits?",
        "aux_coefficient": "router_aux_loss_coef?",
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
        copy("layers.*.moe.router", "model.layers.*.mlp.gate.weight"),
        gate_up("layers.*.moe.up.#", "model.layers.*.mlp.experts.#.{}_proj.weight"),
        copy("layers.*.moe.down.#", "model.layers.*.mlp.experts.#.down_proj.weight"),
        stack("layers.*.moe.up.#", "model.layers.*.mlp.experts.gate_up_proj"),
        stack("layers.*.moe.down.#", "model.layers.*.mlp.experts.down_proj"),
        copy("final_norm", "model.norm.weight"),
        copy("head", "lm_head.weight"),
    ),
)
