"""Open-loop evaluation: errors in the robot's units, the same on every layout, drawn along an episode."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from policy_tiny import make_dataset, make_run

from loong_core.train import report
from loong_vla import evaluate
from loong_vla.evaluate import Moment, OpenLoop, along, compare, draw
from loong_vla.lerobot.layout import Dataset
from loong_vla.lerobot.source import options_of
from loong_vla.lerobot.video import FrameError, FrameReader
from loong_vla.open_stream import open_stream
from loong_vla.policy import Policy, recorded_actions


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_run(tmp_path_factory.mktemp("runs") / "a", dataset)


@pytest.fixture
def policy(run: Any) -> Any:
    stream = open_stream(run, 0)
    yield Policy(run.model, stream.processing, options_of(run.recipe.data.options))
    stream.close()


def test_errors_by_hand() -> None:
    """Two moments, two steps, two dimensions; what was not recorded does not count."""
    predicted = np.array([[[1.0, 0.0], [2.0, 4.0]], [[0.0, 1.0], [9.0, 9.0]]])
    truth = np.array([[[0.0, 0.0], [2.0, 1.0]], [[-1.0, 1.0], [0.0, 0.0]]])
    found = OpenLoop([Moment(0, 0), Moment(0, 2)], predicted, truth, np.array([[True, True], [True, False]]))
    told = found.metrics(["x", "y"])
    assert told == pytest.approx(
        {"mse": (2 / 3 + 3) / 2, "mae": (2 / 3 + 1) / 2, "mse/x": 2 / 3, "mse/y": 3, "mae/x": 2 / 3, "mae/y": 1}
    )
    nothing = found._replace(mask=np.zeros((2, 2), bool)).metrics(["x", "y"])
    assert np.isnan(list(nothing.values())).all()


def test_errors_are_those_of_the_policy(policy: Policy, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is off by a number in each dimension has that error, and a perfect one none."""
    moments = [Moment(2, 0), Moment(1, 9), Moment(3, 16)]
    off = np.arange(7) / 10

    def act_on(observations: Any, *, seed: int, positions: list[int]) -> np.ndarray:
        found = np.zeros((len(positions), 8, 7), np.float32)
        for row, position in enumerate(positions):
            truth = recorded_actions(policy, dataset, *moments[position])
            found[row, : len(truth)] = truth + off
        return found

    monkeypatch.setattr(policy, "act_on", act_on)
    with FrameReader(dataset) as reader:
        found = compare(policy, dataset, reader, moments, batch=2)
    squared, absolute = found.errors()
    np.testing.assert_allclose(absolute, off, atol=1e-6)
    np.testing.assert_allclose(squared, off**2, atol=1e-6)
    assert found.mask.sum(1).tolist() == [8, 3, 1]


def test_shares_add_up(policy: Policy, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks make equally many calls and give together what one alone does, in batches of any size."""
    moments = [Moment(0, 0), Moment(1, 9), Moment(3, 16), Moment(2, 5), Moment(3, 2)]
    calls: list[int] = []
    real = policy.act_on
    monkeypatch.setattr(policy, "act_on", lambda found, **more: calls.append(len(found)) or real(found, **more))  # type: ignore[func-returns-value]
    monkeypatch.setattr(evaluate, "_summed", lambda array, device: array)
    with FrameReader(dataset) as reader:
        whole = compare(policy, dataset, reader, moments, batch=4, seed=1)
        assert calls == [4, 1]
        calls.clear()
        shares = [compare(policy, dataset, reader, moments, batch=2, rank=rank, world=2, seed=1) for rank in range(2)]
        assert calls == [2, 1, 2, 1]
    for name in ("predicted", "recorded"):
        np.testing.assert_allclose(sum(getattr(share, name) for share in shares), getattr(whole, name), atol=2e-5)
    np.testing.assert_array_equal(shares[0].mask | shares[1].mask, whole.mask)


def test_a_frame_that_does_not_decode_is_left_out(policy: Policy, dataset: Dataset) -> None:
    moments = along(dataset, 3, policy.horizon, 9)
    assert moments == [(3, 0), (3, 8), (3, 16)]
    with FrameReader(dataset) as reader:
        whole = compare(policy, dataset, reader, moments)

        def frames(episode: Any, camera: str, wanted: list[int]) -> np.ndarray:
            if wanted == [8]:
                raise FrameError("episode 3 is damaged.", file=Path("x.mp4"))
            return reader.frames(episode, camera, wanted)

        found = compare(policy, dataset, SimpleNamespace(frames=frames), moments)  # type: ignore[arg-type]
    assert found.mask.sum(1).tolist() == [8, 0, 1] and whole.mask.sum(1).tolist() == [8, 8, 1]
    np.testing.assert_allclose(found.predicted[[0, 2]], whole.predicted[[0, 2]], atol=1e-6)


def test_while_training(run: Any, dataset: Dataset, tmp_path: Path) -> None:
    """What the loop is told, and what the report draws; the model goes on training as it was."""
    stream = open_stream(run, 0)
    engine: Any = SimpleNamespace(modules=[run.model.train()])
    run.folder = tmp_path
    told = evaluate.evaluate(run, engine, stream)
    assert run.model.training and told == evaluate.evaluate(run, engine, stream)
    names = [f"joint_{number}" for number in range(6)] + ["gripper"]
    assert list(told) == ["eval_mse", "eval_mae", *(f"eval_{kind}/{name}" for kind in ("mse", "mae") for name in names)]
    assert all(0 < value < 10 for value in told.values())
    assert told["eval_mae"] == pytest.approx(np.mean([told[f"eval_mae/{name}"] for name in names]))
    held = stream.held_out
    assert held is not None
    moments = evaluate._moments(held, 8, 8)
    first = held.samples.place(0)[0]
    assert moments[0] == (first, 0) and len(moments) == 8
    assert {moment.episode for moment in moments} <= {
        held.samples.place(number)[0] for number in range(len(held.samples))
    }
    files = sorted((tmp_path / "figures").iterdir())
    assert [path.name for path in files] == [f"open-loop-{number:02d}.json" for number in range(7)]
    page = report.write(tmp_path).read_text()
    assert "gripper: episode" in page and "mean absolute error" in page and page.count("data-chart") >= 7
    run.recipe = run.recipe.model_copy(
        update={"task": run.recipe.task.model_copy(update={"options": {"open_loop": 0}})}
    )
    assert evaluate.evaluate(run, engine, stream) == {}
    stream.close()


def test_lines_of_a_figure(tmp_path: Path) -> None:
    """Chunks of three of an episode of five frames; then moments that belong to no line."""
    predicted = np.arange(12, dtype=float).reshape(4, 3, 1)
    predicted[1, 0, 0] = np.nan
    mask = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]], bool)
    moments = [Moment(4, 0), Moment(4, 3), Moment(4, 1), Moment(5, 0)]
    draw(tmp_path, OpenLoop(moments, predicted, predicted + 1, mask), ["lift"], 4)
    told = json.loads((tmp_path / "figures" / "open-loop-00.json").read_text())
    recorded, guessed = told["series"]
    assert recorded == {"name": "recorded", "x": [0, 1, 2, 3, 4], "y": [1, 2, 3, None, 5]}
    assert guessed == {"name": "predicted", "x": [0, 1, 2, 2.5, 3, 4], "y": [0, 1, 2, None, None, 4]}
    assert told["title"] == "lift: episode 4" and "4 held-out frames" in told["note"]
