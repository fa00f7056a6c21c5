"""A prompt is continued from an exported folder, the same way each time, and a wrong folder is explained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loong_core.data.tokenizer import train
from loong_core.errors import CheckpointError
from loong_llm.generate import continuation, model_folder

TEXT = "def add(a, b):\n    return a + b  # äöü 数字\n"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a random model whose vocabulary is larger than its tokenizer's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("run") / "hf"
    train(iter([TEXT] * 50), 280, folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=0.5,
            eos_token_id=None,
            bos_token_id=None,
        )
    ).save_pretrained(folder)
    return folder.parent


def test_same_seed_same_text(exported: Path) -> None:
    one, again, other = (continuation(exported, "def add", 20, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert one


def test_temperature_zero_is_the_likeliest_token(exported: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported / "hf")
    model = AutoModelForCausalLM.from_pretrained(exported / "hf")
    tokens = tokenizer("def add", return_tensors="pt")["input_ids"]
    length = tokens.shape[1]
    for _ in range(12):
        scores = model(tokens).logits[0, -1, : len(tokenizer)]
        tokens = torch.cat([tokens, scores.argmax().reshape(1, 1)], dim=1)
    expected = tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert "def add" + continuation(exported, "def add", 12, temperature=0.0) == expected
    assert tokens.shape[1] == length + 12


def test_too_many_tokens_are_refused(exported: Path) -> None:
    with pytest.raises(CheckpointError, match="64 positions.*at most"):
        continuation(exported, "def add", 64)


def test_a_prompt_without_tokens_and_a_missing_template_are_refused(exported: Path) -> None:
    with pytest.raises(CheckpointError, match="Give a prompt"):
        continuation(exported, "", 4)
    with pytest.raises(CheckpointError, match="no chat template"):
        continuation(exported, "def", 4, chat=True)


def test_wrong_folders_are_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        model_folder(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="neither"):
        model_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no safetensors"):
        model_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        model_folder(tmp_path)


def loong(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loong_core", *words], capture_output=True, encoding="utf-8", check=False
    )


def test_command_line(exported: Path, tmp_path: Path) -> None:
    found = loong("generate", str(exported), "def add", "--max-new-tokens", "8", "--seed", "3", "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["continuation"] == continuation(exported, "def add", 8, seed=3)
    wrong = loong("generate", str(tmp_path), "def")
    assert wrong.returncode == 2
    assert "neither a config.json" in wrong.stderr and "Traceback" not in wrong.stderr
    crowded = loong("generate", str(exported), "def", "--max-new-tokens", "99")
    assert crowded.returncode == 2
    assert "at most" in crowded.stderr and "Traceback" not in crowded.stderr
