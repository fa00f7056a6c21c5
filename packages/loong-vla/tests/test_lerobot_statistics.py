"""Statistics against their definition written out plainly, and against numpy where the definition is numpy's."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loong_core.errors import DataError
from loong_vla.lerobot.generate import generate
from loong_vla.lerobot.layout import open_dataset
from loong_vla.lerobot.statistics import (
    QUANTILES,
    aggregate,
    as_json,
    compute,
    describe,
    quantile_names,
    sampled_frames,
)
from loong_vla.lerobot.video import FrameReader


def by_histogram(values: np.ndarray, share: float) -> float:
    """lerobot's quantile of one dimension: a histogram of 5000 bins, and a straight line inside the bin it is in."""
    edges = np.linspace(values.min() - 1e-10, values.max() + 1e-10, 5001)
    counts = np.histogram(values, bins=edges)[0]
    total = np.cumsum(counts)
    bin_ = int(np.searchsorted(total, share * len(values)))
    if bin_ == 0:
        return float(edges[0])
    before = total[bin_] - counts[bin_]
    return float(edges[bin_] + (share * len(values) - before) / counts[bin_] * (edges[bin_ + 1] - edges[bin_]))


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.int64]),
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=40),
        elements=st.integers(-1000, 1000),
    ),
    st.sampled_from([1.0, 1e-6, 1e4]),
)
def test_quantiles_are_those_of_the_histogram(values: np.ndarray, scale: float) -> None:
    values = values if values.dtype == np.int64 else (values * scale).astype(values.dtype)
    found = describe(values)
    wide = values.astype(np.result_type(values.dtype, np.float32))
    for name, share in zip(quantile_names(), QUANTILES, strict=True):
        expected = [by_histogram(wide[:, column], share) for column in range(values.shape[1])]
        np.testing.assert_array_equal(found[name], expected, err_msg=name)
    np.testing.assert_array_equal(found["min"], values.min(axis=0))
    np.testing.assert_array_equal(found["max"], values.max(axis=0))
    np.testing.assert_allclose(found["mean"], values.astype(np.float64).mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found["std"], values.astype(np.float64).std(axis=0), rtol=1e-9, atol=1e-12)
    assert found["count"].tolist() == [len(values)]


def test_shapes() -> None:
    matrix = describe(np.arange(24, dtype=np.float32).reshape(4, 2, 3))
    assert {name: values.shape for name, values in matrix.items() if name != "count"} == dict.fromkeys(
        ("min", "max", "mean", "std", *quantile_names()), (2, 3)
    )
    assert describe(np.arange(5))["q50"].shape == (1,)
    one = describe(np.full((1, 2), 7.5, np.float32))
    assert one["q01"].tolist() == one["q99"].tolist() == one["mean"].tolist() == [7.5, 7.5]


def test_a_dimension_that_never_moves_has_no_spread() -> None:
    """lerobot finds a deviation of 0.004 here, from squares in float32."""
    still = describe(np.full((50, 1), 3.7, np.float32))
    assert still["std"][0] == pytest.approx(0.0, abs=1e-12)
    assert still["q01"][0] == still["q99"][0] == still["min"][0]


def test_together_is_exact_but_for_quantiles() -> None:
    random = np.random.default_rng(0)
    parts = [random.normal(loc=number, size=(size, 3)) for number, size in enumerate((10, 1, 40))]
    found = aggregate([{"action": describe(part)} for part in parts])["action"]
    everything = describe(np.concatenate(parts))
    for name in ("min", "max", "mean", "std", "count"):
        np.testing.assert_allclose(found[name], everything[name], rtol=1e-12)
    weighted = sum(len(part) * describe(part)["q10"] for part in parts) / 51
    np.testing.assert_allclose(found["q10"], weighted, rtol=1e-12)


def test_together_of_unlike_parts() -> None:
    full = describe(np.arange(4.0)[:, None])
    bare = {name: full[name] for name in ("min", "max", "mean", "std", "count")}
    found = aggregate([{"a": full}, {"a": bare, "b": full}])
    assert set(found) == {"a", "b"} and set(found["a"]) == set(bare) and set(found["b"]) == set(full)
    with pytest.raises(DataError, match="`a` lack std"):
        aggregate([{"a": {name: bare[name] for name in bare if name != "std"}}])
    with pytest.raises(DataError, match="`a` have different shapes"):
        aggregate([{"a": bare}, {"a": describe(np.zeros((3, 2)))}])


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_of_a_dataset(tmp_path: Path, version: str) -> None:
    dataset = generate(tmp_path / "data", version, frames=[30, 11, 5], state=4, action=2)
    states = [dataset.columns(number, ["observation.state"])["observation.state"] for number in range(3)]
    found = compute(dataset)
    assert set(found) == {"observation.state", "action"}
    given = dataset.statistics
    assert given is not None
    for name, entry in found.items():
        for key, values in entry.items():
            if key in given[name]:
                np.testing.assert_allclose(values, given[name][key], rtol=1e-12)
    frames = compute(dataset, ["observation.state"], pool="frames")["observation.state"]
    expected = describe(np.concatenate(states))
    for key, values in frames.items():
        np.testing.assert_array_equal(values, expected[key])
    some = compute(dataset, ["observation.state"], episodes=[2])["observation.state"]
    np.testing.assert_array_equal(some["max"], states[2].max(axis=0))
    assert some["count"].tolist() == [5]


def test_of_cameras(tmp_path: Path) -> None:
    """Counted levels give what the pixels themselves give; 310 pixels of width are too many, every second is taken."""
    cameras = {"observation.images.top": (48, 64), "observation.images.wide": (32, 310)}
    dataset = generate(tmp_path / "data", frames=[150, 6], cameras=cameras)
    found = compute(dataset, list(cameras))
    with FrameReader(dataset) as reader:
        for name, step in zip(cameras, (1, 2), strict=True):
            parts = []
            for episode, rows in zip(dataset.episodes, (sampled_frames(150), range(6)), strict=True):
                pixels = reader.frames(episode, name, rows)[:, ::step, ::step].reshape(-1, 3)
                part = {key: value.reshape(3, 1, 1) / 255 for key, value in describe(pixels).items() if key != "count"}
                parts.append({name: {**part, "count": np.array([len(rows)])}})
            for key, values in aggregate(parts)[name].items():
                np.testing.assert_allclose(found[name][key], values, rtol=1e-9, atol=1e-12, err_msg=key)
            assert found[name]["mean"].shape == (3, 1, 1) and found[name]["count"].tolist() == [106]


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_generated_datasets_bring_those_of_their_images(version: str, tmp_path: Path) -> None:
    """Of what went into them: PNGs, which lose nothing, have the same."""
    cameras = {"observation.images.top": (48, 64), "observation.images.odd": (33, 21)}
    dataset = generate(tmp_path / "data", version, frames=[20, 7], cameras=cameras, images=True)
    given = dataset.statistics
    assert given is not None
    for name, entry in compute(dataset, list(cameras)).items():
        assert entry["max"].max() > 0.5
        for key, values in given[name].items():
            np.testing.assert_allclose(entry[key], values, rtol=1e-9, err_msg=f"{name} {key}")


def test_sampled_frames() -> None:
    assert sampled_frames(7).tolist() == list(range(7))
    assert len(sampled_frames(300)) == 100 and len(sampled_frames(1000)) == 177
    assert sampled_frames(1000)[[0, -1]].tolist() == [0, 999] and len(sampled_frames(10**7)) == 10_000


def test_wrong_requests(tmp_path: Path) -> None:
    dataset = generate(tmp_path / "data", frames=[3])
    with pytest.raises(DataError, match="no statistics of `observation.stat`"):
        compute(dataset, ["observation.stat"])
    with pytest.raises(DataError, match="no episode 4"):
        compute(dataset, episodes=[4])
    with pytest.raises(DataError, match="has no episode to compute"):
        compute(dataset, episodes=[])


def test_written_and_read_again(tmp_path: Path) -> None:
    import json

    dataset = generate(tmp_path / "data", frames=[9], statistics=False)
    assert dataset.statistics is None
    found = compute(dataset)
    (dataset.root / "meta" / "stats.json").write_text(json.dumps(as_json(found)))
    again = open_dataset(dataset.root).statistics
    assert again is not None and isinstance(as_json(found)["action"]["count"][0], int)
    for key, values in found["action"].items():
        np.testing.assert_array_equal(again["action"][key], values)
    (dataset.root / "meta" / "stats.json").write_text('{"action": {"min": "low"}}')
    with pytest.raises(DataError, match=r"stats\.json` does not hold arrays"):
        _ = open_dataset(dataset.root).statistics


def test_fast() -> None:
    """Two million numbers in episodes of 300 frames take seconds, not minutes: no histogram is filled."""
    values = np.random.default_rng(0).normal(size=(300, 14)).astype(np.float32)
    begin = time.perf_counter()
    for _ in range(100):
        describe(values)
    assert time.perf_counter() - begin < 2.0
