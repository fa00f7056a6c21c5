"""The recipes of the package: each is read, its options are known, and it can be planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import loong_vla
from loong_core import plugins, validate
from loong_core.cli import run, train
from loong_core.recipe_load import load
from loong_core.registry import Registry
from loong_vla.lerobot.generate import generate
from loong_vla.models.groot import n17_presets
from loong_vla.models.pi05 import presets

RECIPES = sorted(path.stem for path in (Path(loong_vla.__file__).parent / "recipes").glob("*.yaml"))
SMALL: dict[str, Any] = {
    **{"layers": 2, "hidden": 64, "ffn": 128, "heads": 4, "kv_heads": 1, "head_dim": 16, "vocabulary": 320},
    **{"expert_hidden": 32, "expert_ffn": 64, "vision_hidden": 32, "vision_ffn": 64, "vision_layers": 2},
    **{"vision_heads": 2},
}


def test_there_is_one_of_each_kind() -> None:
    assert RECIPES == ["groot_n17_finetune", "groot_tiny_cpu", "pi05_full", "pi05_libero", "pi05_tiny_cpu"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_planned(name: str, tmp_path: Path) -> None:
    words = [f"data.path={generate(tmp_path / 'set', episodes=2, frames=20).root}", "backend=cpu", "precision=fp32"]
    if "tiny" not in name:
        config = {**presets()["pi05"], "sizes": SMALL} if "pi05" in name else dict(n17_presets()["groot_n17"])
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
        words += [f"model.weights={tmp_path / 'base'}"]
        if "groot" in name:
            words += ["model.config={select_layer: 1, diffusion_model_cfg: {num_layers: 4}, embodiments: [10]}"]
    registry = Registry(plugins.load())
    prepared = validate.prepare(load(f"loong_vla:{name}", words, registry), registry, purpose="plan")
    assert prepared.plan.planner == "torch" and prepared.task.name == "flow_matching"
    horizons = {"pi05_libero": 10, "pi05_full": 50, "groot_n17_finetune": 40}
    assert prepared.shape.fields["horizon"] == horizons.get(name, 8)


def test_wrong_options_of_the_engine_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = generate(tmp_path / "set", episodes=2, frames=20).root
    for command in ("plan", "train"):
        words = [f"data.path={data}", "parallel.options.shard=fsdp", "parallel.options.emaa=1"]
        assert run([command, "groot_tiny_cpu", *words, f"run.dir={tmp_path / 'runs'}"]) == 2
        told = capsys.readouterr().err
        assert "'fsdp' is not allowed" in told and "hybrid" in told
        assert "unknown key" in told and "`ema`" in told and "loong itself" not in told
    assert not (tmp_path / "runs").exists()


def test_train_says_what_has_no_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = generate(tmp_path / "set", episodes=2, frames=20).root
    words = [f"data.path={data}", "backend=cpu", "parallel.options.compile=true"]
    registry = Registry(plugins.load())
    train._announce(validate.prepare(load("groot_tiny_cpu", words, registry), registry, purpose="plan"), tmp_path)
    said, told = capsys.readouterr()
    assert "layout" in said and "warning" not in said
    assert told == "warning: parallel.options.compile = true has no effect on the cpu backend\n"
