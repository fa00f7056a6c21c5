"""Modules beside the tests are importable: pytest's importlib mode puts no test folder on the path. And streams of
batches of generated episodes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loong_core.recipe import Recipe
from loong_core.types import ModelShape
from loong_vla.lerobot.generate import generate
from loong_vla.lerobot.layout import Dataset, open_dataset
from loong_vla.prompts import IMAGE, SPECIAL
from loong_vla.stream import RobotStream, stream

sys.path.insert(0, str(Path(__file__).parent))

PI05: dict[str, Any] = {
    **{"image_size": 28, "horizon": 6, "state_size": 10, "action_size": 9, "prompt_length": 64},
    **{"image_tokens": 4, "skip_padding": True},
}
GROOT: dict[str, Any] = {
    **{"image_size": [32, 32], "patch": 4, "merge": 2, "horizon": 6, "state_size": 10, "action_size": 9},
    **{"image_token": SPECIAL.index(IMAGE), "time_alpha": 1.5, "time_beta": 1.0, "time_scale": 0.999},
    **{"slots": 32, "embodiments": (10,), "image_tokens": 16, "padding_as_keys": False},
    **{"rope_sections": (2, 2, 2)},
}
Open = Callable[..., RobotStream]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return generate(
        tmp_path_factory.mktemp("data") / "set",
        episodes=4,
        frames=[9, 12, 7, 5],
        state=5,
        action=4,
        episodes_per_file=1,
    )


@pytest.fixture
def opened(data: Dataset, tmp_path: Path) -> Iterator[Open]:
    made: list[RobotStream] = []

    def open_one(
        family: str = "pi05",
        *,
        dp: int = 1,
        replica: int = 0,
        micro_batch: int = 2,
        micro_batches: int = 2,
        config: dict[str, Any] | None = None,
        fields: dict[str, Any] | None = None,
        task: dict[str, Any] | None = None,
        root: Path | None = None,
        more: dict[str, Any] | None = None,
        **options: Any,
    ) -> RobotStream:
        section = {"source": "lerobot", "path": root or data.root, "tokenizer": {"train": 320}, "options": options}
        section |= {"global_batch": dp * micro_batch * micro_batches, **(more or {})}
        recipe = Recipe.model_validate({"data": section, "run": {"seed": 5}, "task": {"options": task or {}}})
        known = {**(PI05 if family == "pi05" else GROOT), **(fields or {})}
        shape = ModelShape(family=family, fields=known, layers=1, hidden=8, parameters=(), vocabulary=320)
        run: Any = SimpleNamespace(
            recipe=recipe,
            plan=SimpleNamespace(dp=dp, micro_batch=micro_batch, micro_batches=micro_batches, recompute="none"),
            shape=shape,
            family=SimpleNamespace(name=family),
            config=config or {},
            folder=tmp_path,
            device="cpu",
            is_main=replica == 0,
            cluster=SimpleNamespace(devices_per_node=1),
        )
        made.append(stream(run, replica))
        return made[-1]

    yield open_one
    for one in made:
        one.close()


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Four episodes, of which the third's videos are gone."""
    root = tmp_path / "damaged"
    generate(root, episodes=4, frames=[9, 12, 7, 5], state=5, action=4, episodes_per_file=1)
    for clip in open_dataset(root).episodes[2].clips.values():
        (root / clip.file).unlink()
    return root
