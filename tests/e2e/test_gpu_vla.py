"""The CPU-size recipes of the robot policies on a GPU, as a user runs them: in CUDA graphs, batches from processes of
their own, profiled. Without dropout, so that they can be compared with a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loong_core.backends import cuda
from loong_vla.lerobot.generate import generate

STEPS = 12
RECIPES = ("pi05_tiny_cpu", "groot_tiny_cpu")
STILL = {"diffusion_model_cfg": {"dropout": 0.0}, "vl_self_attention_cfg": {"dropout": 0.0}}
needs_gpu = pytest.mark.skipif(cuda.probe().devices == 0, reason="needs a CUDA device")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("data") / "set", episodes=5, frames=[24, 20, 31, 18, 25]).root


def train(folder: Path, name: str, recipe: str, dataset: Path, /, **more: Any) -> list[dict[str, Any]]:
    """`loong train` as a user runs it, to the end; the rows of metrics.jsonl."""
    settings = {
        "base": f"loong_vla:{recipe}",
        "run": {"name": name, "dir": str(folder), "steps": STEPS},
        "data": {"path": str(dataset), "eval": None},
        "launch": {"devices": 1},
        "checkpoint": {"every": None, "export": None},
        **({"model": {"config": STILL}} if "groot" in recipe else {}),
        **{key: value for key, value in more.items() if key != "data"},
    }
    settings["data"] |= more.get("data", {})
    path = folder / f"{name}.json"
    path.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "loong_core", "train", str(path)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpu_trains_what_a_cpu_trains(recipe: str, data: Path, tmp_path: Path) -> None:
    cpu = train(tmp_path, "cpu", recipe, data, backend="cpu", precision="fp32")
    card = {"backend": "cuda", "precision": "bf16"}
    graphs = {"planner": "torch", "options": {"cuda_graph": True}}
    eager = train(tmp_path, "eager", recipe, data, **card)
    captured = train(tmp_path, "captured", recipe, data, **card, parallel=graphs)
    apart = train(tmp_path, "apart", recipe, data, **card, parallel=graphs, data={"options": processes(recipe, 2)})
    assert "cannot be captured" not in (tmp_path / "captured" / "logs" / "rank-0000.log").read_text()
    for one, *others in zip(cpu, eager, captured, apart, strict=True):
        assert {row["tokens"] for row in others} == {one["tokens"]}
        for other in others:
            assert other["loss"] == pytest.approx(one["loss"], rel=5e-2)
    for one, two, three in zip(eager, captured, apart, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-2)
        assert three["loss"] == pytest.approx(one["loss"], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(cuda.probe().devices < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_gpus_train_as_one(recipe: str, data: Path, tmp_path: Path) -> None:
    """Gradients reduced beside the replay of a graph, in many buckets, with half of the optimizer on each."""
    card = {"backend": "cuda", "precision": "bf16"}
    found = []
    for name, devices, graph in (("alone", 1, False), ("eager", 2, False), ("graphs", 2, True)):
        options = {"cuda_graph": graph, "ahead": graph and "groot" in recipe, "bucket_size": 5000}
        parallel = {"planner": "torch", "options": options}
        found.append(train(tmp_path, name, recipe, data, **card, parallel=parallel, launch={"devices": devices}))
    assert "cannot be captured" not in (tmp_path / "graphs" / "logs" / "rank-0000.log").read_text()
    for alone, *others in zip(*found, strict=True):
        for other in others:
            assert other["tokens"] == alone["tokens"]
            assert other["loss"] == pytest.approx(alone["loss"], rel=1e-2)
            assert other["grad_norm"] == pytest.approx(alone["grad_norm"], rel=5e-2)


def processes(recipe: str, count: int) -> dict[str, Any]:
    """Options of the data source with this many processes."""
    return {"processes": count, **({"embodiment": "new_embodiment"} if "groot" in recipe else {})}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_profiled_run_ends_well(cuda_graph: bool, data: Path, tmp_path: Path) -> None:
    train(
        tmp_path,
        "profiled",
        "groot_tiny_cpu",
        data,
        backend="cuda",
        precision="bf16",
        parallel={"planner": "torch", "options": {"cuda_graph": cuda_graph}},
        log={"profile": 8},
    )
    text = (tmp_path / "profiled" / "logs" / "profile-rank-0000.txt").read_text()
    assert "_adamw_kernel" in text
    assert (tmp_path / "profiled" / "logs" / "profile-rank-0000.trace.json.gz").stat().st_size
