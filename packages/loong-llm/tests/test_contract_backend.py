"""The backend contract, applied to the core's backends (a backend is tried on a model, and the core has none)."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from loong_core.testing import BackendContract

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


class TestCpu(BackendContract):
    backend = "cpu"
    family = "qwen3"
    config: ClassVar = CONFIG


@pytest.mark.gpu
class TestCuda(BackendContract):
    backend = "cuda"
    family = "qwen3"
    precision = "bf16"
    config: ClassVar = CONFIG


def test_probe_of_cuda_answers_without_a_gpu() -> None:
    class TestProbe(BackendContract):
        backend = "cuda"
        family = "qwen3"
        config: ClassVar = CONFIG

    TestProbe().test_probe_is_safe_and_cheap()
    TestProbe().test_descriptor_is_plain()
