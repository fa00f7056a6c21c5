"""Generated datasets: the arguments decide every byte that matters, and both versions hold the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loong_vla.check import check
from loong_vla.lerobot.generate import generate
from loong_vla.lerobot.layout import open_dataset
from loong_vla.lerobot.video import FrameReader

NAMES = ["observation.state", "action", "timestamp", "index", "task_index"]


def test_the_same_arguments_the_same_data(tmp_path: Path) -> None:
    first, second = (generate(tmp_path / name, frames=[6, 4], seed=5) for name in ("a", "b"))
    other = generate(tmp_path / "c", frames=[6, 4], seed=6)
    files = sorted(path.relative_to(first.root) for path in first.root.rglob("*") if path.is_file())
    for file in files:
        assert (first.root / file).read_bytes() == (second.root / file).read_bytes(), file
    assert (first.columns(0, ["action"])["action"] != other.columns(0, ["action"])["action"]).any()


def test_both_versions_hold_the_same_rows(tmp_path: Path) -> None:
    new = generate(tmp_path / "new", "v3.0", frames=[6, 9], episodes_per_file=1)
    old = generate(tmp_path / "old", "v2.1", frames=[6, 9])
    for number in range(2):
        ours, theirs = new.columns(number, NAMES), old.columns(number, NAMES)
        for name in NAMES:
            np.testing.assert_array_equal(ours[name], theirs[name])
        assert new.task(number) == old.task(number)
        with FrameReader(new) as one, FrameReader(old) as two:  # an episode a file: the same video twice
            for camera in new.cameras:
                left, right = one.frames(number, camera, range(6)), two.frames(number, camera, range(6))
                np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1", "mpeg4"])
@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_every_codec_is_valid(tmp_path: Path, version: str, codec: str) -> None:
    dataset = generate(tmp_path / "data", version, episodes=2, frames=5, codec=codec)
    assert check(dataset.root) == []
    kinds = {"h264": "h264", "hevc": "hevc", "av1": "av1", "mpeg4": "mpeg4"}
    assert dataset.features["observation.images.front"].info["video.codec"] == kinds[codec]


def test_the_action_follows_from_the_state(tmp_path: Path) -> None:
    """There is something to learn: a line from this and the last state explains nearly all of the next move."""
    dataset = generate(tmp_path / "data", frames=[200], state=6, action=4)
    columns = dataset.columns(0, ["observation.state", "action"])
    state, action = columns["observation.state"], columns["action"]
    seen = np.concatenate([state[1:], state[:-1], np.ones((199, 1))], axis=1)
    left = action[1:, :3] - seen @ np.linalg.lstsq(seen, action[1:, :3], rcond=None)[0]
    assert left.var() < 0.05 * action[1:, :3].var()
    assert set(np.unique(action[:, -1])) == {0.0, 1.0}


def test_refusals(tmp_path: Path) -> None:
    generate(tmp_path / "data", frames=[2])
    with pytest.raises(ValueError, match="is not empty"):
        generate(tmp_path / "data", frames=[2])
    with pytest.raises(ValueError, match="no encoder of 'vhs'"):
        generate(tmp_path / "other", frames=[2], codec="vhs")


def test_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loong_vla.lerobot", str(tmp_path / "data"), "--episodes", "2", "--frames", "4"]
    done = subprocess.run([*command, "--version", "v2.1", "--side", "32"], capture_output=True, text=True)
    assert done.returncode == 0 and "2 episodes, 8 frames" in done.stdout, done.stderr
    dataset = open_dataset(tmp_path / "data")
    assert dataset.version == "v2.1" and dataset.features["observation.images.wrist"].shape == (32, 32, 3)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "is not empty" in again.stderr
