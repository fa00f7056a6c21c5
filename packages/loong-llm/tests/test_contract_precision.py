"""The precision contract, applied to the core's policies."""

from __future__ import annotations

from typing import Any, ClassVar

from loong_core.testing import PrecisionContract

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


class TestFp32(PrecisionContract):
    policy = "fp32"
    family = "qwen3"
    config: ClassVar = CONFIG
    drift = 0.0


class TestBf16Gradients(PrecisionContract):
    policy = "bf16_gradients"
    family = "qwen3"
    config: ClassVar = CONFIG


class TestBf16(PrecisionContract):
    policy = "bf16"
    family = "qwen3"
    config: ClassVar = CONFIG
