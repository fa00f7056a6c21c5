"""A Hugging Face folder becomes a native checkpoint and comes back byte for byte, through the engine of a run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ckpt_helpers import assert_same_tensors, engine_for, make_run, read_all, save_tiny

from loong_ckpt import native
from loong_core.errors import CheckpointError


def loong(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loong_core", "ckpt", *map(str, words)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


def test_there_and_back(tmp_path: Path) -> None:
    config = save_tiny("qwen3_moe", tmp_path / "in", torch.bfloat16)
    there = loong("convert", tmp_path / "in", tmp_path / "native")
    assert there.returncode == 0, there.stderr
    with pytest.raises(CheckpointError, match="model.weights"):
        run = make_run("qwen3_moe", config, tmp_path / "run")
        native.load_checkpoint(run, engine_for(run), tmp_path / "native")
    shutil.move(tmp_path / "in", tmp_path / "moved")
    back = loong("export", tmp_path / "native", tmp_path / "out")
    assert back.returncode == 0, back.stderr
    assert_same_tensors(read_all(tmp_path / "moved"), read_all(tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "moved" / "config.json").read_bytes()


def test_wrong_input_starts_nothing(tmp_path: Path) -> None:
    found = loong("export", tmp_path / "absent", tmp_path / "out")
    assert found.returncode == 2
    assert "does not exist" in found.stderr and "Traceback" not in found.stderr
    assert not (tmp_path / "out").exists()
