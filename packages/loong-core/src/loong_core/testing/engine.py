"""The contract of an engine: what the training loop may rely on, whichever planner built it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from loong_core.testing import tiny
from loong_core.testing.contract import Contract
from loong_core.testing.ranks import run_ranks

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.train.engine import Batch, Engine
    from loong_core.train.run import Run

TOLERANCE = 1e-5
"""Relative, between two ways to the same number in float32."""


class EngineContract(Contract):
    """Set `planner`, and a `family` with a tiny `config` (a config.json) for it to train.

    Families that read no text replace `batches` and `count`.
    """

    required: ClassVar[tuple[str, ...]] = ("planner", "family", "config")
    planner: ClassVar[str]
    family: ClassVar[str]
    config: ClassVar[Mapping[str, Any]]

    @classmethod
    def recipe(cls, **changes: Any) -> dict[str, Any]:
        """A tiny recipe for this planner."""
        return tiny.settings(cls.family, cls.config, parallel={"planner": cls.planner}, **changes)

    @classmethod
    def batches(cls, run: Run, step: int = 0) -> list[Batch]:
        """This rank's micro-batches of a global batch that depends on the step alone."""
        return tiny.batches(run, step)

    @classmethod
    def count(cls, batches: Sequence[Batch]) -> int:
        """What the loss counts in `batches`."""
        return sum(int((batch["targets"] != -100).sum()) for batch in batches)

    @pytest.fixture(scope="class")
    @classmethod
    def measured(cls, tmp_path_factory: pytest.TempPathFactory) -> Any:
        """Everything one process can tell, from one engine."""
        return run_ranks(1, cls._measure, tmp_path_factory.mktemp("engine"))[0]

    def test_parameters_are_those_described(self, measured: Any) -> None:
        """`parameters()` lists every described parameter once, with its described shape."""
        assert sorted(measured["roles"]) == sorted(measured["described"])

    def test_gather_gives_full_tensors(self, measured: Any) -> None:
        """In a world of one, `gather` gives every parameter, in its described shape, without padding."""
        assert measured["gathered"] == measured["described"]

    def test_loss_is_the_mean_over_counted_targets(self, measured: Any) -> None:
        """Reported losses are means; `counted` is the number of counted targets of the global batch."""
        assert measured["counted"] == measured["expected_count"]
        assert measured["cut"]["loss"] == pytest.approx(measured["whole"]["loss"], rel=TOLERANCE)

    def test_gradient_does_not_depend_on_the_cut(self, measured: Any) -> None:
        """Four micro-batches of one row and one of four rows have the same gradient norm."""
        assert measured["cut"]["norm"] == pytest.approx(measured["whole"]["norm"], rel=TOLERANCE)

    def test_step_changes_the_weights_and_clears_the_gradients(self, measured: Any) -> None:
        """The update moves the weights, and the next gradient does not contain the last one."""
        assert measured["moved"] > 0
        assert measured["again"]["norm"] == pytest.approx(measured["cut"]["norm"], rel=TOLERANCE)

    def test_learning_rate_zero_changes_nothing(self, measured: Any) -> None:
        """A step at lr 0 leaves every bit of every weight."""
        assert measured["moved_at_zero"] == 0

    def test_evaluation_leaves_no_trace(self, measured: Any) -> None:
        """`evaluate` gives the loss of `forward_backward` and changes neither gradients nor weights."""
        assert measured["evaluated"] == pytest.approx(measured["cut"]["loss"], rel=TOLERANCE)
        assert measured["moved_by_evaluation"] == 0

    def test_saved_state_continues_exactly(self, measured: Any) -> None:
        """Two steps, save, two steps; and load, two steps: the same losses and norms to the last bit."""
        assert measured["resumed"] == measured["continued"]

    def test_overwritten_weights_are_trained_on(self, measured: Any) -> None:
        """After `weights_changed`, the next step starts from the new weights."""
        assert measured["overwritten"] == pytest.approx(measured["cut"]["loss"], rel=TOLERANCE)
        assert measured["kept_after_overwriting"] == 0

    # ------------------------------------------------------------------------------------------ in the rank
    @classmethod
    def _measure(cls, rank: int, folder: Path) -> dict[str, Any]:
        run, engine = tiny.start(cls.recipe(), folder)
        start = _copy(engine)
        found: dict[str, Any] = {
            "roles": [parameter.spec.role for parameter in engine.parameters()],
            "described": {spec.role: list(spec.shape) for spec in run.shape.parameters},
            "gathered": {p.spec.role: _shape(engine.gather(p)) for p in engine.parameters()},
        }
        rows = cls.batches(run)
        found["evaluated"] = engine.evaluate(rows)["loss"]
        found["moved_by_evaluation"] = _distance(start, engine)
        reported = engine.forward_backward(rows, 0)
        engine.evaluate(cls.batches(run, 3))
        found["cut"] = {"loss": reported["loss"], "norm": engine.step(0.0)}
        found["counted"] = reported["counted"]
        found["expected_count"] = cls.count(rows)
        found["moved_at_zero"] = _distance(start, engine)
        loss = engine.forward_backward(rows, 0)["loss"]
        found["again"] = {"loss": loss, "norm": engine.step(1e-2)}
        found["moved"] = _distance(start, engine)
        _overwrite(engine, start)
        found["overwritten"] = engine.forward_backward(rows, 0)["loss"]
        engine.step(0.0)
        found["kept_after_overwriting"] = _distance(start, engine)
        found.update(cls._saved(run, engine, folder))
        engine.close()
        found["whole"] = cls._whole(folder)
        return found

    @classmethod
    def _whole(cls, folder: Path) -> dict[str, float]:
        """The first step again, with all rows in one micro-batch."""
        run, engine = tiny.start(cls.recipe(data={"micro_batch": tiny.GLOBAL_BATCH}), folder)
        loss = engine.forward_backward(cls.batches(run), 0)["loss"]
        norm = engine.step(0.0)
        engine.close()
        return {"loss": loss, "norm": norm}

    @classmethod
    def _saved(cls, run: Any, engine: Engine, folder: Path) -> dict[str, Any]:
        def advance(first: int) -> list[list[float]]:
            steps = []
            for step in (first, first + 1):
                loss = engine.forward_backward(cls.batches(run, step), step)["loss"]
                steps.append([loss, engine.step(1e-2)])
            return steps

        advance(0)
        state = folder / "state"
        state.mkdir()
        engine.save_state(state)
        continued = advance(2)
        engine.load_state(state)
        return {"continued": continued, "resumed": advance(2)}


def _shape(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)


def _copy(engine: Engine) -> dict[str, Tensor]:
    return {p.spec.role: p.tensor.detach().clone() for p in engine.parameters()}


def _distance(start: Mapping[str, Tensor], engine: Engine) -> float:
    """Largest difference of any weight."""
    return max(float((p.tensor.detach() - start[p.spec.role]).abs().max()) for p in engine.parameters())


def _overwrite(engine: Engine, weights: Mapping[str, Tensor]) -> None:
    import torch

    with torch.no_grad():
        for parameter in engine.parameters():
            parameter.tensor.copy_(weights[parameter.spec.role])
    engine.weights_changed()
