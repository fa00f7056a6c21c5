"""One H200 trains the recipe that a CPU trains: Qwen3-0.6B's shape in bf16 through Transformer Engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STEPS, COMPARED, TOLERANCE = 20, 5, 1e-2

RECIPE = {
    "run": {"steps": STEPS, "seed": 11},
    "model": {"family": "qwen3", "config": "qwen3-0.6b"},
    "data": {
        "source": "python_library",
        "tokenizer": {"train": 4096},
        "seq_len": 512,
        "global_batch": 4,
        "micro_batch": 2,
    },
    "optim": {"lr": 1e-4, "warmup": 10, "schedule": "constant"},
    "checkpoint": {"every": None, "export": None},
    "log": {"to": ["console", "jsonl"]},
}


def cuda_devices() -> int:
    from loong_core.backends import cuda

    return cuda.probe().devices


def train(folder: Path, name: str, **changes: object) -> list[dict]:
    """`loong train` as a user runs it; returns the rows of metrics.jsonl."""
    recipe = folder / f"{name}.json"
    settings = json.loads(json.dumps(RECIPE | changes))
    settings["run"] |= {"name": name, "dir": str(folder)}
    recipe.write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-m", "loong_core", "train", str(recipe)], env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


needs_gpu = pytest.mark.skipif(cuda_devices() == 0, reason="needs a CUDA device")
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}


@pytest.mark.gpu
@needs_gpu
def test_experts_in_one_grouped_matmul_train_as_on_a_cpu(tmp_path: Path) -> None:
    model = {"family": "qwen3_moe", "config": EXPERTS}
    gpu = train(tmp_path, "gpu", backend="cuda", precision="bf16", model=model)
    cpu = train(tmp_path, "cpu", backend="cpu", precision="fp32", model=model)
    for one, other in zip(cpu, gpu, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(cuda_devices() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    "parallel",
    [
        {"options": {"dispatch": "gather"}},
        {"options": {"dispatch": "alltoall"}},
        {"options": {"exchange": "collectives", "exchange_pieces": 3}},
        {"options": {"exchange": "copies"}},
        {"options": {"exchange": "copies", "exchange_pieces": 3}, "recompute": "selective"},
        {"options": {"dispatch": "weights"}},
        {"options": {"dispatch": "weights", "exchange": "copies"}},
        {"options": {"dispatch": "weights", "exchange": "copies"}, "recompute": "full"},
    ],
    ids=str,
)
def test_experts_on_two_gpus_train_as_on_one(parallel: dict[str, Any], tmp_path: Path) -> None:
    settings = {"backend": "cuda", "precision": "bf16", "model": {"family": "qwen3_moe", "config": EXPERTS}}
    one = train(tmp_path, "one", **settings, launch={"devices": 1})
    two = train(tmp_path, "two", **settings, launch={"devices": 2}, parallel={"ep": 2, **parallel})
    for single, both in zip(one, two, strict=True):
        assert both["loss"] == pytest.approx(single["loss"], abs=2e-2)
        assert both["tokens"] == single["tokens"]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_resumed_run_on_a_gpu_is_the_uninterrupted_one(family: str, tmp_path: Path) -> None:
    config = EXPERTS if family == "qwen3_moe" else "qwen3-0.6b"
    settings = {
        "backend": "cuda",
        "precision": "bf16",
        "model": {"family": family, "config": config, "dropout": 0.1},
        "checkpoint": {"every": 4, "export": "hf"},
    }
    train(tmp_path, "parts", **settings, run={"steps": 4, "seed": 11, "deterministic": True})
    parts = train(tmp_path, "parts", **settings, run={"steps": 8, "seed": 11, "deterministic": True})
    whole = train(tmp_path, "whole", **settings, run={"steps": 8, "seed": 11, "deterministic": True})
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
    assert [row["grad_norm"] for row in parts] == [row["grad_norm"] for row in whole]


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_trains_what_a_cpu_trains(tmp_path: Path) -> None:
    gpu = train(tmp_path, "gpu", backend="cuda", precision="bf16")
    data = RECIPE["data"] | {"tokenizer": str(tmp_path / "gpu" / "tokenizer")}
    cpu = train(tmp_path, "cpu", backend="cpu", precision="fp32", data=data, run=RECIPE["run"] | {"steps": COMPARED})
    if folder := os.environ.get("LOONG_RESULTS"):
        manifest = json.loads((tmp_path / "gpu" / "manifest.json").read_text())
        result = {"gpu": gpu, "cpu": cpu, "libraries": manifest["libraries"], "hardware": manifest["hardware"]}
        result["git"] = manifest["git"]
        Path(folder, "qwen3_0.6b_20_steps.json").write_text(json.dumps(result, indent=1))
    assert [row["step"] for row in gpu] == list(range(1, STEPS + 1))
    assert gpu[-1]["loss"] < 0.9 * gpu[0]["loss"]
    for one, other in zip(cpu, gpu[:COMPARED], strict=True):
        assert one["tokens"] == other["tokens"]
        assert other["loss"] == pytest.approx(one["loss"], abs=TOLERANCE)
    plan = json.loads((tmp_path / "gpu" / "plan.json").read_text())
    assert plan["ops"]["attention"]["name"] != "torch"
