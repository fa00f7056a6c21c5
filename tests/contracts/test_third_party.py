"""Packages from outside, as a user has them: wheels in a clean environment, two that work beside a broken one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import CleanEnvironment

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "third_party"
WORKING = ("loong-example-model", "loong-example-backend")
TINY: dict[str, Any] = {
    "architectures": ["SeedOssForCausalLM"],
    "model_type": "seed_oss",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture(scope="module")
def outside(clean_environment: CleanEnvironment) -> CleanEnvironment:
    """The clean environment with every example installed."""
    clean_environment.install(*sorted(path.parent for path in EXAMPLES.glob("*/pyproject.toml")))
    return clean_environment


def test_loong_comes_from_wheels(outside: CleanEnvironment, tmp_path: Path) -> None:
    script = (
        "import loong_ckpt, loong_core, loong_llm as llm; print(loong_ckpt.__file__, loong_core.__file__, llm.__file__)"
    )
    paths = outside.check("python", "-c", script, cwd=tmp_path).split()
    assert all(Path(path).is_relative_to(outside.site) for path in paths), paths


def test_broken_plugins_are_isolated_and_named(outside: CleanEnvironment, tmp_path: Path) -> None:
    listed = {row["name"]: row for row in outside.json("loong", "plugins", "--json", cwd=tmp_path)["plugins"]}
    assert {name for name, row in listed.items() if row["error"] is None} == {
        *("ckpt", "core", "example_backend", "example_model", "llm", "ops", "vla")
    }
    assert listed["example_model"]["provides"] == {"model_families": ["seed_oss"]}
    assert listed["example_backend"]["provides"] == {"backends": ["example_chip"], "ops": ["rms_norm.example_chip"]}
    assert listed["example_backend"]["dist"] == "loong-example-backend"
    assert "library_of_a_vendor_who_went_away" in listed["example_import_error"]["error"]
    assert "loong_model_familys" in listed["example_misspelt"]["error"]
    assert "loong_model_families" in listed["example_misspelt"]["error"], "the nearest hook is not named"


def test_models_and_doctor_know_the_newcomers(outside: CleanEnvironment, tmp_path: Path) -> None:
    families = {row["name"]: row for row in outside.json("loong", "models", "--json", cwd=tmp_path)}
    assert families["seed_oss"]["architectures"] == ["SeedOssForCausalLM"]
    assert "qwen3" in families
    diagnosis = outside.run("loong", "doctor", cwd=tmp_path)
    assert "example_chip" in diagnosis.stdout and "Example Chip 1" in diagnosis.stdout
    assert diagnosis.returncode == 1, "broken plugins are something to be told of"


def test_missing_name_mentions_the_broken_plugins(outside: CleanEnvironment, tmp_path: Path) -> None:
    result = outside.run("loong", "train", str(recipe(tmp_path)), "model.family=seed_os", cwd=tmp_path)
    assert result.returncode == 2
    assert "Did you mean 'seed_oss'?" in result.stderr
    assert "example_import_error" in result.stderr and "example_misspelt" in result.stderr


def test_the_example_model_trains_on_the_example_backend(outside: CleanEnvironment, tmp_path: Path) -> None:
    outside.check("loong", "train", str(recipe(tmp_path)), cwd=tmp_path)
    folder = tmp_path / "runs" / "third_party"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1]["loss"] < rows[0]["loss"]
    manifest = (folder / "manifest.json").read_text()
    assert "loong-example-backend" in manifest and "loong-example-model" in manifest
    chosen = json.loads(manifest)["ops"]
    assert "example_chip" in json.dumps(chosen), chosen
    config = json.loads((folder / "hf" / "config.json").read_text())
    assert config["architectures"] == ["SeedOssForCausalLM"]


@pytest.mark.parametrize("name", WORKING)
def test_their_own_tests_pass(outside: CleanEnvironment, name: str, tmp_path: Path) -> None:
    words = ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'base'}")
    printed = outside.check(*words, str(EXAMPLES / name / "tests"), cwd=tmp_path)
    closing = printed.strip().splitlines()[-1]
    assert " passed" in closing and "failed" not in closing and "skipped" not in closing, closing


def recipe(folder: Path) -> Path:
    """Two steps of the example family on the example backend, on token ids, exported at the end."""
    rows = [
        {"input_ids": [(start * step) % 67 for step in range(1, 33)]} for start in range(1, 5)
    ]  # every step sees the same four
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.json"
    settings = {
        "run": {"name": "third_party", "dir": "runs", "steps": 2},
        "model": {"family": "seed_oss", "config": TINY},
        "data": {"source": "jsonl", "path": "rows.jsonl", "seq_len": 32, "global_batch": 4, "shuffle": False},
        "precision": "fp32",
        "backend": "example_chip",
        "optim": {"lr": 1e-2, "schedule": "constant"},
        "checkpoint": {"every": None, "export": "hf"},
    }
    path.write_text(json.dumps(settings))
    return path
