"""The CPU-size recipes of the robot policies: they train, continue exactly where they stopped, and on two ranks too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loong_core.testing.ranks import RankError
from loong_core.testing.training import run_training
from loong_vla.lerobot.generate import generate

EXACT = ("loss", "grad_norm", "lr", "tokens", "samples")
RECIPES = ("pi05_tiny_cpu", "groot_tiny_cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("data") / "set", episodes=5, frames=[24, 20, 31, 18, 25]).root


def recipe_for(name: str, data: Path, **more: Any) -> dict[str, Any]:
    return {"base": f"loong_vla:{name}", "data": {"path": str(data)}, "launch": {"devices": 1}, **more}


@pytest.fixture(scope="module", params=RECIPES)
def whole(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Any]:
    """A run that nothing stopped: recipe, folder, metrics."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, run_training(folder, recipe_for(request.param, data))


def exported(folder: Path) -> dict[str, torch.Tensor]:
    (found,) = folder.glob("*/hf/model*.safetensors")
    return load_file(found)


def test_twenty_steps_are_trained_evaluated_and_exported(whole: tuple[str, Path, Any]) -> None:
    _, folder, rows = whole
    losses = [row["loss"] for row in rows]
    assert len(rows) == 20 and sum(losses[-5:]) < sum(losses[:5])
    assert rows[-1]["eval_loss"] > 0 and all(row["samples"] == 8 for row in rows)
    (config,) = folder.glob("*/hf/config.json")
    assert config.stat().st_size > 0
    assert all(bool(tensor.isfinite().all()) for tensor in exported(folder).values())


def test_a_resumed_run_is_the_one_that_never_stopped(whole: tuple[str, Path, Any], data: Path, tmp_path: Path) -> None:
    name, folder, rows = whole
    run_training(tmp_path, recipe_for(name, data), kill_at=12)
    resumed = run_training(tmp_path, recipe_for(name, data))
    assert [row["step"] for row in resumed] == list(range(1, 21))
    for one, other in zip(rows, resumed, strict=True):
        assert {key: one[key] for key in EXACT} == {key: other[key] for key in EXACT}
    assert rows[-1]["eval_loss"] == resumed[-1]["eval_loss"]
    one, other = exported(folder), exported(tmp_path)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_train_as_one(name: str, data: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"run": {"steps": 6}}
    if name == "groot_tiny_cpu":  # dropout is drawn by rank
        still = {"diffusion_model_cfg": {"dropout": 0.0}, "vl_self_attention_cfg": {"dropout": 0.0}}
        more["model"] = {"config": still}
    one, two = (run_training(tmp_path / str(world), recipe_for(name, data, **more), world) for world in (1, 2))
    for alone, shared in zip(one, two, strict=True):
        assert shared["tokens"] == alone["tokens"] and shared["samples"] == alone["samples"] == 8
        assert shared["loss"] == pytest.approx(alone["loss"], rel=2e-4)
        assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=2e-3)
    assert two[-1]["eval_loss"] == pytest.approx(one[-1]["eval_loss"], rel=2e-3)


VIDEOS_VANISH = """
from pathlib import Path
from loong_core.hookspecs import hookimpl

@hookimpl
def loong_run_start(run):
    for path in Path({root!r}).glob("videos/*/chunk-000/file-002.mp4"):
        path.unlink(missing_ok=True)
"""


def test_past_its_quota_of_broken_frames_a_run_stops_with_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = generate(tmp_path / "set", episodes=4, frames=20, episodes_per_file=1).root
    (tmp_path / "vanish.py").write_text(VIDEOS_VANISH.format(root=str(root)))
    monkeypatch.setenv("LOONG_PLUGIN_FILES", str(tmp_path / "vanish.py"))
    recipe = recipe_for("pi05_tiny_cpu", root)
    recipe["data"] |= {"eval": None, "options": {"skip_quota": 4}}
    with pytest.raises(RankError, match=r"6 samples could not be decoded(.|\n)*skip_quota: 4 allows(.|\n)*episode 2"):
        run_training(tmp_path / "runs", recipe)
    (metrics,) = tmp_path.glob("runs/*/metrics.jsonl")
    stopped = len(metrics.read_text().splitlines())
    saved = [path.name for path in metrics.parent.glob("checkpoints/step-*")]
    assert stopped < 10 and saved == [f"step-{stopped:08d}"]
    (log,) = metrics.parent.glob("logs/rank-0000.log")
    assert log.read_text().count("Another sample takes its place") == 6
