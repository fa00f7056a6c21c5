"""Parameters that are looked at between the backward pass and the update do not go stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_models import DENSE, SPARSE

from loong_core.testing import tiny
from loong_core.testing.ranks import run_ranks

CONFIG = DENSE | {"num_hidden_layers": 3}


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


def test_what_ranks_share_is_gathered_beside_the_updates_of_experts(tmp_path: Path) -> None:
    """Of two chunks, in one order on all ranks, the experts' own after all updates."""
    sparse = SPARSE | {"num_experts": 4}

    def work(rank: int) -> list[list[str]]:
        from unittest import mock

        from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

        options = {"overlap": "parameters"}
        recipe: dict[str, Any] = tiny.settings(
            "qwen3_moe", sparse, parallel={"ep": 2, "pp": 2, "vpp": 2, "options": options}, data={"global_batch": 8}
        )
        run, engine = tiny.start(recipe | {"launch": {"devices": 4}}, tmp_path)
        log: list[str] = []
        start = _ParamAndGradBucketGroup.start_param_sync
        places = {}
        for index, chunk in enumerate(engine._wrapped):
            places |= {id(group): f"dense {index}" for group in chunk.bucket_groups}
            places |= {id(group): f"experts {index}" for group in chunk.expert_parallel_bucket_groups}
        kinds = {}
        for parameter in engine.parameters():
            if (shard := engine._optimizer.shard(parameter.trained)) is not None:
                kinds[shard.parameter.data_ptr()] = "experts" if parameter.spec.expert is not None else "dense"
        update = engine._optimizer._update

        def started(group: Any, *args: Any, **settings: Any) -> Any:
            log.append(f"gather {places[id(group)]}")
            return start(group, *args, **settings)

        def updated(parameter: Any, *args: Any, **settings: Any) -> Any:
            word = f"update {kinds[parameter.data_ptr()]}"
            if log[-1:] != [word]:
                log.append(word)
            return update(parameter, *args, **settings)

        seen = []
        with (
            mock.patch.object(_ParamAndGradBucketGroup, "start_param_sync", started),
            mock.patch.object(engine._optimizer, "_update", updated),
        ):
            for step in range(2):
                engine.forward_backward(tiny.batches(run, step), step)
                log.clear()
                engine.step(1e-2)
                seen.append(list(log))
        engine.close()
        return seen

    chunk = ["update dense", "gather dense {}", "update experts"]
    steps = [word.format(index) for index in (0, 1) for word in chunk]
    for seen in run_ranks(4, work):
        for step in seen:
            assert step == [*steps, "gather experts 0", "gather experts 1"]
