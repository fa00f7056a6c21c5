"""The contracts of engines and planners, applied to the torch engine with a decoder in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest

from loong_core.testing import EngineContract, PlannerContract, decoder


@pytest.fixture(scope="module", autouse=True)
def offered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The decoder as a plugin."""
    path = tmp_path_factory.mktemp("plugin") / "tiny_decoder_plugin.py"
    path.write_text(decoder.PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOONG_PLUGIN_FILES", str(path))
        yield


class TestTorchEngine(EngineContract):
    planner = "torch"
    family = "tiny_decoder"
    config: ClassVar = decoder.CONFIG


class TestTorchPlanner(PlannerContract):
    planner = "torch"
    family = "tiny_decoder"
    config: ClassVar = decoder.CONFIG
    layouts: ClassVar = tuple(
        {"options": options}
        for options in (
            {"shard": "none"},
            {"shard": "optimizer", "bucket_size": 900},
            {"shard": "full"},
            {"shard": "hybrid", "shard_size": 1},
        )
    )
