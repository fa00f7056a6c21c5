"""States and actions between a robot's units and a policy's: formulas of LeRobot's processors, in float32 numpy, since
the same code serves training and a server. Source: lerobot 0.6, `NormalizerProcessorStep` and GR00T's packing step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from loong_core.errors import DataError

Mode = Literal["quantiles", "min_max", "mean_std", "identity"]
MODES: Mapping[str, Mode] = {
    "QUANTILES": "quantiles",
    "MIN_MAX": "min_max",
    "MEAN_STD": "mean_std",
    "IDENTITY": "identity",
}
"""LeRobot's names in `normalization_mapping` of config.json."""
NEEDED: Mapping[Mode, tuple[str, ...]] = {
    "quantiles": ("q01", "q99"),
    "min_max": ("min", "max"),
    "mean_std": ("mean", "std"),
    "identity": (),
}
"""Statistics that each way needs: what becomes -1 and 1, or mean and standard deviation."""
_EPSILON = np.float32(1e-8)


@dataclass(frozen=True)
class Normaliser:
    """One feature's way to a policy's units and back, elementwise over the last axis.

    `low` and `high` become -1 and 1; with `mean_std` they are mean and standard deviation. Both are float32 [d], or
    [horizon, d] where every step of a chunk has its own. Where they are equal, nothing can be said by the number:
    forward gives `flat` whatever it is, backward gives `low`. `clip` keeps both directions inside [-1, 1].
    """

    mode: Mode
    low: np.ndarray
    high: np.ndarray
    clip: bool = False
    flat: float = -1.0

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Values [..., d] in the robot's units -> float32 [..., d] in the policy's."""
        x = np.asarray(x, np.float32)
        if self.mode == "identity":
            return x
        low, high = self._bounds(x)
        if self.mode == "mean_std":
            return (x - low) / (high + _EPSILON)
        still = _still(low, high)
        y = np.float32(2) * (x - low) / np.where(still, np.float32(1), high - low) - np.float32(1)
        y = np.where(still, np.float32(self.flat), y)
        return np.clip(y, -1, 1) if self.clip else y

    def backward(self, y: np.ndarray) -> np.ndarray:
        """Values [..., d] in the policy's units -> float32 [..., d] in the robot's."""
        y = np.asarray(y, np.float32)
        if self.mode == "identity":
            return y
        low, high = self._bounds(y)
        if self.mode == "mean_std":
            return y * high + low
        y = np.clip(y, -1, 1) if self.clip else y
        return (y + np.float32(1)) * (high - low) / np.float32(2) + low

    def _bounds(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bounds of the steps that `x` has, which begin with the first of the chunk."""
        if self.low.ndim == 1:
            return self.low, self.high
        return self.low[: x.shape[-2]], self.high[: x.shape[-2]]

    def zero_range(self) -> list[int]:
        """Numbers of the elements that no normalised value can tell apart."""
        if self.mode == "identity":
            return []
        still = self.high == 0 if self.mode == "mean_std" else _still(self.low, self.high)
        return np.flatnonzero(still.reshape(-1, still.shape[-1]).any(0)).tolist()


def _still(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Where a range is none: quantiles of equal numbers lie up to 1e-10 apart, which float32 may round away from each
    other."""
    size = np.maximum(1.0, np.maximum(np.abs(low), np.abs(high)))
    return high - low <= 4 * np.finfo(np.float32).eps * size


def normaliser(
    mode: Mode,
    statistics: Mapping[str, Mapping[str, Any]] | None,
    feature: str,
    size: int,
    where: str,
    *,
    clip: bool = False,
    flat: float = -1.0,
) -> Normaliser:
    """The normaliser of a feature of `size` numbers; `where` is the dataset or folder, for messages.

    Raises:
        DataError: statistics that `mode` needs are absent, of another size, or not finite.
    """
    names = NEEDED[mode]
    if not names:
        empty = np.zeros(0, np.float32)
        return Normaliser(mode, empty, empty)
    entry = (statistics or {}).get(feature)
    if entry is None:
        raise DataError(f"`{where}` has no statistics of `{feature}`, which {_how(mode)} need. {_REMEDY}")
    missing = [name for name in names if entry.get(name) is None]
    if missing:
        raise DataError(f"`{where}`: the statistics of `{feature}` lack {' and '.join(missing)}. {_REMEDY}")
    bounds = [np.asarray(entry[name], np.float32) for name in names]
    bounds = [array.reshape(-1) if array.ndim < 2 else array for array in bounds]
    for name, array in zip(names, bounds, strict=True):
        if array.shape[-1] != size or array.ndim > 2:
            found = "x".join(map(str, array.shape))
            raise DataError(
                f"`{where}`: the statistic {name} of `{feature}` has {found} numbers, not {size}. {_REMEDY}"
            )
        if not np.isfinite(array).all():
            raise DataError(f"`{where}`: the statistic {name} of `{feature}` is not finite. {_REMEDY}")
    if mode != "mean_std" and (bounds[0] > bounds[1]).any():
        raise DataError(f"`{where}`: {names[0]} of `{feature}` is greater than {names[1]}. {_REMEDY}")
    return Normaliser(mode, bounds[0], bounds[1], clip, flat)


_REMEDY = "Set data.options.statistics: compute to have them computed from the frames."


def _how(mode: Mode) -> str:
    return {"quantiles": "quantiles", "min_max": "minimum and maximum", "mean_std": "mean and deviation"}.get(mode, "")


# ------------------------------------------------------------------------------------------------- relative actions
def relative_mask(names: Sequence[str] | None, size: int, exclude: Sequence[str]) -> np.ndarray:
    """Which of `size` actions count from the state, bool [size]: those whose name contains none of `exclude`, without
    regard to case. Without names all do, as in LeRobot."""
    tokens = [token.lower() for token in exclude if token]
    mask = np.ones(size, bool)
    for number, name in enumerate((names or [])[:size]):
        mask[number] = not any(token in str(name).lower() for token in tokens)
    return mask


def offsets(state: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What relative actions count from: state [..., d] -> [..., len(mask)], zero where an action is absolute.

    Raises:
        DataError: the state has fewer numbers than the relative actions.
    """
    last = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
    if state.shape[-1] < last:
        raise DataError(
            f"relative actions need a state of at least {last} numbers, in the order of the actions; it has "
            f"{state.shape[-1]}. Exclude the others by relative_exclude_joints in model.config."
        )
    result = np.zeros((*state.shape[:-1], len(mask)), np.float32)
    result[..., :last] = np.where(mask[:last], state[..., :last], 0)
    return result


def relative_statistics(
    episodes: Sequence[tuple[np.ndarray, np.ndarray]], mask: np.ndarray, horizon: int, *, by_step: bool
) -> dict[str, np.ndarray]:
    """Statistics of chunks of `horizon` actions that count from the state of their first frame.

    `episodes` are (state [n, s], action [n, d]); only chunks that end inside their episode are looked at. `by_step`:
    every step of a chunk has its own, [horizon, d] (GR00T); else all steps together, [d] (LeRobot's Pi0.5).

    Raises:
        DataError: fewer than two such chunks.
    """
    steps: list[list[np.ndarray]] = [[] for _ in range(horizon)]
    for state, action in episodes:
        count = len(action) - horizon + 1
        if count > 0:
            origin = offsets(state[:count], mask)
            for step in range(horizon):
                steps[step].append(np.asarray(action[step : step + count], np.float32) - origin)
    if sum(map(len, steps[0])) < 2:
        raise DataError(f"relative actions need at least two chunks of {horizon} frames; no episode is that long.")
    if not by_step:
        from loong_vla.lerobot.statistics import describe  # quantiles as LeRobot defines them

        return describe(np.concatenate([part for values in steps for part in values]))
    rows = [np.concatenate(values) for values in steps]
    found = {
        "min": [values.min(0) for values in rows],
        "max": [values.max(0) for values in rows],
        "mean": [values.mean(0, dtype=np.float64) for values in rows],
        "std": [values.std(0, dtype=np.float64) for values in rows],
        "q01": [np.quantile(values, 0.01, axis=0) for values in rows],
        "q99": [np.quantile(values, 0.99, axis=0) for values in rows],
    }
    result = {name: np.stack(values).astype(np.float32) for name, values in found.items()}
    return {**result, "count": np.array([len(values) for values in rows])}
