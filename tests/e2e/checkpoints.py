"""Tiny random Hugging Face checkpoints of every family, in the odd shapes that break assumptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

BASE = {"hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256, "vocab_size": 131}


def _config(kind: str, **changes: Any) -> Any:
    return getattr(transformers, kind)(**(BASE | changes))


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 64}

CHECKPOINTS: dict[str, Any] = {
    "llama2": lambda: _config("LlamaConfig", num_attention_heads=6, num_key_value_heads=6, intermediate_size=88),
    "llama3_biased": lambda: _config(
        "LlamaConfig",
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=72,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "llama31_tied": lambda: _config(
        "LlamaConfig",
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=80,
        tie_word_embeddings=True,
        pad_token_id=83,
        rope_parameters=LLAMA3_ROPE,
    ),
    "qwen15": lambda: _config("Qwen2Config", num_attention_heads=4, num_key_value_heads=4, intermediate_size=96),
    "qwen25_tied": lambda: _config(
        "Qwen2Config", num_attention_heads=6, num_key_value_heads=2, intermediate_size=72, tie_word_embeddings=True
    ),
    "qwen3": lambda: _config(
        "Qwen3Config", num_attention_heads=6, num_key_value_heads=2, head_dim=16, intermediate_size=72, pad_token_id=83
    ),
    "qwen3_tied_biased": lambda: _config(
        "Qwen3Config",
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=12,
        intermediate_size=64,
        tie_word_embeddings=True,
        attention_bias=True,
    ),
    "qwen3_moe": lambda: _config(
        "Qwen3MoeConfig", num_attention_heads=6, num_key_value_heads=2, head_dim=16, norm_topk_prob=True, **EXPERTS
    ),
    "qwen3_moe_balanced": lambda: _config(
        "Qwen3MoeConfig",
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        norm_topk_prob=False,
        mlp_only_layers=[0],
        output_router_logits=True,
        router_aux_loss_coef=0.05,
        **(EXPERTS | {"num_experts": 5, "num_hidden_layers": 3}),
    ),
}


def write(name: str, folder: Path, seed: int = 0) -> Path:
    """Save a checkpoint with random biases and norms too: a zero bias would hide a bias that is not applied."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CHECKPOINTS[name](), dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder
