"""Robot data that do not suit the policy, named before training by the rules that training keeps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loong_core.recipe_load import from_mapping
from loong_core.types import ModelShape
from loong_vla.check import report
from loong_vla.fit import fit
from loong_vla.lerobot.generate import generate
from loong_vla.lerobot.layout import Dataset

FRONT, WRIST = "observation.images.front", "observation.images.wrist"


@pytest.fixture(params=["v3.0", "v2.1"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    return generate(tmp_path / "data", request.param, frames=[6, 9], cameras={FRONT: (16, 16), WRIST: (16, 16)})


def _pi05(**fields: Any) -> ModelShape:
    settings = {"state_size": 32, "action_size": 32, "horizon": 5, **fields}
    return ModelShape(family="pi05", fields=settings, layers=1, hidden=8, parameters=())


def _groot(**fields: Any) -> ModelShape:
    settings = {"state_size": 132, "action_size": 132, "horizon": 5, "slots": 32, "embodiments": (2, 10), **fields}
    return ModelShape(family="groot_n17", fields=settings, layers=1, hidden=8, parameters=())


def _fit(dataset: Dataset, shape: ModelShape, config: dict[str, Any] | None = None, **options: Any) -> list[str]:
    recipe = from_mapping({"data": {"source": "lerobot", "path": str(dataset.root), "options": options}})
    return fit(recipe, shape, config or {})


def _set_action(dataset: Dataset, change: Any) -> None:
    for episode in dataset.episodes:
        file = dataset.root / episode.data
        table = pq.read_table(file)
        at = table.schema.names.index("action")
        action = np.array(table.column(at).to_pylist(), np.float32)
        change(action)
        kind = table.schema.field(at).type
        pq.write_table(table.set_column(at, "action", pa.array(action.tolist(), kind)), file)


def test_data_that_suit(dataset: Dataset) -> None:
    assert _fit(dataset, _pi05()) == []
    assert _fit(dataset, _groot()) == []


def test_vectors_longer_than_the_models(dataset: Dataset) -> None:
    found = _fit(dataset, _pi05(state_size=7, action_size=4))
    assert len(found) == 2
    assert "feature `observation.state` has 8 numbers (`meta/info.json`: shape [8]), pi05 takes at most 7" in found[0]
    assert "feature `action` has 7 numbers" in found[1] and "at most 4" in found[1]


def test_chunks_longer_than_every_episode(dataset: Dataset) -> None:
    assert _fit(dataset, _pi05(horizon=50)) == []
    assert _fit(dataset, _pi05(horizon=9), drop_tail=True) == [] == _fit(dataset, _groot(horizon=9))
    for found in (_fit(dataset, _pi05(horizon=10), drop_tail=True), _fit(dataset, _groot(horizon=10))):
        assert len(found) == 1 and "9 rows at most, chunks have 10" in found[0]
    assert _fit(dataset, _groot(horizon=10), drop_tail=False) == []


def test_cameras_that_nobody_maps(dataset: Dataset) -> None:
    names = ["observation.images.base_0_rgb", "observation.images.left_wrist_0_rgb"]
    config = {"input_features": {name: {"type": "VISUAL", "shape": [3, 224, 224]} for name in names}}
    found = _fit(dataset, _pi05(), config)
    assert len(found) == 1 and f"has no camera {names[0]}, {names[1]}" in found[0] and FRONT in found[0]
    assert _fit(dataset, _pi05(), config, cameras={names[0]: FRONT, names[1]: None}) == []
    wrong = _fit(dataset, _pi05(), config, cameras={names[0]: FRONT, names[1]: "observation.images.rist"})
    assert len(wrong) == 1 and f"Did you mean {WRIST!r}?" in wrong[0]


def test_unknown_embodiments(dataset: Dataset) -> None:
    assert _fit(dataset, _groot(), embodiment="libero_sim") == []
    found = _fit(dataset, _groot(), embodiment="libero_sin")
    assert len(found) == 1 and "knows no embodiment 'libero_sin'" in found[0] and "'libero_sim'?" in found[0]
    assert "slot 31 is not one of those the model trains" in _fit(dataset, _groot(), embodiment=31)[0]
    assert "pi05 has no embodiments" in _fit(dataset, _pi05(), embodiment="libero_sim")[0]


def test_statistics_that_lack_what_is_needed(dataset: Dataset) -> None:
    """Version 2.1 has no quantiles; unless the recipe insists on the dataset's own, they are computed."""
    found = _fit(dataset, _pi05(), statistics="dataset")
    assert len(found) == (0 if dataset.version == "v3.0" else 2)
    assert all("lack q01 and q99, by which pi05 normalises" in text for text in found)
    for file in ("stats.json", "episodes_stats.jsonl"):
        (dataset.root / "meta" / file).unlink(missing_ok=True)
    fresh = Dataset(**{name: getattr(dataset, name) for name in dataset.__dataclass_fields__ if name[0] != "_"})
    assert fresh.statistics is None
    assert _fit(dataset, _pi05()) == []
    assert len(_fit(dataset, _pi05(), statistics="dataset")) == 2


def test_ranges_of_nothing(dataset: Dataset) -> None:
    """A gripper that closes in one frame of hundreds has equal quantiles; one that never does has nothing to scale."""

    def never(action: np.ndarray) -> None:
        action[:, 6] = 0.0

    def rarely(action: np.ndarray) -> None:
        action[:, 6] = 0.0
        action[0, 6] = 1.0

    _set_action(dataset, never)
    assert _fit(dataset, _pi05(), statistics="compute") == []
    long = generate(dataset.root.parent / "long", dataset.version, frames=[400], cameras={FRONT: (16, 16)})
    _set_action(long, rarely)
    found = _fit(long, _pi05(), statistics="compute")
    assert len(found) == 1
    assert "`action` has values that differ in dimension 6 (gripper)" in found[0] and "q01 and q99" in found[0]
    assert "{action: min_max}" in found[0]
    assert _fit(long, _pi05(), statistics="compute", normalise={"action": "min_max"}) == []
    assert _fit(long, _groot(), statistics="compute") == []


def _edit_statistics(dataset: Dataset, change: Any) -> None:
    """Apply `change` to the statistics of `action`, of every episode where they are by episode."""
    if dataset.version == "v3.0":
        file = dataset.root / "meta" / "stats.json"
        whole = json.loads(file.read_text())
        change(whole["action"])
        file.write_text(json.dumps(whole))
        return
    file = dataset.root / "meta" / "episodes_stats.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        change(row["stats"]["action"])
    file.write_text("\n".join(json.dumps(row) for row in rows))


@pytest.mark.parametrize("normalise", ["quantiles", "min_max", "mean_std"])
def test_statistics_that_say_a_number_never_changes_which_does(dataset: Dataset, normalise: str) -> None:
    def change(entry: dict[str, Any]) -> None:
        for key in {"min", "max", "q01", "q99"} & set(entry):
            entry[key][2] = 0.5

    _edit_statistics(dataset, change)
    found = _fit(dataset, _pi05(), normalise={"action": normalise})
    if dataset.version == "v2.1" and normalise == "quantiles":  # they are absent there, and computed
        assert found == []
        return
    assert len(found) == 1 and "one value in dimension 2 (joint_2), but the rows differ there" in found[0]
    assert str(dataset.root / "meta") in found[0] and "data.options.statistics: compute" in found[0]
    assert _fit(dataset, _pi05(), statistics="compute", normalise={"action": normalise}) == []
    assert any("one value in dimension 2" in note for note in report(dataset.root, thorough=True)["notes"])


def test_a_number_that_never_changes_is_fine(dataset: Dataset) -> None:
    def still(action: np.ndarray) -> None:
        action[:, 2] = 0.5

    def change(entry: dict[str, Any]) -> None:
        for key in {"min", "max", "q01", "q99"} & set(entry):
            entry[key][2] = 0.5

    _set_action(dataset, still)
    _edit_statistics(dataset, change)
    assert _fit(dataset, _pi05()) == []


def test_one_episode_cannot_be_held_out_of_one(dataset: Dataset) -> None:
    data = {"source": "lerobot", "path": str(dataset.root), "options": {"episodes": [1]}}
    assert fit(from_mapping({"data": data}), _pi05(), {}) == []
    (found,) = fit(from_mapping({"data": {**data, "eval": {}}}), _pi05(), {})
    assert "one episode cannot be split" in found and "data.eval.path" in found


def test_statistics_of_a_policy_that_has_none(dataset: Dataset) -> None:
    for shape in (_pi05(), _groot()):
        (found,) = _fit(dataset, shape, statistics="policy")
        assert found.startswith("data.options.statistics:") and "auto" in found


def test_held_out_data_of_another_robot(dataset: Dataset, tmp_path: Path) -> None:
    other = generate(tmp_path / "other", frames=[5], action=5, cameras={FRONT: (16, 16)})
    data = {"source": "lerobot", "path": str(dataset.root), "eval": {"path": str(other.root)}}
    found = fit(from_mapping({"data": data}), _pi05(), {})
    assert len(found) == 2
    assert "feature `action` has 5 numbers" in found[0] and f"has no camera {WRIST}" in found[1]


def test_no_tensor_library() -> None:
    code = "import sys, loong_vla.fit; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
