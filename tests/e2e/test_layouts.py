"""Every parallel layout trains as one process does: same initial weights, same losses, same gradient norms."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from loong_core.testing.training import run_training

SHAPES = {
    "dense": {
        "architectures": ["Qwen3ForCausalLM"],
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 88,
    },
    "dense_tied": {
        "architectures": ["Qwen3ForCausalLM"],
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 88,
        "tie_word_embeddings": True,
        "pad_token_id": 5,
    },
    "biased": {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 88,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
}
COMMON = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "head_dim": 12,
    "vocab_size": 131,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "initializer_range": 0.06,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}
LAYOUTS = [
    ("dense", 2, {"tp": 2, "sp": False}),
    ("dense", 2, {"tp": 2, "sp": True}),
    ("dense", 2, {"pp": 2}),
    ("dense", 2, {"pp": 2, "vpp": 2}),
    ("dense", 2, {"cp": 2}),
    ("dense", 2, {}),
    ("dense", 2, {"options": {"overlap": False}}),
    ("dense", 2, {"options": {"overlap": "parameters"}}),
    ("dense", 4, {"pp": 2, "vpp": 2, "options": {"overlap": "parameters"}}),
    ("dense", 1, {"recompute": "full"}),
    ("dense", 1, {"recompute": "selective"}),
    ("dense", 2, {"tp": 2, "recompute": "full"}),
    ("dense", 2, {"pp": 2, "layout": [1, 3]}),
    ("dense", 4, {"tp": 2, "pp": 2}),
    ("dense", 4, {"tp": 2, "cp": 2}),
    ("dense", 4, {"pp": 2, "cp": 2}),
    ("dense_tied", 2, {"pp": 2}),
    ("dense_tied", 2, {"tp": 2}),
    ("dense_tied", 2, {"cp": 2}),
    ("dense_tied", 4, {"tp": 2, "pp": 2}),
    ("biased", 2, {"tp": 2}),
    ("biased", 4, {"tp": 2, "pp": 2}),
    ("moe", 2, {"ep": 2}),
    ("moe", 2, {"tp": 2, "ep": 2}),
    ("moe", 2, {"tp": 2, "etp": 2}),
    ("moe", 2, {"tp": 2, "sp": True}),
    ("moe", 2, {"ep": 2, "recompute": "full"}),
    ("moe", 2, {"ep": 2, "options": {"exchange_pieces": 3}}),
    ("moe", 2, {"ep": 2, "options": {"dispatch": "alltoall"}}),
    ("moe", 2, {"ep": 2, "options": {"dispatch": "weights"}}),
    ("moe", 2, {"ep": 2, "options": {"dispatch": "weights"}, "recompute": "full"}),
    ("moe", 4, {"ep": 2, "tp": 2, "options": {"dispatch": "weights"}}),
    ("moe", 4, {"ep": 2, "pp": 2, "vpp": 2, "options": {"dispatch": "weights"}}),
    ("moe", 4, {"ep": 2, "options": {"dispatch": "weights", "bucket_size": 5000}}),
    ("moe", 4, {"ep": 2, "options": {"dispatch": "weights", "overlap": "parameters"}}),
    ("moe", 4, {"ep": 2, "tp": 2}),
    ("moe", 4, {"ep": 2, "tp": 2, "options": {"dispatch": "alltoall"}}),
    ("moe", 4, {"ep": 2, "tp": 2, "etp": 2}),
    ("moe", 4, {"ep": 2, "pp": 2}),
    ("moe", 4, {"ep": 2, "cp": 2}),
    ("moe", 4, {"ep": 2}),
]


def recipe_for(shape: str, data: Path, parallel: dict, pack: bool = True) -> dict:
    return {
        "model": {"config": SHAPES[shape] | COMMON | SHAPES[shape]},
        "data": {
            "source": "jsonl",
            "path": str(data),
            "seq_len": 32,
            "global_batch": 8,
            "micro_batch": 1,
            "shuffle": True,
            "pack": pack,
        },
        "parallel": parallel,
        "precision": "fp32",
        "backend": "cpu",
        "optim": {"lr": 1e-3, "clip": 1.0, "schedule": "cosine", "warmup": 2, "min_lr": 1e-4},
        "run": {"steps": 5, "seed": 3},
        "checkpoint": {"every": None, "export": None},
        "log": {"to": ["jsonl"]},
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 5 to 32 tokens, counting up with some stride, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = []
    for _ in range(120):
        length, start, stride = (
            int(torch.randint(*pair, (1,), generator=generator)) for pair in ((5, 33), (0, 131), (1, 4))
        )
        rows.append(json.dumps({"input_ids": [(start + stride * i) % 131 for i in range(length)]}))
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory):
    """Rows of metrics of the single-process run of a shape, trained once."""

    @cache
    def train(shape: str) -> list[dict]:
        return run_training(tmp_path_factory.mktemp("single"), recipe_for(shape, data, {}))

    return train


@pytest.mark.parametrize(
    ("shape", "world", "parallel"), LAYOUTS, ids=lambda value: str(value).replace(" ", "").replace("'", "")
)
def test_layout_equals_one_process(shape: str, world: int, parallel: dict, data: Path, single, tmp_path: Path) -> None:
    expected = single(shape)
    measured = run_training(tmp_path, recipe_for(shape, data, parallel), world)
    assert len(measured) == len(expected) == 5
    for one, many in zip(expected, measured, strict=True):
        assert many["loss"] == pytest.approx(one["loss"], abs=5e-5)
        assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert many["tokens"] == one["tokens"] and many["samples"] == one["samples"]
        assert many["lr"] == one["lr"]
    assert expected[-1]["loss"] < expected[0]["loss"]


@pytest.mark.parametrize("cut", [{"micro_batch": 2}, {"micro_batch": 4}, {"micro_batch": 8}])
def test_micro_batch_size_does_not_change_the_loss(cut: dict, data: Path, single, tmp_path: Path) -> None:
    recipe = recipe_for("dense", data, {})
    recipe["data"].update(cut)
    for one, other in zip(single("dense"), run_training(tmp_path, recipe), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
