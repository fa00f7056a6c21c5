"""Parameters that are looked at between the backward pass and the update do not go stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loong_core.testing import tiny
from loong_core.testing.ranks import run_ranks

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}


def losses(folder: Path, looks: bool) -> list[float]:
    recipe: dict[str, Any] = tiny.settings(
        "qwen3", CONFIG, parallel={"options": {"overlap": True, "bucket_size": 5000}}, launch={"devices": 2}
    )
    run, engine = tiny.start(recipe, folder)
    found = []
    for step in range(4):
        found.append(engine.forward_backward(tiny.batches(run, step), step)["loss"])
        if looks:
            assert sum(1 for _ in engine.parameters()) > 0
        engine.step(5e-2)
    engine.close()
    return found


def test_looking_at_parameters_before_the_update_changes_nothing(tmp_path: Path) -> None:
    def compare(rank: int) -> tuple[list[float], list[float]]:
        return losses(tmp_path, False), losses(tmp_path, True)

    for plain, looked in run_ranks(2, compare):
        assert plain == looked
