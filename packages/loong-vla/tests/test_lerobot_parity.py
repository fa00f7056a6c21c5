"""lerobot sees in datasets, generated here or recorded by itself, what our readers see: every frame, every column."""

from __future__ import annotations

import json

import lerobot_peer
import numpy as np
import pytest
from safetensors.numpy import load_file

from loong_vla.check import report
from loong_vla.lerobot.generate import generate
from loong_vla.lerobot.layout import INDEX_FEATURES, Dataset, open_dataset
from loong_vla.lerobot.statistics import compute, quantile_names
from loong_vla.lerobot.video import FrameReader

HORIZON = 7

pytestmark = lerobot_peer.needs_lerobot

CASES = {
    "h264_two_files": {
        "frames": [20, 13, 31],
        "episodes_per_file": 2,
        "cameras": {"observation.images.top": (50, 38), "observation.images.wrist": (64, 96)},
        "tasks": ["lift", "drop", "wait"],
        "seed": 3,
    },
    "av1": {"frames": [11, 9], "codec": "av1", "cameras": {"observation.images.top": (64, 72)}, "fps": 30},
    "hevc_far_key_frames": {"frames": [40, 17], "codec": "hevc", "keyframes": 25, "fps": 50, "state": 1, "action": 2},
    "odd_mpeg4": {"frames": [15], "codec": "mpeg4", "keyframes": 6, "cameras": {"observation.images.top": (48, 64)}},
    "images": {"frames": [6, 8], "images": True, "cameras": {"observation.images.top": (33, 47)}},
    "recorded_by_lerobot": {},
    "v2": {"version": "v2.1", "frames": [20, 4, 31], "fps": 15, "action": 1},
    "v2_as_written": {"version": "v2.1", "frames": [5, 8], "cameras": {"observation.images.top": (32, 48)}},
}


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Dataset, dict[str, np.ndarray], list[str]]]:
    """What lerobot saw, by case; one process for all of them, because importing it takes most of the time."""
    folder = tmp_path_factory.mktemp("peer")
    jobs = []
    for name, settings in CASES.items():
        if settings:
            generate(folder / name, **settings)
        job = {
            "root": str(folder / name),
            "out": str(folder / f"{name}.safetensors"),
            "convert": "v2" in name,
            "record": not settings,
        }
        jobs.append({**job, "horizon": 0 if name == "v2" else HORIZON, "statistics": name in ("v2", "h264_two_files")})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    lerobot_peer.run("dataset_peer.py", folder / "jobs.json")
    return {
        name: (
            open_dataset(folder / name),
            load_file(folder / f"{name}.safetensors"),
            json.loads((folder / f"{name}.json").read_text()),
        )
        for name in CASES
    }


@pytest.mark.parametrize("case", CASES)
def test_same_frames(case: str, peers: dict) -> None:
    dataset, seen, _ = peers[case]
    with FrameReader(dataset) as reader:
        for camera in dataset.cameras:
            ours = np.concatenate([reader.frames(item, camera, range(item.length)) for item in dataset.episodes])
            np.testing.assert_array_equal(ours, seen[f"images/{camera}"].transpose(0, 2, 3, 1))
            shuffled = np.random.default_rng(1).permutation(len(ours))[:40]
            for number in shuffled.tolist():
                episode = next(item for item in dataset.episodes if number < item.to_index)
                one = reader.frames(episode, camera, [number - episode.from_index])
                np.testing.assert_array_equal(one[0], ours[number])


@pytest.mark.parametrize("case", CASES)
def test_same_columns_and_tasks(case: str, peers: dict) -> None:
    dataset, seen, tasks = peers[case]
    names = ["observation.state", *INDEX_FEATURES, *([] if "chunk" in seen else ["action"])]
    names += [name for name in ("observation.effort", "next.done") if name in seen]
    columns = [dataset.columns(item, names) for item in dataset.episodes]
    for name in names:
        ours = np.concatenate([part[name] for part in columns])
        assert ours.dtype == seen[name].dtype
        np.testing.assert_array_equal(ours.reshape(seen[name].shape), seen[name], err_msg=name)
    frames = [(item, frame) for item in dataset.episodes for frame in range(item.length)]
    assert [dataset.task(item, frame) for item, frame in frames] == tasks
    if "chunk" in seen:
        for number, (item, frame) in enumerate(frames):
            action = dataset.columns(item, ["action"])["action"]
            wanted = np.arange(frame, frame + HORIZON)
            chunk = action[np.minimum(wanted, item.length - 1)]
            np.testing.assert_array_equal(chunk.reshape(seen["chunk"][number].shape), seen["chunk"][number])
            np.testing.assert_array_equal(wanted >= item.length, seen["chunk_is_pad"][number])


@pytest.mark.parametrize("case", CASES)
def test_nothing_to_complain_of(case: str, peers: dict) -> None:
    assert report(peers[case][0].root, thorough=True)["problems"] == []


@pytest.mark.parametrize("case", ["h264_two_files", "v2"])
def test_same_statistics(case: str, peers: dict) -> None:
    """Quantiles agree to the last digits. lerobot adds up in float32, which costs a deviation of pixels 10 %, so the
    pixels themselves are the judge there."""
    dataset, seen, _ = peers[case]
    names = [*dataset.cameras, "observation.state", "action", *INDEX_FEATURES]
    ours = compute(dataset, names)
    for name in names:
        theirs = {key for key in seen if key.startswith(f"stats/{name}/")}
        assert theirs == {f"stats/{name}/{key}" for key in ours[name]}
        for key, values in ours[name].items():
            wanted = seen[f"stats/{name}/{key}"]
            assert values.shape == wanted.shape, (name, key)
            exact = key in ("min", "max", "count")
            if name in dataset.cameras and key in ("mean", "std"):
                pixels = seen[f"images/{name}"].astype(np.float64) / 255
                true = getattr(np, key)(pixels, axis=(0, 2, 3)).reshape(3, 1, 1)
                np.testing.assert_allclose(values, true, rtol=1e-9)
                assert np.abs(wanted - true).max() < 5e-3
                continue
            loose = 2e-4 if name in dataset.cameras or key == "std" else 1e-6
            scale = max(1.0, float(np.abs(wanted).max()))
            np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-7 * scale if exact else loose * scale)


def test_statistics_of_the_files(peers: dict) -> None:
    """What the generator writes and what our reader makes of it is what lerobot makes of it; v2.1 has no quantiles."""
    for case in ("av1", "images", "odd_mpeg4", "v2_as_written", "recorded_by_lerobot"):
        dataset, seen, _ = peers[case]
        assert dataset.statistics is not None
        for name, entry in dataset.statistics.items():
            for key, values in entry.items():
                np.testing.assert_allclose(values, seen[f"stats/{name}/{key}"], rtol=1e-12, atol=1e-15)
    old = peers["v2"][0].statistics
    assert old is not None and not set(old["action"]) & set(quantile_names())
