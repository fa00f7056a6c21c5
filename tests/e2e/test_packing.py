"""Packed samples do not see each other: losses and gradients are those of the same samples one to a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_layouts
import torch

from loong_core.testing.training import run_training

LENGTHS = (10, 12, 10, 20, 12, 32, 7, 5)
PACKS = ((0, 1, 2), (3, 4), (5,), (6, 7))
"""What next-fit makes of the lengths in rows of 32; the last row ends with padding."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(4)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [torch.randint(0, 131, (length,), generator=generator).tolist() for length in LENGTHS]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def train(
    folder: Path, data: Path, shape: str, pack: bool, rows: int, steps: int, lr: float, parallel: dict
) -> list[dict]:
    world = 2 if parallel else 1
    recipe = test_layouts.recipe_for(shape, data, parallel, pack)
    recipe["data"] |= {"shuffle": False, "global_batch": rows}
    recipe["optim"] = {"lr": lr, "schedule": "constant", "clip": None}
    recipe["run"] = {"steps": steps, "seed": 3}
    return run_training(folder, recipe, world)


@pytest.mark.parametrize(
    ("shape", "parallel"), [("dense", {}), ("moe", {}), ("dense", {"cp": 2}), ("biased", {"tp": 2})]
)
def test_training_on_packs_is_training_on_samples(shape: str, parallel: dict, data: Path, tmp_path: Path) -> None:
    packed = train(tmp_path / "packed", data, shape, True, len(PACKS), 3, 1e-3, parallel)
    apart = train(tmp_path / "apart", data, shape, False, len(LENGTHS), 3, 1e-3, {})
    for one, other in zip(apart, packed, strict=True):
        assert other["tokens"] == one["tokens"] == sum(LENGTHS) - len(LENGTHS)
        assert other["samples"] == one["samples"] == len(LENGTHS)
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4 if parallel else 1e-5)


def test_every_sample_keeps_its_own_loss(data: Path, tmp_path: Path) -> None:
    packed = train(tmp_path / "packed", data, "dense", True, 1, len(PACKS), 0.0, {})
    apart = train(tmp_path / "apart", data, "dense", False, 1, len(LENGTHS), 0.0, {})
    for row, samples in zip(packed, PACKS, strict=True):
        counts = [apart[sample]["tokens"] for sample in samples]
        losses = [apart[sample]["loss"] for sample in samples]
        expected = sum(count * loss for count, loss in zip(counts, losses, strict=True)) / sum(counts)
        assert row["tokens"] == sum(counts)
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
