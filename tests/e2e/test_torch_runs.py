"""Whole runs on the torch engine: stopped by a power cut and continued, as they were or on other ranks."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loong_core.testing import decoder
from loong_core.testing.ranks import RankError
from loong_core.testing.training import POWER_CUT, run_training

EXACT = ("loss", "grad_norm", "lr", "tokens", "samples")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(4)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lengths = torch.randint(4, 25, (40,), generator=generator).tolist()
    rows = [torch.randint(0, 61, (length,), generator=generator).tolist() for length in lengths]
    path.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows) + "\n")
    return path


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Offer the decoder to the ranks; with `kill_at` every rank is killed after that step."""

    def offer(kill_at: int | None = None) -> None:
        path = tmp_path / f"decoder_until_{kill_at}.py"
        path.write_text(decoder.PLUGIN + ("" if kill_at is None else POWER_CUT.format(step=kill_at)))
        monkeypatch.setenv("LOONG_PLUGIN_FILES", str(path))

    return offer


def recipe(data: Path, **options: Any) -> dict[str, Any]:
    return {
        "run": {"steps": 6, "seed": 3},
        "model": {"family": "tiny_decoder", "config": decoder.CONFIG, "dropout": 0.1},
        "data": {"path": str(data), "pack": False, "seq_len": 24, "global_batch": 4, "micro_batch": 1},
        "parallel": {"options": {"ema": 0.9, "export": "ema", **options}},
        "precision": "bf16",
        "backend": "cpu",
        "optim": {"lr": 2e-3, "eps": 1e-3, "schedule": "constant"},
        "checkpoint": {"every": 3, "export": "hf"},
    }


def padded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in EXACT} for row in rows]


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, "optimizer"), (2, "optimizer")), ((2, "full"), (1, "none"))],
)
def test_a_run_continues_after_a_power_cut(
    before: tuple[int, str], after: tuple[int, str], data: Path, tmp_path: Path, offer: Any
) -> None:
    offer()
    whole = run_training(tmp_path / "whole", recipe(data, shard=before[1]), before[0])
    offer(kill_at=4)
    with contextlib.suppress(RankError):
        run_training(tmp_path / "parts", recipe(data, shard=before[1]), before[0])
    offer()
    resumed = run_training(tmp_path / "parts", recipe(data, shard=after[1]), after[0])
    assert [row["step"] for row in resumed] == [row["step"] for row in whole] == list(range(1, 7))
    one, other = (load_file(tmp_path / part / "run" / "hf" / "model.safetensors") for part in ("whole", "parts"))
    assert sorted(one) == sorted(other) and "layers.1.q" in one
    if before == after:
        assert padded(resumed) == padded(whole)
        assert all(torch.equal(one[name], other[name]) for name in one)
    else:  # dropout differs between ranks
        assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in whole], rel=2e-2)
    plan = json.loads((tmp_path / "parts" / "run" / "plan.json").read_text())
    assert "torch" in json.dumps(plan)
