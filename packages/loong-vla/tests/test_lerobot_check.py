"""Wrong input of robot data: each is named with its file and episode, all of them together, before training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from loong_core.cli import run
from loong_core.errors import DataError
from loong_core.registry import open_registry
from loong_vla.check import check, report
from loong_vla.lerobot.examine import SHOWN
from loong_vla.lerobot.generate import generate
from loong_vla.lerobot.layout import Dataset, open_dataset
from loong_vla.lerobot.source import claims, files

FRONT, WRIST = "observation.images.front", "observation.images.wrist"


@pytest.fixture(params=["v3.0", "v2.1"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    return generate(tmp_path / "data", request.param, frames=[6, 9, 4, 5], episodes_per_file=2)


def _set(file: Path, name: str, rows: list[Any]) -> None:
    table = pq.read_table(file)
    at = table.schema.names.index(name)
    kind = table.schema.field(at).type
    pq.write_table(table.set_column(at, name, pa.array(rows, kind)), file)


def _edit_info(dataset: Dataset, **changes: Any) -> None:
    file = dataset.root / "meta" / "info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _cut(file: Path, count: int) -> None:
    """Encode the first `count` frames anew, as a recorder that died would have left them."""
    with av.open(str(file)) as container:
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][:count]
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def test_nothing_wrong(dataset: Dataset) -> None:
    assert check(dataset.root) == []
    assert check([str(dataset.root)], {"episodes": [2, 0]}) == []
    found = report(dataset.root, thorough=True)
    assert found["problems"] == [] and found["decoded"] == {FRONT: 24, WRIST: 24}


def test_missing_files(dataset: Dataset) -> None:
    data, video = dataset.root / dataset.episodes[2].data, dataset.root / dataset.episodes[3].clips[WRIST].file
    data.unlink()
    video.unlink()
    found = check(dataset.root)
    new = dataset.version == "v3.0"
    assert found == [
        f"`{data}` is missing: it should hold {'episodes 2, 3' if new else 'episode 2'}.",
        f"`{video}` is missing: camera `{WRIST}`, {'episodes 2, 3' if new else 'episode 3'}.",
    ]
    assert check(dataset.root, {"episodes": [0, 1]}) == []


@pytest.mark.parametrize("present", [5, 8])
def test_a_video_shorter_than_its_rows(dataset: Dataset, present: int) -> None:
    file = dataset.root / dataset.episodes[1].clips[FRONT].file
    count = 6 + present if dataset.version == "v3.0" else present
    _cut(file, count)
    ends = f"it ends after {present} of the episode's 9 rows ({count} frames in the file)"
    assert check(dataset.root) == [f"`{file}`: episode 1, camera `{FRONT}`: {ends}."]


def test_videos_of_another_size_or_no_video_at_all(dataset: Dataset) -> None:
    file = dataset.root / dataset.episodes[0].clips[FRONT].file
    file.write_bytes(b"not a video " * 100)
    features = json.loads((dataset.root / "meta" / "info.json").read_text())["features"]
    features[WRIST]["shape"] = [48, 64, 3]
    _edit_info(dataset, features=features)
    found = check(dataset.root)
    assert f"`{file}` cannot be opened" in found[0] or f"`{file}` holds no video" in found[0]
    assert any("64 x 64 pixels, but info.json says shape [48, 64, 3]" in text for text in found)


def test_features_of_another_kind(dataset: Dataset) -> None:
    features = json.loads((dataset.root / "meta" / "info.json").read_text())["features"]
    features["reward"] = {"dtype": "float32", "shape": [1], "names": None}
    features["task_index"]["dtype"] = "int32"
    features["action"]["shape"] = [2, 3]
    _edit_info(dataset, features=features)
    text = "\n".join(check(dataset.root))
    assert "it lacks the column `reward`" in text
    assert "feature `action` holds lists of depth 1, but info.json says float32 of shape [2, 3]" in text
    assert "data.options.action: feature `action`" in text and "is float32 of shape [2, 3], not a vector" in text


def test_rows_that_are_wrong(dataset: Dataset) -> None:
    file = dataset.root / dataset.episodes[1].data
    first = 6 if dataset.version == "v3.0" else 0
    table = pq.read_table(file)
    states = table.column("observation.state").to_pylist()
    states[first + 4] = [0.0] * 7
    _set(file, "observation.state", states)
    assert any("episode 1, frame 4: feature `observation.state`: has 7 numbers" in text for text in check(dataset.root))
    states[first + 4] = [float("nan")] * 8
    _set(file, "observation.state", states)
    times = table.column("timestamp").to_pylist()
    times[first + 8] += 1.0
    _set(file, "timestamp", times)
    frames = table.column("frame_index").to_pylist()
    frames[first] = 3
    _set(file, "frame_index", frames)
    tasks = table.column("task_index").to_pylist()
    tasks[first + 2] = 9
    _set(file, "task_index", tasks)
    found = check(dataset.root)
    where = f"`{file}`: episode 1"
    assert found == [
        f"{where}, frame 4: `observation.state` is not a finite number (1 such frames).",
        f"{where}, frame 0: `frame_index` is 3 where 0 is expected (1 such frames).",
        f"{where}, frame 8: `timestamp` is 1.8000 s, which is not that of frame 8 at 10 frames a second.",
        f"{where}: `task_index` 9 is in no row of the list of tasks.",
    ]


def test_counts_that_do_not_agree(dataset: Dataset) -> None:
    _edit_info(dataset, total_episodes=7, total_frames=25)
    text = "\n".join(check(dataset.root))
    assert "`total_episodes` is 7, but the list of episodes has 4" in text
    assert "`total_frames` is 25, but the list of episodes has 24" in text
    file = dataset.root / dataset.episodes[3].data
    pq.write_table(pq.read_table(file).slice(0, 4 if dataset.version == "v2.1" else 8), file)
    assert f"`{file}` has" in "\n".join(check(dataset.root))


def test_statistics_of_another_shape(dataset: Dataset) -> None:
    name = "stats.json" if dataset.version == "v3.0" else "episodes_stats.jsonl"
    file = dataset.root / "meta" / name
    file.write_text(file.read_text().replace("NaN", "0"))
    if dataset.version == "v3.0":
        content = json.loads(file.read_text())
        content["action"]["max"] = [1.0, 2.0]
        content["observation.state"]["std"][0] = float("nan")
        file.write_text(json.dumps(content))
        found = check(dataset.root)
        assert any("statistics of `action`: `max` has 2 numbers, the feature 7" in text for text in found)
        assert any("statistics of `observation.state`: `std` is not finite" in text for text in found)
    else:
        file.write_text(file.read_text() + "{}\n")
        assert any(f"`{file}` does not hold arrays" in text for text in check(dataset.root))
    file.unlink()
    assert check(dataset.root) == []
    assert ["statistics", "none; training computes them"] in report(dataset.root)["facts"]


def test_statistics_of_another_size_in_one_episode(tmp_path: Path) -> None:
    dataset = generate(tmp_path / "data", "v2.1", frames=[6, 9, 4])
    file = dataset.root / "meta" / "episodes_stats.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["stats"]["action"]["max"].pop()
    rows[2]["stats"]["action"]["mean"][0] = float("nan")
    file.write_text("\n".join(json.dumps(row) for row in rows))
    problems = check(dataset.root)
    assert len(problems) == 2 and all(str(file) in text for text in problems)
    assert "episode 1: statistics of `action`: `max` has shape [6], in most episodes [7]" in problems[0]
    assert "episode 2: statistics of `action`: `mean` is not finite" in problems[1]


def test_statistics_of_another_size_are_reported_and_not_tripped_over(tmp_path: Path) -> None:
    dataset = generate(tmp_path / "data", frames=[6, 9])
    file = dataset.root / "meta" / "stats.json"
    statistics = json.loads(file.read_text())
    statistics["action"]["q01"] = statistics["action"]["q01"][:5]
    file.write_text(json.dumps(statistics))
    for thorough in (False, True):
        assert "`q01` has 5 numbers, the feature 7" in report(dataset.root, thorough=thorough)["problems"][0]


def test_tasks_without_a_text(dataset: Dataset) -> None:
    assert not any("empty text" in note for note in report(dataset.root)["notes"])
    for text in ("", None):
        if dataset.version == "v3.0":
            table = pa.table({"task_index": [0], "task": pa.array([text], pa.string())})
            pq.write_table(table, dataset.root / "meta" / "tasks.parquet")
        else:
            (dataset.root / "meta" / "tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": text}))
        if text is not None:
            assert "task 0 is an empty text: the policy has no instruction there." in report(dataset.root)["notes"]
        else:
            (problem,) = check(dataset.root)
            assert "meta/tasks." in problem and "task 0 has no text" in problem


def test_cameras_that_are_not_used_need_no_files(dataset: Dataset) -> None:
    (dataset.root / dataset.episodes[1].clips[FRONT].file).unlink()
    assert check(dataset.root, {"cameras": [WRIST]}) == check(dataset.root, {"cameras": {"a": WRIST, "b": None}}) == []
    assert check(dataset.root) and check(dataset.root, {"cameras": [FRONT, WRIST]})


def test_a_missing_file_is_said_once(dataset: Dataset) -> None:
    (dataset.root / dataset.episodes[1].data).unlink()
    (dataset.root / dataset.episodes[1].clips[FRONT].file).unlink()
    assert len(report(dataset.root, thorough=True)["problems"]) == 2


def test_a_missing_table_of_images_is_said_once(tmp_path: Path) -> None:
    dataset = generate(tmp_path / "data", "v2.1", frames=[3, 4], images=True)
    (dataset.root / dataset.episodes[1].data).unlink()
    (problem,) = report(dataset.root, thorough=True)["problems"]
    assert "episode 1" in problem and "is missing" in problem


def test_a_picture_that_cannot_be_written(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        report(dataset.root, picture=tmp_path / "file" / "sheet.png")


def test_many_problems_of_a_kind_are_counted(tmp_path: Path) -> None:
    dataset = generate(tmp_path / "data", "v2.1", episodes=14, frames=2, cameras={FRONT: (32, 32)})
    for episode in dataset.episodes[:13]:
        (dataset.root / episode.clips[FRONT].file).unlink()
    found = check(dataset.root)
    assert len(found) == SHOWN + 1 and found[-1] == "... and 3 more of this kind: video files."


def test_folders_and_options(dataset: Dataset, tmp_path: Path) -> None:
    assert "is not a LeRobot dataset" in check(tmp_path)[0]
    assert "is not set" in check(None)[0] and "names 2 datasets" in check(["a", "b"])[0]
    assert check(dataset.root, {"episodes": [1, 9]}) == [
        f"data.options.episodes: `{dataset.root}` has no episode 9; it has 4, 0 to 3."
    ]
    options = {"state": "observation.stat", "cameras": {"left": FRONT, "right": "observation.images.wist", "top": None}}
    found = check(dataset.root, options)
    assert "has no feature `observation.stat`" in found[0] and "Did you mean 'observation.state'?" in found[0]
    assert "`observation.images.wist` is no camera" in found[1] and f"Did you mean {WRIST!r}?" in found[1]
    assert len(found) == 2
    assert len(check(dataset.root, {"cameras": [FRONT, None, "action"]})) == 1


def test_a_depth_map_is_no_camera(dataset: Dataset) -> None:
    features = json.loads((dataset.root / "meta" / "info.json").read_text())["features"]
    features[WRIST]["info"]["is_depth_map"] = True
    _edit_info(dataset, features=features)
    assert open_dataset(dataset.root).cameras == (FRONT,)
    assert "is a depth map, which no policy reads" in check(dataset.root, {"cameras": [WRIST]})[0]
    assert f"{WRIST} is a depth map and not read." in report(dataset.root)["notes"]


# ------------------------------------------------------------------------------------------------------- report
def test_thorough_finds_what_heads_do_not_tell(dataset: Dataset) -> None:
    """The head of a video counts its frames; only decoding shows that one of them is damaged."""
    file = dataset.root / dataset.episodes[1].clips[WRIST].file
    with av.open(str(file)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        at, size = packets[-2].pos, packets[-2].size
    content = bytearray(file.read_bytes())
    for place in range(at + 10, at + size):
        content[place] ^= 0x77
    file.write_bytes(content)
    assert check(dataset.root) == [] and report(dataset.root)["problems"] == []
    found = report(dataset.root, thorough=True)["problems"]
    assert len(found) == 1 and str(file) in found[0] and f"episode 1, camera `{WRIST}`" in found[0]


def test_large_datasets_are_decoded_in_part(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number of frames, the first and last of every episode are decoded; the others need a packet in time."""
    monkeypatch.setattr("loong_vla.check._DECODED_FRAMES", 10)
    found = report(dataset.root, thorough=True)
    assert found["problems"] == [] and found["decoded"] == {FRONT: 8, WRIST: 8}
    clips = dataset.episodes[3].clips
    if dataset.version == "v3.0":
        table_file = dataset.root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
        starts = pq.read_table(table_file).column(f"videos/{FRONT}/from_timestamp").to_pylist()
        starts[3] = clips[FRONT].start + 0.03
        _set(table_file, f"videos/{FRONT}/from_timestamp", starts)
        text = report(dataset.root, thorough=True)["problems"][0]
        assert "episode 3" in text and "no frame at 0.4300 s, the time of row 0 (5 such rows)" in text


def test_notes(tmp_path: Path) -> None:
    dataset = generate(tmp_path / "data", frames=[200, 10])
    file = dataset.root / dataset.episodes[0].data
    table = pq.read_table(file)
    action = np.array(table.column("action").to_pylist(), np.float32)
    action[:, 2] = 0.25
    action[:, 6] = 0.0
    action[77, 6] = 1.0
    _set(file, "action", action.tolist())
    notes = report(dataset.root, thorough=True)["notes"]
    assert "`action` never changes in dimension 2 (joint_2)." in notes
    assert any("the mean in `meta` is" in note and note.startswith("`action`") for note in notes)
    rare = "`action` has the same q01 and q99 in dimension 6 (gripper), yet other values occur"
    assert any(note.startswith(rare) for note in notes)


def test_contact_sheet(dataset: Dataset, tmp_path: Path) -> None:
    video = dataset.root / dataset.episodes[1].clips[FRONT].file
    report(dataset.root, picture=tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as image:
        whole = np.asarray(image)
    assert whole.shape[2] == 3 and whole.shape[1] == 2 * 3 * 164 + 4
    assert (np.abs(whole.astype(int) - (220, 60, 40)).max(axis=2) < 40).any()
    video.unlink()
    report(dataset.root, picture=tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        crossed = np.asarray(image)
    assert (crossed == (255, 0, 0)).all(axis=2).sum() > 500
    plain = generate(tmp_path / "plain", frames=[3], cameras={})
    with pytest.raises(DataError, match="has no camera"):
        report(plain.root, picture=tmp_path / "none.png")


@pytest.mark.parametrize("seed", range(2))
def test_damage_of_any_kind_is_a_problem_and_never_a_crash(tmp_path: Path, seed: int) -> None:
    """Bytes changed, lost and put in, in any file: what cannot be read is named, by an error that is for users."""
    random = np.random.default_rng(seed)
    version, codec = (("v3.0", "h264"), ("v2.1", "hevc"))[seed]
    cameras = {FRONT: (32, 32)}
    dataset = generate(tmp_path / "data", version, frames=[6, 5], cameras=cameras, codec=codec)
    originals = {path: path.read_bytes() for path in sorted(dataset.root.rglob("*")) if path.is_file()}
    named = 0
    for turn in range(25):
        path = list(originals)[int(random.integers(len(originals)))]
        content = bytearray(originals[path])
        at = int(random.integers(len(content)))
        if turn % 3 == 0:
            for place in random.integers(0, len(content), 12):
                content[place] = int(random.integers(256))
        elif turn % 3 == 1:
            del content[at:]
        else:
            content[at:at] = bytes(random.integers(0, 256, 20, dtype=np.uint8))
        path.write_bytes(content)
        try:
            problems = check(dataset.root) or report(dataset.root, thorough=True)["problems"]
        except DataError as error:
            problems = error.problems
        named += bool(problems)
        path.write_bytes(originals[path])
    assert named >= 20
    assert report(dataset.root, thorough=True)["problems"] == []


def test_source(dataset: Dataset, tmp_path: Path) -> None:
    source = open_registry().get("data_sources", "lerobot")
    assert source.check == "loong_vla.check:check"
    assert claims(dataset.root) and not claims(tmp_path)
    names = {path.relative_to(dataset.root).as_posix() for path in files(dataset.root)}
    everything = {path.relative_to(dataset.root).as_posix() for path in dataset.root.rglob("*") if path.is_file()}
    assert names == everything


def test_command_line(dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.png"
    assert run(["data", "check", str(dataset.root), "--contact-sheet", str(sheet)]) == 0
    assert sheet.is_file() and "observation.images.front" in capsys.readouterr().out
    os.remove(dataset.root / dataset.episodes[1].clips[FRONT].file)
    assert run(["data", "check", str(dataset.root), "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert any("is missing" in text for text in problems)
