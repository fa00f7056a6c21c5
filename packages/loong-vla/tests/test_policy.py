"""A policy acts as it was trained: the same inputs as the stream makes, from whichever folder it is opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from policy_tiny import make_dataset, make_run

from loong_core.cli import run as command
from loong_core.errors import CheckpointError, DataError, UserError
from loong_vla import open_policy
from loong_vla.lerobot.layout import Dataset
from loong_vla.lerobot.source import options_of
from loong_vla.lerobot.video import FrameReader
from loong_vla.open_stream import open_stream
from loong_vla.options import RobotOptions
from loong_vla.policy import Policy, load_policy, recorded, recorded_actions


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module", params=["pi05_tiny_cpu", "groot_tiny_cpu"])
def run(request: pytest.FixtureRequest, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_run(tmp_path_factory.mktemp("runs") / request.param, dataset, request.param)


def seen(policy: Policy, dataset: Dataset, episode: int = 1, frame: int = 4) -> dict[str, Any]:
    """An observation as a robot would give it."""
    with FrameReader(dataset) as reader:
        found = recorded(policy, dataset, reader, episode, frame)
    return {policy.settings.state: found.state, **found.images, "task": found.task}


def test_it_sees_what_training_sees(run: Any, dataset: Dataset) -> None:
    """Every input of a held-out batch, and the noise aside, what the model makes of it, in the robot's units."""
    stream = open_stream(run, 0)
    policy = Policy(run.model, stream.processing, options_of(run.recipe.data.options))
    batch, held = stream.eval_batches(0)[0], stream.held_out
    assert held is not None
    places = [held.samples.place(held.order.sample(position)) for position in range(4)]
    found = [recorded(policy, held.dataset, held.reader, *place) for place in places]
    made = policy._batch(found, batch["noise"].numpy())
    for name in ("images", "camera_mask", "tokens", "token_mask", "state", "state_mask", "embodiment", "noise"):
        torch.testing.assert_close(made[name], batch[name], rtol=0, atol=0)
    for row, place in enumerate(places):
        truth = recorded_actions(policy, dataset, *place)
        own = stream.processing.restore(batch["actions"][row].numpy(), found[row].state)
        np.testing.assert_allclose(own[: len(truth)], truth, atol=2e-6)
    stream.close()


def test_every_folder_gives_the_same_policy(run: Any, dataset: Dataset, tmp_path: Path) -> None:
    """The run folder and its export, with the dataset and without; statistics are those of the training."""
    other = make_dataset(tmp_path / "other", seed=7)
    first = load_policy(run.folder)
    given = seen(first, dataset)
    actions = first.act(given, seed=3)
    assert actions.shape == (8, 7) and actions.dtype == np.float32 and first.horizon == 8
    for folder, options in ((run.folder / "hf", {}), (run.folder, {"dataset": other.root})):
        np.testing.assert_array_equal(load_policy(folder, **options).act(given, seed=3), actions)
    stream = open_stream(run, 0)
    trained = Policy(run.model, stream.processing, options_of(run.recipe.data.options))
    np.testing.assert_allclose(trained.act(given, seed=3), actions, atol=1e-6)
    stream.close()


def test_a_folder_of_pi05_speaks_for_itself(dataset: Dataset, tmp_path: Path) -> None:
    """Without run folder and dataset: sizes, cameras and statistics come from LeRobot's files."""
    run = make_run(tmp_path / "runs" / "a", dataset)
    given = seen(load_policy(run.folder), dataset)
    actions = load_policy(run.folder).act(given, seed=3)
    alone = Path(shutil.copytree(run.folder / "hf", tmp_path / "alone"))
    config = json.loads((alone / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps({**config, "sizes": run.config["sizes"]}))
    policy = load_policy(alone)
    assert list(policy.cameras) == ["observation.images.front", "observation.images.wrist"]
    np.testing.assert_array_equal(policy.act(given, seed=3), actions)
    for path in alone.glob("*.safetensors"):
        if path.name.startswith("policy_"):
            path.unlink()
    with pytest.raises(DataError, match="has no statistics of `observation.state`"):
        load_policy(alone)
    load_policy(alone, dataset=dataset.root)
    (alone / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_policy(alone, dataset=dataset.root)


def test_actions_follow_seed_and_observation(run: Any, dataset: Dataset) -> None:
    policy = load_policy(run.folder)
    given = seen(policy, dataset)
    actions = policy.act(given, seed=3)
    np.testing.assert_array_equal(policy.act(given, seed=3), actions)
    changes: list[dict[str, Any]] = [
        {"observation.state": given["observation.state"] + 0.5},
        {"observation.images.front": 255 - given["observation.images.front"]},
        {"task": "hold the square still, please"},
    ]
    for change in changes:
        assert np.abs(policy.act({**given, **change}, seed=3) - actions).max() > 1e-5, change.keys()
    assert (policy.act(given, seed=4) != actions).any()
    assert (policy.act(given, seed=3, steps=1) != actions).any()
    assert (policy.act(given) != policy.act(given)).any(), "without a seed the noise goes on"
    several = [policy.observation({**given, **change}) for change in changes]
    together = policy.act_on(several, seed=3, positions=[5, 0, 5])
    for row, position in enumerate((5, 0, 5)):
        alone = policy.act_on(several[row : row + 1], seed=3, positions=[position])
        np.testing.assert_allclose(together[row], alone[0], atol=2e-5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"observation.state": np.zeros(7)}, r"has the shape \[7\], not \[8\]"),
        ({"observation.state": np.full(8, np.nan)}, "number 0 is nan"),
        ({"observation.state": np.full(8, 1e300)}, "no finite float32"),
        ({"observation.state": np.array(["a"] * 8)}, "must hold numbers"),
        ({"observation.state": [[1], [1, 2]]}, "no array of numbers"),
        ({"observation.images.front": np.zeros((24, 32, 3))}, "must be an array of uint8, not float64"),
        ({"observation.images.front": "front.png"}, "must be an array of uint8, not str"),
        ({"observation.images.front": np.zeros((3, 24, 32), np.uint8)}, "not \\[height, width, 3\\]"),
        ({"observation.images.front": np.zeros((24, 0, 3), np.uint8)}, "24 x 0 pixels"),
        ({"task": 3}, "`task` must be a text"),
        ({"task": "a" * 10_001}, "`task` must be a text"),
        ({"task": "half of a character: \ud800"}, "`task` must be a text"),
        ({"observation.images.fron": np.zeros((24, 32, 3), np.uint8)}, "does not take. Did you mean"),
    ],
)
def test_wrong_observations_are_named(change: dict[str, Any], told: str, stand_in: Policy) -> None:
    good = {"observation.state": np.zeros(8), "observation.images.front": np.zeros((24, 32, 3), np.uint8)}
    stand_in.observation(good)
    with pytest.raises(DataError, match=told):
        stand_in.observation({**good, **change})
    with pytest.raises(DataError, match="lacks `observation.images.front`"):
        stand_in.observation({"observation.state": np.zeros(8)})


@pytest.fixture
def stand_in() -> Policy:
    """A policy without a model, for what is checked before one is asked."""
    camera = SimpleNamespace(feature="observation.images.front")
    robot = SimpleNamespace(state=8, action=2, action_names=None, cameras={"observation.images.front": (24, 32)})
    return Policy(None, SimpleNamespace(cameras=[camera], robot=robot, steps=4, horizon=4))  # type: ignore[arg-type]


def test_actions_that_are_no_numbers_are_no_answer(run: Any, dataset: Dataset) -> None:
    policy = load_policy(run.folder)
    given = seen(policy, dataset)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite numbers"):
        policy.act(given)


def test_folders_without_a_policy(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("task: {name: flow_matching}\n")
    with pytest.raises(CheckpointError, match="neither a complete checkpoint nor an export"):
        load_policy(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        load_policy(tmp_path / "absent")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError):
        load_policy(other)


def test_relative_actions_of_groot_keep_their_steps(tmp_path: Path) -> None:
    """What a run of relative actions left is bounds of every step; absolute dimensions have the same in all."""
    rows = [[0.0, 5.0], [1.0, 5.0]]
    (tmp_path / "statistics.json").write_text(json.dumps({"action": {"min": rows, "max": rows}}))
    run: Any = SimpleNamespace(config={"use_relative_actions": True}, family=SimpleNamespace(name="groot_n17"))
    place = open_policy.Place(tmp_path, tmp_path)
    found = open_policy._trained_statistics(place, run, RobotOptions())
    assert found is not None and found["relative_action"] == {"min": rows, "max": rows}
    np.testing.assert_array_equal(found["action"]["min"], [0.0, 5.0])


def test_loong_generate(run: Any, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(run.folder), "--episode", "1", "--frame", "7", "--seed", "3"]
    assert command([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    policy = load_policy(run.folder)
    np.testing.assert_allclose(told["actions"], policy.act(seen(policy, dataset, 1, 7), seed=3), atol=1e-6)
    np.testing.assert_allclose(told["recorded"], recorded_actions(policy, dataset, 1, 7))
    assert len(told["recorded"]) == 5 and told["names"][-1] == "gripper" and told["task"] in dataset.tasks.values()
    assert command([*words, "--task", "wave"]) == 0
    text = capsys.readouterr().out
    assert '"wave"' in text and "error" in text and text.count("\n+") == 8 + 5
    assert command(["generate", str(run.folder), "--frame", "99"]) == 2
    assert "has the frames 0 to 13, not 99" in capsys.readouterr().err
