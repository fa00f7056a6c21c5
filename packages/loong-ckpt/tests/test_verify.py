"""`loong ckpt` says what a checkpoint holds and finds what is wrong with it, with the exit codes scripts rely on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ckpt_helpers import engine_for, make_run, save_tiny
from typer.testing import CliRunner

from loong_ckpt import native, verify
from loong_ckpt.cli import app
from loong_core.errors import CheckpointError


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    save_tiny("qwen3_moe", tmp_path / "m", shard="40KB")
    return tmp_path / "m"


@pytest.fixture
def run(tmp_path: Path, hf_folder: Path) -> Any:
    config = json.loads((hf_folder / "config.json").read_text())
    run = make_run("qwen3_moe", config, tmp_path / "run", model={"weights": hf_folder})
    for step in (1, 2):
        native.save_checkpoint(run, engine_for(run), {"row": step}, step)
    return run


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_inspect_hf(hf_folder: Path) -> None:
    found = json.loads(call("inspect", hf_folder, "--json").stdout)
    assert (found["kind"], found["architecture"]) == ("hf", "Qwen3MoeForCausalLM")
    assert found["parameters"] * 4 == found["size"]
    assert found["parameters_by_dtype"] == {"F32": found["parameters"]}
    assert found["tensors"]["model.norm.weight"]["shape"] == [48]
    text = call("inspect", hf_folder).stdout
    assert "model.layers.*.mlp.experts.*.up_proj.weight" in text
    assert f"{found['parameters']:,}" in text
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in call("inspect", hf_folder, "--all").stdout


def test_inspect_native_and_run_folder(run: Any) -> None:
    found = json.loads(call("inspect", run.folder, "--json").stdout)
    assert (found["kind"], found["step"], found["data"]) == ("native", 2, {"row": 2})
    assert found["size"] == sum(found["files"].values())
    assert "qwen3_moe" in call("inspect", run.folder / "checkpoints").stdout


def test_verify_native(run: Any) -> None:
    assert "all hashes match" in call("verify", run.folder).stdout
    path = run.folder / "checkpoints" / "step-00000002"
    (path / "stray.txt").write_text("")
    report = json.loads(call("verify", path, "--json").stdout)
    assert report["ok"] and "stray.txt" in report["notes"][0]
    target = next((path / "engine").iterdir())
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)
    broken = call("verify", path, "--json")
    assert broken.exit_code == 2
    assert not json.loads(broken.stdout)["ok"] and "SHA-256" in json.loads(broken.stdout)["problems"][0]
    assert isinstance(call("verify", path).exception, CheckpointError)


def test_verify_hf(hf_folder: Path) -> None:
    report = verify.verify(hf_folder)
    assert report.kind == "hf" and not report.problems and not report.notes
    assert report.size == sum(file.stat().st_size for file in hf_folder.glob("*.safetensors"))
    index = hf_folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["metadata"]["total_size"] += 1
    index.write_text(json.dumps(content))
    (hf_folder / "other.safetensors").write_bytes(b"")
    notes = verify.verify(hf_folder).notes
    assert "total_size" in notes[0] and "other.safetensors" in notes[1]
    next(hf_folder.glob("model-*")).unlink()
    assert call("verify", hf_folder, "--json").exit_code == 2


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json"):
        verify.find(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        verify.find(tmp_path / "absent")
