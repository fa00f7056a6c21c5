"""bf16 training starts as fp32 training does: master weights hold what the bf16 parameters were rounded from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_layouts

from loong_core.testing.training import run_training


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [[(start + index) % 131 for index in range(30)] for start in range(40)]
    path.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows) + "\n")
    return path


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {}), (2, {"pp": 2})])
def test_small_updates_are_not_lost(world: int, parallel: dict, data: Path, tmp_path: Path) -> None:
    """Updates of 4e-5 are below half a step of bf16 near typical weights; masters on bf16's grid lose a quarter."""
    drops, first = {}, {}
    for precision in ("fp32", "bf16"):
        recipe = test_layouts.recipe_for("dense_tied", data, parallel) | {"precision": precision}
        recipe["optim"] = {"lr": 4e-5, "schedule": "constant", "clip": None}
        recipe["run"] = {"steps": 6, "seed": 1}
        recipe["data"]["shuffle"] = False
        losses = [row["loss"] for row in run_training(tmp_path / precision, recipe, world)]
        drops[precision], first[precision] = losses[0] - losses[-1], losses[0]
    assert first["bf16"] == pytest.approx(first["fp32"], abs=5e-3)
    assert drops["bf16"] == pytest.approx(drops["fp32"], rel=0.1)
