"""What `loong train` and `loong data` ask about a robot dataset before anything is trained on: no tensor library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loong_core.errors import DataError
from loong_core.suggest import did_you_mean
from loong_vla.lerobot import examine
from loong_vla.lerobot.layout import INDEX_FEATURES, Dataset, Episode, Feature, open_dataset
from loong_vla.lerobot.source import folder_of, options_of
from loong_vla.options import RobotOptions

READ_ROWS = 5_000_000
"""The most rows whose numbers are read before every run: some seconds."""

_DECODED_FRAMES = 20_000
"""The most frames that a thorough check decodes; of larger datasets it decodes each episode's first and last."""


def check(path: Any, options: Any = None) -> list[str]:
    """Problems of a dataset that a run would meet: files that are missing, damaged or shorter than their rows, columns
    and image sizes that are not what `meta` says, numbers that are none. Heads of all files are read, and rows."""
    settings = options_of(options)
    try:
        dataset = open_dataset(folder_of(path))
        episodes = chosen(dataset, settings)
    except DataError as error:
        return error.problems
    problems = examine.Problems()
    problems.add("features", feature_problems(dataset, settings))
    examine.structure(dataset, episodes, problems, cameras_of(dataset, settings))
    if not problems.texts() and sum(item.length for item in episodes) <= READ_ROWS:
        examine.rows(dataset, episodes, problems)
    return problems.texts()


def cameras_of(dataset: Dataset, settings: RobotOptions) -> list[str]:
    """The dataset's cameras that the options name; all of them where they name none."""
    wanted = settings.cameras
    names = wanted.values() if isinstance(wanted, Mapping) else wanted
    return list(dataset.cameras) if names is None else [name for name in dataset.cameras if name in set(names)]


def chosen(dataset: Dataset, settings: RobotOptions) -> list[Episode]:
    """The episodes that `data.options.episodes` names, all where it is null.

    Raises:
        DataError: the dataset has not all of them.
    """
    if settings.episodes is None:
        return list(dataset.episodes)
    known = {episode.index: episode for episode in dataset.episodes}
    if missing := [number for number in settings.episodes if number not in known]:
        numbers = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
        found = f"it has {len(known)}, {min(known)} to {max(known)}" if known else "it has none"
        raise DataError(f"data.options.episodes: `{dataset.root}` has no episode {numbers}; {found}.")
    return [known[number] for number in settings.episodes]


def feature_problems(dataset: Dataset, settings: RobotOptions) -> Iterator[str]:
    """Features that the options name and the dataset has not, or has of another kind."""
    for key in ("state", "action"):
        name = getattr(settings, key)
        feature = dataset.features.get(name)
        if feature is None:
            numeric = [item.name for item in dataset.features.values() if _vector(item)]
            known = f"Its vectors are {', '.join(numeric) or 'none'}."
            yield f"data.options.{key}: `{dataset.root}` has no feature `{name}`.{did_you_mean(name, numeric)} {known}"
        elif not _vector(feature):
            kind = f"{feature.dtype} of shape {list(feature.shape)}"
            yield f"data.options.{key}: feature `{name}` of `{dataset.root}` is {kind}, not a vector of numbers."
    wanted = settings.cameras
    for name in (wanted.values() if isinstance(wanted, Mapping) else wanted) or ():
        if name is not None and name not in dataset.cameras:
            feature = dataset.features.get(name)
            kind = "is a depth map, which no policy reads" if feature and feature.depth else "is no camera"
            known = f"{did_you_mean(name, dataset.cameras)} Its cameras are {', '.join(dataset.cameras) or 'none'}."
            yield f"data.options.cameras: `{name}` {kind} of `{dataset.root}`.{known}"


def _vector(feature: Feature) -> bool:
    return feature.numeric and len(feature.shape) == 1 and feature.name not in INDEX_FEATURES


# ------------------------------------------------------------------------------------------------------- report
def report(path: Any, options: Any = None, thorough: bool = False, picture: Path | None = None) -> dict[str, Any]:
    """What `loong data inspect` shows of a dataset, and, `thorough`, `loong data check`: see `DataSource`.

    Raises:
        DataError: the dataset's description cannot be read, or a picture is wanted and there is nothing to show.
    """
    settings = options_of(options)
    dataset = open_dataset(folder_of(path))
    episodes = chosen(dataset, settings)
    problems = examine.Problems()
    problems.add("features", feature_problems(dataset, settings))
    heads = examine.structure(dataset, episodes, problems)
    notes: list[str] = []
    decoded: Mapping[str, int] = {}
    if thorough:
        # What lies in files that cannot be opened has been said.
        examine.rows(dataset, [item for item in episodes if item.data in heads.rows], problems)
        frames = sum(item.length for item in episodes) * len(dataset.cameras)
        decoded = examine.pictures(dataset, episodes, heads, problems, settings.tolerance, frames <= _DECODED_FRAMES)
    notes += _notes(dataset, episodes, settings, thorough and not problems.texts())
    if picture is not None:
        from loong_vla.lerobot.sheet import contact_sheet

        count = contact_sheet(dataset, episodes, picture, settings.tolerance)
        notes.append(f"{picture} shows {count} episodes.")
    cameras = _camera_table(dataset, episodes, heads, decoded)
    return {
        "facts": [*_facts(dataset, episodes), *(["note", note] for note in notes)],
        "tables": [_feature_table(dataset), *cameras, _task_table(dataset, episodes)],
        "problems": problems.texts(),
        "notes": notes,
        "episodes": [
            {"episode": item.index, "length": item.length, "tasks": list(item.tasks), "data": item.data}
            for item in episodes
        ],
        "cameras": {name: [head._asdict() for head in files] for name, files in heads.videos.items()},
        "decoded": dict(decoded),
    }


def _facts(dataset: Dataset, episodes: Sequence[Episode]) -> list[list[str]]:
    lengths = sorted(item.length for item in episodes) or [0]
    frames = sum(lengths)
    middle = lengths[len(lengths) // 2]
    used = f" of {len(dataset.episodes):,}" if len(episodes) != len(dataset.episodes) else ""
    return [
        ["dataset", str(dataset.root)],
        ["version", dataset.version],
        ["robot", str(dataset.robot_type or "unknown")],
        ["episodes", f"{len(episodes):,}{used}"],
        ["frames", f"{frames:,} at {dataset.fps:g} a second, {frames / dataset.fps / 3600:.2f} hours"],
        ["length", f"{lengths[0]} to {lengths[-1]} frames, median {middle}"],
        ["statistics", _statistics_fact(dataset)],
    ]


def _statistics_fact(dataset: Dataset) -> str:
    try:
        statistics = dataset.statistics
    except DataError:
        return "damaged"
    if statistics is None:
        return "none; training computes them"
    complete = all("q01" in entry and "q99" in entry for entry in statistics.values())
    return "complete" if complete else "without quantiles; training computes them where a policy needs them"


def _notes(dataset: Dataset, episodes: Sequence[Episode], settings: RobotOptions, compare: bool) -> list[str]:
    """What a user should know that is no error: dimensions without range, statistics of other data, depth maps."""
    names = [name for name in (settings.state, settings.action) if name in dataset.features]
    result = [f"{name} is a depth map and not read." for name, feature in dataset.features.items() if feature.depth]
    if empty := [str(number) for number, task in dataset.tasks.items() if not task.strip()]:
        result.append(f"task {', '.join(empty[:5])} is an empty text: the policy has no instruction there.")
    if any(examine.statistics_problems(dataset)):
        return result
    try:
        given = dataset.statistics
        found = _computed(dataset, episodes, names) if compare else {}
    except DataError:
        return result
    for name in names:
        stored = (given or {}).get(name, {})
        if stored and name in found:
            result += stale(dataset.features[name], stored, found[name], dataset)
        result += _ranges(dataset.features[name], found.get(name, {}), stored)
        if name in found and given is not None and name in given and "mean" in given[name]:
            result += _foreign(name, given[name], found[name])
    return result


def _ranges(feature: Feature, found: Mapping[str, Any], stored: Mapping[str, Any]) -> Iterator[str]:
    """Notes on dimensions that never change, by the rows where they were read, and on those that do and yet have no
    range to normalise by, in the rows or in `meta`."""
    real = found or stored
    if "min" in real and "max" in real and (still := examine.flat_dimensions(real, "min", "max")[1]):
        yield f"`{feature.name}` never changes in {dimensions(feature, still)}."
    for low, high in (("min", "max"), ("q01", "q99")):
        flat = [examine.flat_dimensions(each, low, high)[0] for each in (stored, found) if low in each and high in each]
        if moving := sorted({number for numbers in flat for number in numbers}):
            yield (
                f"`{feature.name}` has the same {low} and {high} in {dimensions(feature, moving)}, yet other values "
                "occur: normalised by them, those would be huge. Normalise by min_max or mean_std "
                "(data.options.normalise)."
            )


def _computed(dataset: Dataset, episodes: Sequence[Episode], names: Sequence[str]) -> Mapping[str, Any]:
    from loong_vla.lerobot.statistics import compute

    return compute(dataset, names, episodes=[item.index for item in episodes]) if episodes and names else {}


def stale(feature: Feature, given: Mapping[str, Any], found: Mapping[str, Any], dataset: Dataset) -> list[str]:
    """What is wrong where the statistics in `meta` say that a dimension never changes and the rows say it does."""
    if not all(key in entry for entry in (given, found) for key in ("min", "max")):
        return []
    claimed = (given["max"] == given["min"]).ravel() & (found["max"] > found["min"]).ravel()
    if not claimed.any():
        return []
    which = dimensions(feature, claimed.nonzero()[0].tolist())
    where = f"`{dataset.root / 'meta'}`: the statistics of `{feature.name}` have one value in {which}"
    return [f"{where}, but the rows differ there. data.options.statistics: compute takes the rows' own."]


def _foreign(name: str, given: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """A note where the statistics in `meta` are far from those of the rows: datasets were merged or edited."""
    scale = found["std"] + 1e-3 * (abs(found["mean"]) + 1e-6)
    if given["mean"].shape != found["mean"].shape:
        return []
    distance = float((abs(given["mean"] - found["mean"]) / scale).max())
    if distance < 0.1:
        return []
    off = f"the mean in `meta` is {distance:.2f} standard deviations off that of these rows"
    return [f"`{name}`: {off}. data.options.statistics: compute takes the rows' own."]


def dimensions(feature: Feature, numbers: Sequence[int]) -> str:
    """Dimensions of a feature in words, by number and name."""
    names = feature.names
    if isinstance(names, dict):
        names = next((value for value in names.values() if isinstance(value, list)), None)
    named = isinstance(names, list) and len(names) == feature.size
    listed = [f"{number} ({names[number]})" if named else str(number) for number in numbers[:8]]
    return f"dimension{'s' if len(numbers) > 1 else ''} {', '.join(listed)}{' ...' if len(numbers) > 8 else ''}"


def _feature_table(dataset: Dataset) -> dict[str, Any]:
    rows = [[name, item.dtype, " x ".join(map(str, item.shape))] for name, item in dataset.features.items()]
    return {"columns": ["feature", "dtype", "shape"], "rows": rows}


def _camera_table(
    dataset: Dataset, episodes: Sequence[Episode], heads: examine.Heads, decoded: Mapping[str, int]
) -> list[dict[str, Any]]:
    rows, wanted = [], sum(item.length for item in episodes)
    for name in dataset.cameras:
        files = heads.videos.get(name)
        kinds = ", ".join(sorted({f"{head.codec} {head.width} x {head.height}" for head in files or ()}))
        frames = f"{sum(head.frames for head in files):,}" if files is not None else f"{wanted:,}"
        size = f"{sum(head.size for head in files) / 2**20:,.2f} MiB" if files is not None else "in the tables"
        count = str(len(files)) if files is not None else "-"
        seen = f"{decoded[name]:,}" if name in decoded else "-"
        rows.append([name, kinds or "images", count, size, frames, f"{wanted:,}", seen])
    columns = ["camera", "kind", "files", "size", "frames", "rows", "decoded"]
    return [{"columns": columns, "rows": rows}] if rows else []


def _task_table(dataset: Dataset, episodes: Sequence[Episode]) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for episode in episodes:
        for task in episode.tasks:
            counts[task] = counts.get(task, 0) + 1
    most = sorted(counts.items(), key=lambda item: -item[1])
    rows = [[task, f"{count:,}"] for task, count in most[:20]]
    if len(most) > 20:
        rows.append([f"... and {len(most) - 20:,} more", ""])
    return {"columns": ["task", "episodes"], "rows": rows}
