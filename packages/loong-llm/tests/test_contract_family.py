"""The family contract, applied to every family of this package."""

from __future__ import annotations

from typing import Any, ClassVar

from loong_core.testing import FamilyContract

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class TestLlama(FamilyContract):
    family = "llama"
    config: ClassVar = {**SIZES, "model_type": "llama", "mlp_bias": True}


class TestQwen15(FamilyContract):
    family = "qwen1_5"
    config: ClassVar = {**SIZES, "model_type": "qwen2", "num_key_value_heads": 4, "tie_word_embeddings": True}


class TestQwen2(FamilyContract):
    family = "qwen2"
    config: ClassVar = {**SIZES, "model_type": "qwen2", "num_attention_heads": 6}
    config.update(hidden_size=48)


class TestQwen3(FamilyContract):
    family = "qwen3"
    config: ClassVar = {**SIZES, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True}


class TestQwen3Moe(FamilyContract):
    family = "qwen3_moe"
    config: ClassVar = {
        **SIZES,
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.5,
    }
