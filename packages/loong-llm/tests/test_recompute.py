"""Layers that are computed again have the gradients of those that are not, whatever is frozen beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import DENSE, SPARSE

from loong_core.testing import tiny
from loong_core.testing.ranks import run_ranks

CONFIG = SPARSE | {"mlp_only_layers": [1]}
BELOW = ["embed", "layers.0.*"]
ALL_BUT_EXPERTS = ["embed", "head", "final_norm", "layers.*.attn.*", "layers.*.mlp.*", "layers.*.moe.router"]


@pytest.mark.parametrize(
    ("family", "config", "freeze", "parallel"),
    [
        ("qwen3", DENSE, ["embed"], {}),
        ("qwen3", DENSE | {"tie_word_embeddings": True}, ["embed"], {}),
        ("qwen3", DENSE, ["embed"], {"pp": 2}),
        ("qwen3", DENSE, BELOW, {"pp": 2, "vpp": 2}),
        ("qwen3", DENSE, ["embed", "layers.0.*", "layers.1.*"], {"tp": 2}),
        ("qwen3_moe", CONFIG, ["embed"], {"ep": 2}),
        ("qwen3_moe", CONFIG, BELOW, {"ep": 2, "options": {"dispatch": "weights"}}),
        ("qwen3_moe", CONFIG, ALL_BUT_EXPERTS, {"ep": 2, "options": {"dispatch": "weights"}}),
        ("qwen3_moe", CONFIG, ["embed", "layers.0.*", "layers.2.moe.router"], {"ep": 2}),
    ],
    ids=str,
)
def test_what_is_frozen_does_not_change_what_is_trained(
    family: str, config: dict[str, Any], freeze: list[str], parallel: dict[str, Any], tmp_path: Path
) -> None:
    def norms(rank: int, recompute: str) -> list[float]:
        settings = tiny.settings(
            family,
            config,
            model={"family": family, "config": config, "freeze": freeze},
            parallel={**parallel, "recompute": recompute},
            launch={"devices": 2},
        )
        run, engine = tiny.start(settings, tmp_path)
        found = []
        for step in range(3):
            found.append(engine.forward_backward(tiny.batches(run, step), step)["loss"])
            found.append(engine.step(1e-2))
        engine.close()
        return found

    def work(rank: int) -> list[list[float]]:
        return [norms(rank, recompute) for recompute in ("none", "full")]

    for kept, again in run_ranks(2, work):
        assert tiny.worst(again, kept) < 1e-5
        assert min(kept) > 1e-3, "something is trained"
