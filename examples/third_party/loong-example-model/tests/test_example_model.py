"""What every plugin and every family owes; the reference is transformers' own Seed-OSS."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from loong_example_model.seed_oss import SEED_OSS, describe

from loong_core.errors import Unsupported
from loong_core.testing import FamilyContract, PluginContract

CONFIG: dict[str, Any] = {
    "model_type": "seed_oss",
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "max_position_embeddings": 128,
}


class TestPlugin(PluginContract):
    plugin = "example_model"


class TestSeedOss(FamilyContract):
    family = "seed_oss"
    config: ClassVar = CONFIG


def test_biases_are_decided_one_by_one() -> None:
    def biases(**changes: Any) -> set[str]:
        roles = {spec.role for spec in describe(SEED_OSS, {**CONFIG, **changes}).parameters}
        return {
            role.removeprefix("layers.0.attn.") for role in roles if role.startswith("layers.0.attn") and "bias" in role
        }

    assert biases() == {"qkv_bias"}
    assert biases(attention_out_bias=True) == {"qkv_bias", "out_bias"}
    assert biases(attention_bias=False) == set()


def test_dropout_of_the_public_model_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"residual_dropout.*0\.1.*model\.dropout"):
        describe(SEED_OSS, {**CONFIG, "residual_dropout": 0.1})
