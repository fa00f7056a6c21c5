"""Descriptions and columns of generated datasets, and what is said where they are damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loong_core.errors import DataError
from loong_vla.lerobot.generate import generate
from loong_vla.lerobot.layout import Dataset, open_dataset

CAMERAS = {"observation.images.top": (32, 48)}


@pytest.fixture(params=["v3.0", "v2.1"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    return generate(
        tmp_path / "data", request.param, frames=[5, 9, 3], cameras=CAMERAS, state=3, action=1, episodes_per_file=2
    )


def _edit_info(dataset: Dataset, **changes: object) -> None:
    file = dataset.root / "meta" / "info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _rewrite(file: Path, **columns: pa.Array | None) -> None:
    table = pq.read_table(file)
    for name, values in columns.items():
        at = table.schema.names.index(name)
        table = table.remove_column(at) if values is None else table.set_column(at, name, values)
    pq.write_table(table, file)


def test_description(dataset: Dataset) -> None:
    assert (dataset.fps, dataset.robot_type, dataset.cameras) == (10.0, "generated", tuple(CAMERAS))
    assert dataset.features["observation.state"].shape == (3,) and dataset.features["action"].names == ["gripper"]
    assert [(item.index, item.length, item.from_index, item.to_index) for item in dataset.episodes] == [
        (0, 5, 0, 5),
        (1, 9, 5, 14),
        (2, 3, 14, 17),
    ]
    assert dataset.tasks == {0: "put the square into the corner", 1: "push the square to the wall"}
    assert dataset.episodes[1].tasks == ("push the square to the wall",)
    clip = dataset.episodes[1].clips["observation.images.top"]
    if dataset.version == "v3.0":
        assert clip.start == 0.5 and clip.file == "videos/observation.images.top/chunk-000/file-000.mp4"
        assert dataset.episodes[2].data == "data/chunk-000/file-001.parquet"
    else:
        assert clip.start == 0.0 and clip.file == "videos/chunk-000/observation.images.top/episode_000001.mp4"


def test_columns(dataset: Dataset) -> None:
    whole = dataset.columns(1, ["observation.state", "action", "timestamp", "index", "task_index"])
    assert {name: values.shape for name, values in whole.items()} == {
        "observation.state": (9, 3),
        "action": (9, 1),
        "timestamp": (9,),
        "index": (9,),
        "task_index": (9,),
    }
    assert whole["observation.state"].dtype == np.float32 and not whole["observation.state"].flags.writeable
    np.testing.assert_array_equal(whole["index"], np.arange(5, 14))
    np.testing.assert_allclose(whole["timestamp"], np.arange(9) / 10, rtol=1e-6)
    part = dataset.columns(dataset.episodes[1], ["action"], 2, 4)["action"]
    np.testing.assert_array_equal(part, whole["action"][2:4])
    assert dataset.task(1, 8) == "push the square to the wall" and dataset.task(2) == dataset.tasks[0]
    with pytest.raises(IndexError, match="rows 3 to 10 of episode 1, which has 9"):
        dataset.columns(1, ["action"], 3, 10)
    with pytest.raises(DataError, match="no episode 7; it has 3"):
        dataset.columns(7, ["action"])


def test_columns_in_threads(dataset: Dataset) -> None:
    """Every thread sees the same arrays, whoever reads the file first."""
    expected = [dataset.columns(number, ["action"])["action"] for number in range(3)]
    again = open_dataset(dataset.root)
    with ThreadPoolExecutor(8) as pool:
        numbers = np.random.default_rng(0).integers(0, 3, 200).tolist()
        found = pool.map(lambda number: again.columns(number, ["action", "index"])["action"], numbers)
        for number, values in zip(numbers, found, strict=True):
            np.testing.assert_array_equal(values, expected[number])


def test_no_tensor_library() -> None:
    code = "import sys, loong_vla.check, loong_vla.lerobot.source; print('torch' in sys.modules, 'av' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_lists_of_other_writers(tmp_path: Path) -> None:
    """Fixed-size and large lists, doubles where info.json says float32, matrices as nested lists: one meaning."""
    dataset = generate(tmp_path / "data", frames=[4, 3], cameras=CAMERAS, state=3, action=2)
    state = np.concatenate([dataset.columns(number, ["observation.state"])["observation.state"] for number in (0, 1)])
    features = json.loads((dataset.root / "meta" / "info.json").read_text())["features"]
    matrix = {"dtype": "int64", "shape": [2, 3], "names": None}
    flag = {"dtype": "bool", "shape": [1], "names": None}
    _edit_info(dataset, features={**features, "matrix": matrix, "flag": flag})
    file = dataset.root / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(file)
    values = np.arange(42).reshape(7, 2, 3)
    table = table.append_column("matrix", pa.array(values.tolist(), pa.list_(pa.list_(pa.int32()))))
    table = table.append_column("flag", pa.array([True, False, True, False, True, True, False]))
    at = table.schema.names.index("observation.state")
    for kind in (pa.list_(pa.float64(), 3), pa.large_list(pa.float32())):
        pq.write_table(
            table.set_column(at, "observation.state", pa.array(state.tolist(), kind)), file, row_group_size=3
        )
        columns = open_dataset(dataset.root).columns(1, ["observation.state", "matrix", "flag"])
        np.testing.assert_array_equal(columns["observation.state"], state[4:])
        assert columns["observation.state"].dtype == np.float32
        np.testing.assert_array_equal(columns["matrix"], values[4:])
        np.testing.assert_array_equal(columns["flag"], [[True], [True], [False]])


def test_rows_of_another_shape_are_named(dataset: Dataset) -> None:
    file = dataset.root / dataset.episodes[1].data
    rows = pq.read_table(file).column("observation.state").to_pylist()
    at = 5 + 3 if dataset.version == "v3.0" else 3
    rows[at] = rows[at][:2]
    _rewrite(file, **{"observation.state": pa.array(rows, pa.list_(pa.float32()))})
    with pytest.raises(DataError) as raised:
        open_dataset(dataset.root).columns(1, ["observation.state"])
    text = str(raised.value)
    assert str(file) in text and "episode 1, frame 3" in text and "has 2 numbers where info.json says 3" in text
    rows[at] = None
    _rewrite(file, **{"observation.state": pa.array(rows, pa.list_(pa.float32()))})
    with pytest.raises(DataError, match="episode 1, frame 3: feature `observation.state`: has no value"):
        open_dataset(dataset.root).columns(1, ["observation.state"])


def test_damaged_files(dataset: Dataset) -> None:
    file = dataset.root / dataset.episodes[2].data
    _rewrite(file, action=None)
    with pytest.raises(DataError, match="lacks the columns action"):
        open_dataset(dataset.root).columns(2, ["action"])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a readable parquet file"):
        open_dataset(dataset.root).columns(2, ["index"])
    file.unlink()
    with pytest.raises(DataError, match="is missing"):
        open_dataset(dataset.root).columns(2, ["index"])


def test_rows_of_an_episode_that_are_not_there(dataset: Dataset) -> None:
    file = dataset.root / dataset.episodes[1].data
    pq.write_table(pq.read_table(file).slice(0, 7 if dataset.version == "v3.0" else 2), file)
    with pytest.raises(DataError, match="episode 1 has 2 rows in one place; the list of episodes says 9"):
        open_dataset(dataset.root).columns(1, ["action"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebase_version": "v1.6"}, "v3.0, v2.1, v2.0 can be read"),
        ({"fps": 0}, "`fps` is 0, not a positive number"),
        ({"features": []}, "`features` is not an object"),
        ({"features": {"action": {"dtype": "float32", "shape": [0]}}}, "feature `action`: `shape`"),
        ({"data_path": "../{chunk_index}/x.parquet"}, "leads out of the dataset's folder"),
        ({"data_path": "/etc/{chunk_index}{episode_index}"}, "leads out of the dataset's folder|cannot be filled in"),
        ({"data_path": "{chunk_index.__class__}"}, "the field {chunk_index.__class__} is not known"),
        ({"data_path": "{episode_index:999999999d}"}, "is not known"),
        ({"video_path": None}, "`video_path` is None"),
    ],
)
def test_wrong_descriptions(dataset: Dataset, changes: dict, message: str) -> None:
    if changes.get("data_path", "").startswith(".."):
        field = "chunk_index" if dataset.version == "v3.0" else "episode_chunk"
        changes = {"data_path": f"../{{{field}}}/x.parquet"}
    _edit_info(dataset, **changes)
    with pytest.raises(DataError, match=message) as raised:
        open_dataset(dataset.root)
    assert "info.json" in str(raised.value)


def test_every_problem_of_a_description_at_once(dataset: Dataset) -> None:
    _edit_info(dataset, fps="ten", features={"a": {}, "b": {"dtype": "int64", "shape": 3}}, data_path=7)
    with pytest.raises(DataError) as raised:
        open_dataset(dataset.root)
    assert len(raised.value.problems) == 4


def test_folders_that_are_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        open_dataset(tmp_path / "nothing")
    with pytest.raises(DataError, match="has no file `meta/info.json`"):
        open_dataset(tmp_path)
    (tmp_path / "meta").mkdir()
    for content in ("{", "[1]", "[" * 100_000):
        (tmp_path / "meta" / "info.json").write_text(content)
        with pytest.raises(DataError, match=r"info\.json"):
            open_dataset(tmp_path)


def test_lists_of_episodes_that_are_damaged(dataset: Dataset) -> None:
    meta = dataset.root / "meta"
    if dataset.version == "v3.0":
        file = meta / "episodes" / "chunk-000" / "file-000.parquet"
        _rewrite(file, length=None)
        with pytest.raises(DataError, match="lacks the columns length"):
            open_dataset(dataset.root)
        file.unlink()
        with pytest.raises(DataError, match="the list of episodes is missing"):
            open_dataset(dataset.root)
    else:
        file = meta / "episodes.jsonl"
        file.write_text('{"episode_index": 0, "length": "five"}\n')
        with pytest.raises(DataError, match="`length` is 'five', not a number"):
            open_dataset(dataset.root)
        file.write_text('{"episode_index": 0, "length": 5}\n{\n')
        with pytest.raises(DataError, match=r"episodes\.jsonl`:2: broken JSON"):
            open_dataset(dataset.root)


def test_tasks_by_number_not_by_place(tmp_path: Path) -> None:
    dataset = generate(tmp_path / "data", frames=[3, 3], cameras={})
    file = dataset.root / "meta" / "tasks.parquet"
    pq.write_table(pa.table({"task_index": [1, 0], "__index_level_0__": ["b", "a"]}), file)
    assert [open_dataset(dataset.root).task(number) for number in (0, 1)] == ["a", "b"]
    pq.write_table(pa.table({"kind": ["x", "y"], "task_index": [1, 0], "task": ["b", "a"]}), file)
    assert open_dataset(dataset.root).task(0) == "a"
    pq.write_table(pa.table({"task_index": [0], "task": ["a"]}), file)
    with pytest.raises(DataError, match="episode 1, frame 2: task_index 1"):
        open_dataset(dataset.root).task(1, 2)
