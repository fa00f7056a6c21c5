"""A resumed run is the run that never stopped; under another layout it goes on with the same losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_layouts
import torch
from safetensors.torch import load_file

from loong_core.testing.training import run_training

EXACT = ("loss", "grad_norm", "lr", "tokens", "samples")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(2)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lengths = torch.randint(4, 33, (60,), generator=generator).tolist()
    rows = [torch.randint(0, 131, (length,), generator=generator).tolist() for length in lengths]
    path.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows) + "\n")
    return path


def recipe_for(shape: str, data: Path, parallel: dict, **model: float) -> dict:
    recipe = test_layouts.recipe_for(shape, data, parallel)
    recipe["run"] = {"steps": 8, "seed": 3}
    recipe["checkpoint"] = {"every": 5, "export": "hf", "keep": 2}
    recipe["model"] |= model
    return recipe


def stopped_after(folder: Path, recipe: dict, world: int) -> list[dict]:
    """Train until a power cut at step 6, one step after the checkpoint."""
    return run_training(folder, recipe, world, kill_at=6)


@pytest.mark.parametrize(
    ("shape", "world", "parallel"),
    [("dense", 1, {}), ("dense", 2, {}), ("moe", 2, {"ep": 2}), ("dense_tied", 4, {"tp": 2, "pp": 2})],
)
def test_resume_is_bit_exact(shape: str, world: int, parallel: dict, data: Path, tmp_path: Path) -> None:
    recipe = recipe_for(shape, data, parallel, dropout=0.1)
    whole = run_training(tmp_path / "whole", recipe, world)
    stopped_after(tmp_path / "parts", recipe, world)
    resumed = run_training(tmp_path / "parts", recipe, world)
    assert [row["step"] for row in resumed] == [row["step"] for row in whole] == list(range(1, 9))
    for one, other in zip(whole, resumed, strict=True):
        assert {name: one[name] for name in EXACT} == {name: other[name] for name in EXACT}
    one, other = (load_file(tmp_path / part / "run" / "hf" / "model.safetensors") for part in ("whole", "parts"))
    assert sorted(one) == sorted(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("shape", "before", "after"),
    [
        ("dense", (4, {"tp": 2, "pp": 2}), (1, {})),
        ("dense", (1, {}), (2, {})),
        ("dense_tied", (2, {"pp": 2}), (2, {"tp": 2})),
        ("moe", (2, {"ep": 2}), (1, {})),
        ("moe", (4, {"ep": 2, "tp": 2}), (2, {"pp": 2})),
        ("moe", (1, {}), (2, {"ep": 2})),
    ],
)
def test_resume_under_another_layout(
    shape: str, before: tuple[int, dict], after: tuple[int, dict], data: Path, tmp_path: Path
) -> None:
    whole = run_training(tmp_path / "whole", recipe_for(shape, data, {}), 1)
    stopped_after(tmp_path / "parts", recipe_for(shape, data, before[1]), before[0])
    resumed = run_training(tmp_path / "parts", recipe_for(shape, data, after[1]), after[0])
    assert [row["step"] for row in resumed] == list(range(1, 9))
    for one, other in zip(whole[5:], resumed[5:], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=2e-5)
        assert other["tokens"] == one["tokens"]
