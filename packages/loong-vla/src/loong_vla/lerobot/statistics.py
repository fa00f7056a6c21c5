"""Statistics of features as lerobot defines them, without its histograms: quantiles interpolate in one of 5000 equal
bins between an episode's least and largest value, and a dataset's are the means of its episodes', weighted by frames.

Everything else is computed in double precision in two passes, where lerobot sums squares in float32. `pool: frames`
gives the quantiles of all frames together instead, which is what OpenPI normalises by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from loong_core.errors import DataError
from loong_vla.lerobot.layout import INDEX_FEATURES, Dataset, Episode, Statistics

if TYPE_CHECKING:
    from loong_vla.lerobot.video import FrameReader

QUANTILES = (0.01, 0.10, 0.50, 0.90, 0.99)
_BINS = 5000
_MANY = 20_000
"""Rows from which sorted columns are searched rather than compared with every edge."""
_THREADS = 4

Pool = Literal["episodes", "frames"]


def compute(
    dataset: Dataset,
    names: Sequence[str] | None = None,
    *,
    episodes: Sequence[int] | None = None,
    pool: Pool = "episodes",
    threads: int = _THREADS,
) -> Statistics:
    """Statistics of features: numbers [*shape], cameras [3, 1, 1] with pixels in [0, 1] of sampled frames.

    `names` are features (None: every one of numbers but the index columns; cameras, which have to be decoded, only when
    named), `episodes` their numbers (None: all).

    Raises:
        DataError: files are missing or damaged, or a feature is not of numbers.
    """
    chosen = list(dataset.episodes) if episodes is None else [dataset.episode(number) for number in episodes]
    if names is None:
        names = [name for name, kind in dataset.features.items() if kind.numeric and name not in INDEX_FEATURES]
    for name in names:
        feature = dataset.features.get(name)
        if feature is None or not (feature.numeric or feature.camera):
            raise DataError(f"`{dataset.root}`: there are no statistics of `{name}`: it is no feature of numbers.")
    if not chosen:
        raise DataError(f"`{dataset.root}` has no episode to compute statistics of.")
    cameras = [name for name in names if dataset.features[name].camera]
    numbers = [name for name in names if name not in cameras]
    result = _of_numbers(dataset, chosen, numbers, pool) if numbers else {}
    for name, parts in (_of_images(dataset, chosen, cameras, threads) if cameras else {}).items():
        result[name] = aggregate([{name: part} for part in parts])[name]
    return {name: result[name] for name in names}


def _of_numbers(dataset: Dataset, episodes: Sequence[Episode], names: Sequence[str], pool: Pool) -> Statistics:
    parts: list[Statistics] = []
    everything: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for episode in episodes:
        columns = dataset.columns(episode, names)
        if pool == "frames":
            for name, values in columns.items():
                everything[name].append(values)
        else:
            parts.append({name: describe(values) for name, values in columns.items()})
    if pool == "frames":
        return {name: describe(np.concatenate(values)) for name, values in everything.items()}
    return aggregate(parts)


def describe(values: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics over the first axis of `values` [n, *shape], n >= 1: each [*shape], at least one axis; `count` [1]."""
    count, shape = len(values), values.shape[1:] or (1,)
    flat = np.sort(values.reshape(count, -1).astype(np.result_type(values.dtype, np.float32)), axis=0)
    exact = flat.astype(np.float64, copy=False)
    mean = exact.mean(axis=0)
    result = {"min": exact[0], "max": exact[-1], "mean": mean, "std": exact.std(axis=0)}
    quantiles = _quantiles_of_columns(flat)
    if count < 2:  # one value has no quantiles; its mean stands for them
        quantiles = np.broadcast_to(mean, quantiles.shape)
    result.update(zip(quantile_names(), quantiles, strict=True))
    return {**{name: array.reshape(shape) for name, array in result.items()}, "count": np.array([count])}


def quantile_names() -> tuple[str, ...]:
    """Names of the quantiles in statistics: `q01` to `q99`."""
    return tuple(f"q{round(100 * share):02d}" for share in QUANTILES)


def _quantiles_of_columns(flat: np.ndarray) -> np.ndarray:
    """Quantiles [len(QUANTILES), columns] of ascending columns [n, columns]: those of `_quantiles`, all at once where
    bins are wide enough that a division finds them."""
    count, columns = flat.shape
    low, high = flat[0] - 1e-10, flat[-1] + 1e-10
    step = (high - low) / _BINS
    wide = step > 8 * np.spacing(np.maximum(np.abs(low), np.abs(high)))
    result = np.empty((len(QUANTILES), columns))
    if count > _MANY:
        wide[:] = False
    for column in np.flatnonzero(~wide).tolist():
        result[:, column] = _quantiles(flat[:, column], np.arange(count + 1))
    if not wide.any():
        return result
    flat, low, high, step = flat[:, wide], low[wide], high[wide], step[wide]

    def edge(number: np.ndarray) -> np.ndarray:
        """As `np.linspace` rounds it."""
        return np.where(number == _BINS, high, number.astype(flat.dtype) * step + low)

    wanted = np.array(QUANTILES)[:, None] * count
    values = flat[np.maximum(np.ceil(wanted[:, 0]).astype(int) - 1, 0)]
    bins = np.clip(((values - low) / step).astype(int), 0, _BINS - 1)
    for _ in range(2):  # rounding may have led to a neighbour
        bins -= edge(bins) > values
        bins += (edge(bins + 1) <= values) & (bins < _BINS - 1)
    lower, upper = edge(bins), edge(bins + 1)
    before = (flat < lower[:, None]).sum(axis=1)
    reached = np.where(bins == _BINS - 1, count, (flat < upper[:, None]).sum(axis=1))
    inside = np.maximum(reached - before, 1)
    result[:, wide] = np.where(bins <= 0, low, lower + (wanted - before) / inside * (upper - lower))
    return result


def _quantiles(values: np.ndarray, cumulated: np.ndarray) -> np.ndarray:
    """Quantiles [len(QUANTILES)] of ascending `values` [n]; `cumulated` [n + 1] counts the elements before each.

    The bin of a quantile is the first whose values, with all before, reach that share of the elements.
    """
    edges = np.linspace(values[0] - 1e-10, values[-1] + 1e-10, _BINS + 1)
    total = cumulated[-1]
    result = np.empty(len(QUANTILES))
    for number, share in enumerate(QUANTILES):
        wanted = share * total
        value = values[np.searchsorted(cumulated[1:], wanted)]
        bin_ = min(int(np.searchsorted(edges, value, side="right")) - 1, _BINS - 1)
        if bin_ <= 0:
            result[number] = edges[0]
            continue
        before = cumulated[np.searchsorted(values, edges[bin_])]
        last = bin_ == _BINS - 1  # the only bin that holds its upper edge
        inside = cumulated[np.searchsorted(values, edges[bin_ + 1], "right" if last else "left")] - before
        result[number] = edges[bin_] + (wanted - before) / inside * (edges[bin_ + 1] - edges[bin_])
    return result


# ------------------------------------------------------------------------------------------------------- images
def sampled_frames(length: int) -> np.ndarray:
    """Frames of an episode whose pixels are looked at: length ** 0.75 of them, between 100 and 10000, evenly spread."""
    count = max(min(100, length), min(int(length**0.75), 10_000))
    return np.round(np.linspace(0, length - 1, count)).astype(np.int64)


def _of_images(
    dataset: Dataset, episodes: Sequence[Episode], cameras: Sequence[str], threads: int
) -> dict[str, list[dict[str, np.ndarray]]]:
    from loong_vla.lerobot.video import FrameReader

    jobs = [(name, episode) for name in cameras for episode in episodes]
    result: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in cameras}
    with FrameReader(dataset) as reader, ThreadPoolExecutor(threads) as pool:
        for (name, _), part in zip(jobs, pool.map(lambda job: _of_frames(reader, *job), jobs), strict=True):
            result[name].append(part)
    return result


def _of_frames(reader: FrameReader, camera: str, episode: Episode) -> dict[str, np.ndarray]:
    """Statistics of the sampled frames of an episode."""
    numbers = sampled_frames(episode.length)
    levels = Levels()
    for first in range(0, len(numbers), 32):
        for image in reader.frames(episode, camera, numbers[first : first + 32]):
            height, width = image.shape[:2]
            if max(height, width) >= 300:
                step = (width if width > height else height) // 150
                image = image[::step, ::step]
            levels.add(image)
    return levels.describe()


class Levels:
    """Statistics of images: pixels have 256 values, so counting them is enough."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, 256), dtype=np.int64)
        self._images = 0

    def add(self, image: np.ndarray) -> None:
        """One more, uint8 [height, width, 3]."""
        for channel in range(3):
            self._counts[channel] += np.bincount(image[..., channel].ravel(), minlength=256)
        self._images += 1

    def describe(self) -> dict[str, np.ndarray]:
        """Those of `describe`, [3, 1, 1], with pixels in [0, 1]; `count` is the number of images."""
        levels = np.arange(256, dtype=np.float64)
        rows: dict[str, list[float]] = {name: [] for name in ("min", "max", "mean", "std", *quantile_names())}
        for counts in self._counts:
            used = np.flatnonzero(counts)
            cumulated = np.concatenate([[0], np.cumsum(counts[used])])
            mean = float(counts @ levels / counts.sum())
            spread = float(np.sqrt(counts @ (levels - mean) ** 2 / counts.sum()))
            quantiles = _quantiles(used.astype(np.float32), cumulated).tolist()
            for name, value in zip(rows, (used[0], used[-1], mean, spread, *quantiles), strict=True):
                rows[name].append(float(value) / 255.0)
        found = {name: np.array(row).reshape(3, 1, 1) for name, row in rows.items()}
        return {**found, "count": np.array([self._images])}


# ---------------------------------------------------------------------------------------------------- together
def aggregate(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of parts put together: exact for min, max, mean, std and count; the mean weighted by `count` for
    quantiles, of those that every part has. Parts may hold different features."""
    result: Statistics = {}
    for name in _names(parts):
        entries = [part[name] for part in parts if name in part]
        result[name] = _together(name, entries)
    return result


def _names(parts: Sequence[Statistics]) -> Iterator[str]:
    yield from dict.fromkeys(name for part in parts for name in part)


def _together(name: str, entries: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    needed = ("min", "max", "mean", "std", "count")
    if missing := [key for key in needed if any(key not in entry for entry in entries)]:
        raise DataError(f"the statistics of `{name}` lack {', '.join(missing)} in an episode.")
    try:
        stacked = {key: np.stack([entry[key] for entry in entries]) for key in needed}
        weights = stacked["count"].reshape(-1, *[1] * (stacked["mean"].ndim - 1)).astype(np.float64)
        weights /= weights.sum()
        mean = (weights * stacked["mean"]).sum(axis=0)
        variance = (weights * (stacked["std"] ** 2 + (stacked["mean"] - mean) ** 2)).sum(axis=0)
        result = {"min": stacked["min"].min(axis=0), "max": stacked["max"].max(axis=0), "mean": mean}
        result |= {"std": np.sqrt(variance), "count": stacked["count"].sum(axis=0)}
        for key in entries[0]:
            if key[0] == "q" and key[1:].isdigit() and all(key in entry for entry in entries):
                result[key] = (weights * np.stack([entry[key] for entry in entries])).sum(axis=0)
    except ValueError:
        raise DataError(f"the statistics of `{name}` have different shapes in different episodes.") from None
    return result


def as_json(statistics: Statistics) -> dict[str, dict[str, list[Any]]]:
    """Nested lists, as `meta/stats.json` holds them; counts are integers."""
    return {
        name: {key: (array.astype(np.int64) if key == "count" else array).tolist() for key, array in entry.items()}
        for name, entry in statistics.items()
    }
