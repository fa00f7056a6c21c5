"""Seed-OSS: the LLaMA block, except that the attention output has a bias switch of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loong_core import ModelFamily, ModelShape
from loong_core.errors import Unsupported
from loong_llm import shape
from loong_llm.models.llama import LLAMA

SEED_OSS = replace(
    LLAMA,
    name="seed_oss",
    summary="ByteDance Seed-OSS",
    hf_architectures=("SeedOssForCausalLM",),
    describe="loong_example_model.seed_oss:describe",
    presets=None,
    # What SeedOssConfig assumes where config.json is silent.
    arch={**LLAMA.arch, "head_dim": 128, "qkv_bias": True, "out_bias": False},
    from_hf={**LLAMA.from_hf, "out_bias": "attention_out_bias?"},
)


def describe(family: ModelFamily, config: Mapping[str, Any]) -> ModelShape:
    """As any decoder, after a look at the one setting that only this model has."""
    if rate := config.get("residual_dropout"):
        raise Unsupported(
            f"config.json: `residual_dropout` = {rate} is not supported: dropout is a setting of the run. "
            "Set it to 0.0 in model.config, and the rate in model.dropout."
        )
    return shape.describe(family, config)
