"""The families of this package, one file of data each, and recorded `config.json` files of public sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def _load(family: str) -> dict[str, dict[str, Any]]:
    folder = files("loong_llm").joinpath("presets", family)
    entries = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".json"))
    return {name.removesuffix(".json"): json.loads(folder.joinpath(name).read_text("utf-8")) for name in entries}


def llama_presets() -> Mapping[str, Mapping[str, Any]]:
    """Size name -> config.json of LLaMA 2, 3 and 3.1."""
    return _load("llama")


def qwen3_presets() -> Mapping[str, Mapping[str, Any]]:
    """Size name -> config.json of Qwen3 dense."""
    return _load("qwen3")


def qwen2_presets() -> Mapping[str, Mapping[str, Any]]:
    """Size name -> config.json of Qwen2 and Qwen2.5."""
    return _load("qwen2")


def qwen1_5_presets() -> Mapping[str, Mapping[str, Any]]:
    """Size name -> config.json of Qwen1.5."""
    return _load("qwen1_5")


def qwen3_moe_presets() -> Mapping[str, Mapping[str, Any]]:
    """Size name -> config.json of Qwen3 with experts."""
    return _load("qwen3_moe")
