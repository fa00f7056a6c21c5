"""Every way a Hugging Face folder can be wrong is told from outside, with the file and the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ckpt_helpers import save_tiny

from loong_ckpt import hf_folder
from loong_core.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny("qwen3", tmp_path / "m", shard="30KB")
    return tmp_path / "m"


def problems(folder: Path) -> str:
    found = hf_folder.check(folder)
    if found:
        with pytest.raises(CheckpointError) as raised:
            hf_folder.open_folder(folder)
        assert raised.value.problems == found
    return "\n".join(found)


def rewrite(folder: Path, **changes: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def test_a_good_folder_has_no_problems(folder: Path) -> None:
    assert hf_folder.claims(folder)
    assert problems(folder) == ""


def test_folder_and_config(tmp_path: Path, folder: Path) -> None:
    assert "does not exist" in problems(tmp_path / "absent")
    assert "this is a file" in problems(folder / "config.json")
    (folder / "config.json").write_text("{")
    assert "not valid JSON" in problems(folder)
    (folder / "config.json").write_text("[]")
    assert "JSON object" in problems(folder)
    (folder / "config.json").unlink()
    assert "there is no config.json" in problems(folder)
    assert not hf_folder.claims(folder)


def test_all_problems_at_once(folder: Path) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-5])
    (folder / "config.json").unlink()
    text = problems(folder)
    assert f"names {shards[0].name}" in text and "absent" in text
    assert f"{shards[1]}" in text and "truncated" in text
    assert "there is no config.json" in text


def test_index_and_headers_must_agree(folder: Path) -> None:
    rewrite(folder, ghost=sorted(path.name for path in folder.glob("*.safetensors"))[0])
    assert "lacks tensors" in problems(folder) and "ghost" in problems(folder)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["ghost"], index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    assert "does not list: model.norm.weight" in problems(folder)


@pytest.mark.parametrize("target", ["../model.safetensors", "/etc/passwd", "pytorch_model.bin", 7, None])
def test_an_index_cannot_point_elsewhere(folder: Path, target: object) -> None:
    rewrite(folder, ghost=target)
    assert "next to it is needed" in problems(folder)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"weight_map": []}', '{"weight_map": {}}', "\x00"])
def test_broken_index(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    assert INDEX in problems(folder)


def test_pickles_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "there are no weights" in problems(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    text = problems(tmp_path)
    assert "pytorch_model.bin" in text and "save_pretrained" in text


def test_files_under_other_names_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "weights.safetensors")
    assert "Found weights.safetensors" in problems(tmp_path)
