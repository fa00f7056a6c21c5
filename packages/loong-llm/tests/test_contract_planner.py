"""The planner contract, applied to the megatron planner: dense layers and experts, every single cut of two ranks."""

from __future__ import annotations

from typing import ClassVar

from loong_core.testing import PlannerContract


class TestMegatronDense(PlannerContract):
    planner = "megatron"
    family = "llama"
    config: ClassVar = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "tie_word_embeddings": True,
    }
    layouts: ClassVar = ({}, {"tp": 2, "sp": False}, {"tp": 2, "sp": True}, {"pp": 2, "vpp": 2}, {"cp": 2})


class TestMegatronExperts(PlannerContract):
    planner = "megatron"
    family = "qwen3_moe"
    config: ClassVar = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.05,
    }
    layouts: ClassVar = ({}, {"ep": 2}, {"tp": 2, "sp": True, "etp": 2})
