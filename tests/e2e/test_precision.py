"""bf16 training starts as fp32 training does: master weights hold what the bf16 parameters were rounded from. With
gradients summed in bfloat16 it stays close to that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_layouts
import torch

from loong_core.testing import tiny
from loong_core.testing.ranks import run_ranks
from loong_core.testing.training import run_training
from loong_core.types import PrecisionPolicy


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


def _gradients(rank: int, recipe: dict, folder: Path) -> tuple[dict, float, float]:
    """Every gradient of a step as the buffers hold it, the norm that the update reports, and that of the buffers."""
    run, engine = tiny.start(recipe, folder)
    engine.forward_backward(tiny.batches(run), 0)
    found = {parameter.spec.role: parameter.gradient.clone() for parameter in engine.parameters()}
    exact = sum(float(gradient.double().square().sum()) for gradient in found.values()) ** 0.5
    dtypes = {str(gradient.dtype) for gradient in found.values()}
    assert dtypes == {"torch.float32" if recipe["precision"] == "bf16" else "torch.bfloat16"}
    values = {role: gradient.float().flatten().tolist() for role, gradient in found.items()}
    return values, engine.step(1e-3), exact * float(engine.gradient_scale)


@pytest.mark.parametrize("shape", ["dense_tied", "moe"])
@pytest.mark.parametrize(("micro_batch", "limit"), [(4, 0.0), (1, 1e-2)])
def test_gradients_in_bfloat16(shape: str, micro_batch: int, limit: float, tmp_path: Path) -> None:
    """Of one micro-batch they are those of bf16, rounded once; of four they are close; their norm is not rounded."""
    config = test_layouts.SHAPES[shape] | test_layouts.COMMON | test_layouts.SHAPES[shape]
    family = "qwen3_moe" if shape == "moe" else "qwen3"
    (wide, _, _), (narrow, norm, exact) = (
        run_ranks(
            1, _gradients, tiny.settings(family, config, precision=policy, data={"micro_batch": micro_batch}), tmp_path
        )[0]
        for policy in ("bf16", "bf16_gradients")
    )
    assert norm == pytest.approx(exact, rel=1e-5)
    for role, values in wide.items():
        expected, found = torch.tensor(values), torch.tensor(narrow[role])
        assert float((found - expected.bfloat16()).norm()) <= limit * float(expected.norm()), role


@pytest.mark.parametrize(
    ("shape", "world", "parallel"),
    [("dense_tied", 1, {}), ("dense_tied", 2, {}), ("moe", 2, {"ep": 2}), ("dense", 2, {"tp": 2, "sp": True})],
)
def test_gradients_in_bfloat16_train_as_bf16_does(
    shape: str, world: int, parallel: dict, data: Path, tmp_path: Path
) -> None:
    found, planned = {}, {}
    for precision in ("bf16", "bf16_gradients"):
        recipe = test_layouts.recipe_for(shape, data, parallel) | {"precision": precision}
        recipe["run"] = {"steps": 6, "seed": 1, "name": "run"}
        found[precision] = run_training(tmp_path / precision, recipe, world)
        planned[precision] = json.loads((tmp_path / precision / "run" / "plan.json").read_text())["memory"]
    for one, other in zip(found["bf16"], found["bf16_gradients"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-2)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-2)
        assert other["tokens"] == one["tokens"]
    losses = [row["loss"] for row in found["bf16_gradients"]]
    assert losses[-1] < losses[0] - 0.05
    assert planned["bf16_gradients"]["gradients"] * 2 == planned["bf16"]["gradients"]


def test_a_resumed_run_with_gradients_in_bfloat16_is_the_one_that_never_stopped(data: Path, tmp_path: Path) -> None:
    recipe = test_layouts.recipe_for("dense", data, {}) | {"precision": "bf16_gradients"}
    recipe["run"], recipe["checkpoint"] = {"steps": 8, "seed": 3}, {"every": 5, "export": None}
    whole = run_training(tmp_path / "whole", recipe, 2)
    run_training(tmp_path / "parts", recipe, 2, kill_at=6)
    resumed = run_training(tmp_path / "parts", recipe, 2)
    assert [row["step"] for row in resumed] == list(range(1, 9))
    for one, other in zip(whole, resumed, strict=True):
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])


def test_gradients_in_a_dtype_that_megatron_core_has_no_buffers_for_are_refused() -> None:
    def work(rank: int) -> list[str | bool]:
        from loong_core.errors import Unsupported
        from loong_core.parallel.megatron import _sums_in_float32

        found: list[str | bool] = []
        for parameters, gradients in (("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")):
            policy = PrecisionPolicy(name="odd", parameters=parameters, activations=parameters, gradients=gradients)
            try:
                found.append(_sums_in_float32(policy))
            except Unsupported as error:
                found.append(str(error))
        return found

    wide, narrow, refused = run_ranks(1, work, megatron=True)[0]
    assert (wide, narrow) == (True, False)
    assert "precision odd" in refused and "not in bfloat16" in refused
