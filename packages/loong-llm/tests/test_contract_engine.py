"""The engine contract, applied to the megatron engine with a dense model and one with experts."""

from __future__ import annotations

from typing import Any, ClassVar

from loong_core.testing import EngineContract

DENSE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


class TestMegatronDense(EngineContract):
    planner = "megatron"
    family = "llama"
    config: ClassVar = DENSE
