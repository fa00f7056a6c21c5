"""Batches of generated episodes: the same however they are cut, counted right, and going on when frames fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loong_core.errors import DataError, RecipeError
from loong_vla.lerobot.generate import generate
from loong_vla.lerobot.layout import Dataset
from loong_vla.prompts import IMAGE, SPECIAL
from loong_vla.stream import RobotStream

Open = Callable[..., RobotStream]


def test_shapes_and_types(opened: Open) -> None:
    batch = opened(cameras=["observation.images.front", None, "observation.images.wrist"]).batches(0)[1]
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "images": ((2, 3, 28, 28, 3), torch.uint8),
        "camera_mask": ((2, 3), torch.bool),
        "tokens": ((2, 64), torch.int64),
        "token_mask": ((2, 64), torch.bool),
        "state": ((2, 10), torch.float32),
        "state_mask": ((2, 10), torch.bool),
        "actions": ((2, 6, 9), torch.float32),
        "action_mask": ((2, 6, 9), torch.bool),
        "noise": ((2, 6, 9), torch.float32),
        "time": ((2,), torch.float32),
        "embodiment": ((2,), torch.int64),
    }
    found = {name: (tuple(value.shape), value.dtype) for name, value in batch.items() if not name.startswith("pack_")}
    assert found == expected
    assert batch["pack_images"].tolist() == [0, 2, 3, 5], "the batch brings the order of its rows"
    assert batch["camera_mask"].tolist() == [[True, False, True]] * 2
    assert batch["images"][:, 1].max() == 0 and batch["images"][:, 0].max() > 0
    assert batch["state_mask"].sum() == 2 * 5 and batch["action_mask"][..., 4:].sum() == 0
    assert batch["actions"][..., 4:].abs().max() == 0 and batch["noise"][..., 4:].abs().max() > 0
    assert ((batch["time"] > 0.001) & (batch["time"] <= 1)).all()


@pytest.mark.parametrize("family", ["pi05", "groot_n17"])
def test_a_step_is_the_same_however_it_is_cut(opened: Open, family: str) -> None:
    def whole(streams: list[RobotStream], step: int) -> dict[str, torch.Tensor]:
        parts = [one.batches(step) for one in streams]
        rows = [part[number] for number in range(len(parts[0])) for part in parts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0] if not name.startswith("pack_")}

    reference = opened(family, micro_batch=4, micro_batches=1)
    for settings in (
        {"dp": 2, "micro_batch": 2, "micro_batches": 1},
        {"dp": 2, "micro_batch": 1, "micro_batches": 2},
        {"dp": 1, "micro_batch": 1, "micro_batches": 4},
    ):
        streams = [opened(family, replica=replica, threads=3, **settings) for replica in range(settings["dp"])]
        for step in (0, 1, 9):
            expected, found = whole([reference], step), whole(streams, step)
            assert expected.keys() == found.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_what_was_asked_for_before_does_not_matter(opened: Open) -> None:
    first, second = opened(), opened()
    forward = [first.batches(step) for step in range(4)]
    for step in (2, 0, 3):
        for ours, theirs in zip(second.batches(step), forward[step], strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_epoch_holds_every_frame_once_as_the_dataset_has_it(opened: Open, data: Dataset) -> None:
    found = opened(micro_batch=11, micro_batches=3, normalise={"state": "identity", "action": "identity"})
    made = found.batches(0)
    batch = {name: torch.cat([part[name] for part in made]) for name in ("state", "actions")}
    rows = []
    for episode in data.episodes:
        columns = data.columns(episode, ["observation.state", "action"])
        for frame in range(episode.length):
            steps = np.minimum(frame + np.arange(6), episode.length - 1)
            rows.append((columns["observation.state"][frame], columns["action"][steps]))
    assert len(rows) == 33 == found.samples(0)
    order = [found.train.order.sample(position) for position in range(33)]
    assert sorted(order) == list(range(33))
    for position, number in enumerate(order):
        np.testing.assert_array_equal(batch["state"][position, :5], rows[number][0])
        np.testing.assert_array_equal(batch["actions"][position, :, :4], rows[number][1])


@pytest.mark.parametrize(
    ("family", "count", "drop_tail"),
    [
        ("pi05", "auto", None),
        ("pi05", "recorded", None),
        ("pi05", "everything", None),
        ("pi05", "recorded", True),
        ("groot_n17", "auto", False),
        ("groot_n17", "auto", None),
        ("groot_n17", "dimensions", False),
    ],
)
def test_tokens_are_the_counted_elements(opened: Open, family: str, count: str, drop_tail: bool | None) -> None:
    found = opened(family, task={"count": count}, drop_tail=drop_tail, micro_batch=5)
    for step in range(4):
        masks = [batch["action_mask"] for batch in found.batches(step)]
        assert sum(int(mask.sum()) for mask in masks) == found.tokens(step)
    if family != "pi05" and drop_tail is None:
        assert len(found.train.samples) == 4 + 7 + 2 and found.tokens(0) == 10 * 6 * 4


def test_groot_zeroes_what_it_does_not_count(opened: Open) -> None:
    for batch in opened("groot_n17", drop_tail=False, micro_batch=16).batches(0):
        mask = batch["action_mask"]
        assert mask.any() and not mask[..., :4].all() and batch["actions"][~mask].abs().max() == 0
        assert batch["embodiment"].tolist() == [10] * 16
        assert batch["images"].shape[1:] == (2, 32, 32, 3)
        image = batch["tokens"] == SPECIAL.index(IMAGE)
        assert image.sum(1).tolist() == [2 * 16] * 16


def test_held_out_episodes(opened: Open) -> None:
    found = opened(more={"eval": {"fraction": 0.3, "batches": 50}}, micro_batch=3, task={"count": "recorded"})
    assert found.held_out is not None
    places = [
        {part.samples.place(number)[0] for number in range(len(part.samples))} for part in (found.train, found.held_out)
    ]
    assert not places[0] & places[1] and places[0] | places[1] == {0, 1, 2, 3}
    count = len(found.held_out.samples)
    assert found.eval_count == -(-count // 6)
    counted = 0
    for index in range(found.eval_count):
        for batch, again in zip(found.eval_batches(index), found.eval_batches(index + found.eval_count), strict=True):
            assert all(torch.equal(batch[name], again[name]) for name in batch)
            counted += int(batch["action_mask"].sum())
    assert counted == int(found.processing.counted(found.held_out.samples.remaining(range(count))).sum())


def test_a_held_out_dataset(opened: Open, tmp_path: Path) -> None:
    other = generate(tmp_path / "other", episodes=1, frames=8, state=5, action=4, seed=9)
    found = opened(more={"eval": {"path": other.root}})
    assert found.held_out is not None and len(found.held_out.samples) == 8 and len(found.train.samples) == 33


def test_frames_that_do_not_decode_are_replaced_and_named(
    opened: Open, damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"root": damaged, "micro_batch": 11, "micro_batches": 3}
    found = opened(**settings)
    assert found.skipped == [] and found.problem() is None
    with caplog.at_level("WARNING"):
        batches = found.batches(0)
    replaced = {(item.episode, item.frame) for item in found.skipped}
    assert {episode for episode, _ in replaced} == {2} and {frame for _, frame in replaced} == set(range(7))
    assert found.problem() is None
    assert "episode 2" in caplog.text and ".mp4" in caplog.text and "Another sample takes its place" in caplog.text
    same = opened(**settings, threads=3, skip_quota=len(found.skipped) - 1)
    for ours, theirs in zip(same.batches(0), batches, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    problem = same.problem()
    assert problem is not None and "skip_quota" in problem and "episode 2" in problem


def test_nothing_decodes(opened: Open, damaged: Path) -> None:
    """No rank raises, which would leave the others waiting: the step counts nothing, and the run is asked to stop."""
    found = opened(root=damaged, episodes=[2], skip_quota=10**6)
    for batch in found.batches(0):
        assert not batch["action_mask"].any() and not batch["images"].any()
        assert batch["actions"].isfinite().all()
    problem = found.problem()
    assert problem is not None and "32 samples in a row could not be decoded" in problem and "episode 2" in problem


def test_resume_goes_on_where_it_was(opened: Open) -> None:
    first = opened()
    expected = [first.batches(step) for step in range(3)]
    second = opened()
    second.batches(0)
    third = opened()
    assert third.load_state(second.state()) == 1
    for ours, theirs in zip(third.batches(1), expected[1], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert opened(skip_quota=3, threads=1, ahead=1).load_state(second.state()) == 1


def test_resume_on_other_data_is_refused(opened: Open) -> None:
    state = opened().state()
    with pytest.raises(DataError) as error:
        opened(episodes=[0, 1], drop_tail=True, more={"shuffle": False}).load_state(state)
    text = str(error.value)
    assert "episodes: was" in text and "drop tail: was False, is True" in text and "shuffle: was True" in text


def test_augmentation_is_drawn_for_training_alone(opened: Open) -> None:
    found = opened(augment="openpi", more={"eval": {"fraction": 0.3}})
    batch = found.batches(0)[0]
    assert batch["augmentation"].shape == (2, 2, 7) and batch["augmentation"].dtype == torch.float32
    assert batch["augmentation"][..., 6].tolist() == [[0.0, 1.0]] * 2
    assert "augmentation" not in found.eval_batches(0)[0]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"config": {"input_features": {"images.top": {"type": "VISUAL"}}}}, DataError, ["top", "options.cameras"]),
        ({"cameras": {"a": "observation.images.fornt"}}, DataError, ["fornt", "front"]),
        ({"cameras": [None]}, DataError, ["would see no camera"]),
        ({"embodiment": "arm"}, RecipeError, ["pi05 has no embodiments"]),
        ({"state": "observation.stat"}, DataError, ["observation.stat", "observation.state"]),
        ({"family": "groot_n17", "embodiment": "libero"}, RecipeError, ["libero_sim"]),
        ({"family": "groot_n17", "embodiment": 3}, RecipeError, ["slot 3", "embodiments"]),
        ({"family": "groot_n17", "episodes": [3]}, DataError, ["6 frames", "drop_tail"]),
        ({"more": {"tokenizer": None}}, RecipeError, ["data.tokenizer"]),
        ({"config": {"normalization_mapping": {"STATE": "SOME"}}}, RecipeError, ["normalization_mapping.STATE"]),
    ],
)  # fmt: skip
def test_wrong_input_is_named(opened: Open, settings: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        opened(**settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_cameras_of_the_policy_are_found_by_their_last_name(opened: Open) -> None:
    visual = {f"observation.images.{name}": {"type": "VISUAL"} for name in ("wrist", "front", "empty_camera_0")}
    found = opened(config={"input_features": visual}).processing.cameras
    assert [camera.feature for camera in found] == ["observation.images.wrist", "observation.images.front", None]
    given = {"observation.images.front": "observation.images.wrist", "observation.images.wrist": None}
    mapped = opened(config={"input_features": visual}, cameras=given).processing.cameras
    assert [camera.feature for camera in mapped] == [None, "observation.images.wrist", None]


@pytest.mark.parametrize("cameras", [{"observation.images.front": "observation.images.wrist"}, [None]])
def test_a_camera_that_the_options_leave_out_is_an_error(opened: Open, cameras: Any) -> None:
    visual = {f"observation.images.{name}": {"type": "VISUAL"} for name in ("front", "wrist", "empty_camera_0")}
    with pytest.raises(DataError, match=r"cameras says nothing of observation.images.wrist.* or null where"):
        opened(config={"input_features": visual}, cameras=cameras)


def test_statistics_are_computed_where_they_are_absent(opened: Open, data: Dataset, tmp_path: Path) -> None:
    bare = generate(
        tmp_path / "bare", episodes=4, frames=[9, 12, 7, 5], state=5, action=4, episodes_per_file=1, statistics=False
    )
    for ours, theirs in zip(opened(root=bare.root).batches(0), opened().batches(0), strict=True):
        torch.testing.assert_close(ours["actions"], theirs["actions"], rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="has no statistics"):
        opened(root=bare.root, statistics="dataset")
    computed = opened(statistics="compute", episodes=[0]).processing
    whole = opened(statistics="dataset", episodes=[0]).processing
    assert not np.array_equal(computed.actions.low, whole.actions.low)


def test_actions_come_back_in_the_robots_units(opened: Open) -> None:
    for settings in ({}, {"config": {"use_relative_actions": True}}):
        found = opened(**settings, micro_batch=8)
        batch = found.batches(0)[0]
        state = found.processing.states.backward(batch["state"].numpy()[:, :5])
        raw = found.processing.restore(batch["actions"].numpy(), state)
        place = found.train.samples.place(found.train.order.sample(0))
        recorded = found.train.dataset.columns(place[0], ["action"], place[1])["action"]
        np.testing.assert_allclose(raw[0, : len(recorded)], recorded[:6], atol=1e-4)
        assert raw.shape == (8, 6, 4)
