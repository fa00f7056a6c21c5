"""What `loong data` shows: kinds, lengths, masks, duplicates and packing, found with the code that training uses."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from loong_core.data.cache import Cache
from loong_core.data.layout import Layout
from loong_core.data.pack import efficiency
from loong_core.data.prepare import encoder_of, prepare, rows_of
from loong_core.data.rows import CHAT_KINDS, BadRow, RowError, kind_of
from loong_core.errors import DataError, LoongError, UserError
from loong_core.recipe import Recipe
from loong_core.recipe_load import from_mapping, load
from loong_core.registry import Registry, resolve
from loong_core.types import Row

_SAMPLED_ROWS = 1000
_SHOWN = 20
_TABLE_SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl"}


def target(argument: str, overrides: list[str], settings: Mapping[str, Any], registry: Registry) -> Recipe:
    """The recipe to look at: a recipe file or a shipped one with `overrides`, or one made up around a data path.

    `settings` are `source`, `task`, `tokenizer`, `seq_len`; None: guessed from names and first rows (task, source),
    absent (tokenizer), or the recipe's default.

    Raises:
        UserError: the argument is neither, overrides are given to a data path, or settings to a recipe.
    """
    path = Path(argument).expanduser()
    given = {name: value for name, value in settings.items() if value is not None}
    if _is_recipe(path):
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{argument} is a recipe; {options} would be ignored. Use overrides: data.seq_len=4096.")
        return load(argument, overrides, registry).recipe
    if overrides:
        raise UserError(f"{argument} is data, not a recipe; there is nothing to override with {' '.join(overrides)!r}.")
    source = given.get("source") or _guess_source(path, registry)
    if registry.get("data_sources", source).report is not None:
        if ignored := [f"--{name.replace('_', '-')}" for name in given if name != "source"]:
            raise UserError(f"{argument} is data of the source {source}; {', '.join(ignored)} would be ignored.")
        return from_mapping({"data": {"path": str(path), "source": source}})
    data = {"path": str(path), "source": source}
    data.update({name: given[name] for name in ("tokenizer", "seq_len") if name in given})
    recipe = from_mapping({"data": data, "task": {"name": given.get("task")}})
    if recipe.task.name is None:
        named = recipe.task.model_copy(update={"name": _guess_task(recipe, registry)})
        recipe = recipe.model_copy(update={"task": named})
    return recipe


def _is_recipe(path: Path) -> bool:
    if path.suffix in (".yaml", ".yml"):
        return True
    if not path.exists():
        return not path.suffix and len(path.parts) == 1
    if path.suffix != ".json":
        return path.is_dir() and (path / "recipe.yaml").is_file()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(value, dict) and value.keys() <= Recipe.model_fields.keys()


def _guess_source(path: Path, registry: Registry) -> str:
    for source in registry.table("data_sources").values():
        if source.claims is not None and resolve(source.claims, f"data source {source.name}")(path):
            return source.name
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    for file in files:
        suffix = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
        if suffix in _TABLE_SUFFIXES:
            return _TABLE_SUFFIXES[suffix]
    return "text"


def _guess_task(recipe: Recipe, registry: Registry) -> str:
    rows = itertools.islice(rows_of(recipe, recipe.data.path, registry), _SAMPLED_ROWS)
    kinds = [kind_of(row.fields) for row in rows if isinstance(row, Row)]
    return "sft" if any(kind in CHAT_KINDS for kind in kinds) else "pretrain"


def problems(recipe: Recipe, registry: Registry) -> list[str]:
    """What the source's own quick check finds."""
    source = registry.get("data_sources", recipe.data.source)
    return list(resolve(source.check)(recipe.data.path, recipe.data.options))


def report(recipe: Recipe, registry: Registry, thorough: bool, picture: Path | None) -> dict[str, Any] | None:
    """What a source with a report of its own says of the recipe's data (see `DataSource.report`); None where rows of
    text are to be looked at.

    Raises:
        UserError: a picture is wanted of data that has none.
    """
    source = registry.get("data_sources", recipe.data.source)
    if source.report is not None:
        made = resolve(source.report, f"data source {source.name}")
        return cast("dict[str, Any]", made(recipe.data.path, recipe.data.options, thorough, picture))
    if picture is not None:
        raise UserError(f"--contact-sheet: the source {source.name} holds no images. Leave it out.")
    return None


def inspect(recipe: Recipe, registry: Registry) -> dict[str, Any]:
    """Kind, rows and columns of every file, token statistics of the first rows, and the mask of one example.

    `tokens` and `example` are None with the reason in `unknown` where there is no tokenizer or no usable row.
    """
    found: dict[str, dict[str, Any]] = {}
    sample: list[Row] = []
    for row in rows_of(recipe, recipe.data.path, registry):
        entry = found.setdefault(row.file, {"file": row.file, "kind": None, "rows": 0, "bad": 0, "columns": {}})
        entry["rows"] += 1
        if isinstance(row, BadRow):
            entry["bad"] += 1
            continue
        entry["kind"] = entry["kind"] or kind_of(row.fields)
        entry["columns"].update(dict.fromkeys(row.fields))
        if len(sample) < _SAMPLED_ROWS:
            sample.append(row)
    result: dict[str, Any] = {
        "source": recipe.data.source,
        "task": recipe.task.name,
        "rows": sum(entry["rows"] for entry in found.values()),
        "kinds": dict(Counter(str(entry["kind"]) for entry in found.values())),
        "files": [{**entry, "columns": list(entry["columns"])} for entry in found.values()],
        "sampled": len(sample),
    }
    return {**result, **_sampled(recipe, sample, registry)}


def _sampled(recipe: Recipe, rows: list[Row], registry: Registry) -> dict[str, Any]:
    """Statistics and one example of rows of any length, long ones included."""
    nothing = {"tokens": None, "counted": None, "example": None, "unusable": 0}
    try:
        encoder = cast(Any, encoder_of(recipe, registry))
        if not hasattr(encoder, "label"):
            return {**nothing, "unknown": "this task does not say how long rows are"}
        labelled = list(zip(rows, encoder.label(rows), strict=True))
    except LoongError as error:
        return {**nothing, "unknown": str(error)}
    usable = [(row, item) for row, item in labelled if not isinstance(item, RowError)]
    if not usable:
        reason = str(labelled[0][1]) if labelled else "there is no row"
        return {**nothing, "unusable": len(labelled), "unknown": f"no row can be used: {reason}"}
    row = usable[0][0]
    return {
        "tokens": statistics(np.array([len(item.tokens) for _, item in usable])),
        "counted": statistics(np.array([np.count_nonzero(item.labels[1:] != -100) for _, item in usable])),
        "unusable": len(labelled) - len(usable),
        "example": {"place": f"{row.file}:{row.line}" if row.line else row.file, "text": encoder.explain(row)},
        "unknown": None,
    }


def statistics(values: np.ndarray) -> dict[str, float]:
    """Total, mean and spread of counts."""
    names, points = ("min", "median", "p95", "max"), (0, 50, 95, 100)
    spread = np.percentile(values, points, method="lower") if len(values) else np.zeros(4)
    mean = float(values.mean()) if len(values) else 0.0
    return {"total": int(values.sum()), "mean": mean, **{name: int(v) for name, v in zip(names, spread, strict=True)}}


def check(recipe: Recipe, registry: Registry, folder: Path) -> dict[str, Any]:
    """Everything training would meet: bad rows, lengths, duplicates, packing. Writes below `folder` only.

    Raises:
        DataError: the files are missing or of an unknown shape, or no row can be used.
    """
    if found := problems(recipe, registry):
        raise DataError(found)
    data = recipe.data.model_copy(update={"bad_rows": "skip", "cache": folder / "cache"})
    cache = prepare(recipe.model_copy(update={"data": data}), folder, registry=registry).train
    index = cache.index
    return {
        "rows": index["rows"],
        "samples": len(cache),
        "bad": index["bad"],
        "bad_rows": cache.bad_rows()[:_SHOWN],
        "tokens": statistics(cache.lengths),
        "counted": statistics(cache.counted),
        "counters": dict(index["counters"]),
        "duplicates": duplicates(cache),
        "packing": packing(recipe, cache),
    }


def duplicates(cache: Cache) -> dict[str, Any]:
    """Samples that repeat an earlier one token by token, and the places of the first few pairs."""
    seen: dict[bytes, int] = {}
    count = 0
    shown: list[list[str]] = []
    for number in range(len(cache)):
        digest = hashlib.blake2b(digest_size=16)
        for name, values in cache.sample(number).items():
            digest.update(name.encode() + values.tobytes())
        first = seen.setdefault(digest.digest(), number)
        if first != number:
            count += 1
            if len(shown) < _SHOWN:
                shown.append([cache.place(first), cache.place(number)])
    return {"count": count, "pairs": shown}


def packing(recipe: Recipe, cache: Cache) -> dict[str, Any]:
    """Rows of the first epoch with and without packing, and the share of tokens that are not padding."""
    length, everything = recipe.data.seq_len, np.arange(len(cache))
    result: dict[str, Any] = {"pack": recipe.data.pack, "seq_len": length}
    for name, pack in (("packed", True), ("unpacked", False)):
        layout = Layout(cache, everything, seq_len=length, pack=pack, shuffle=recipe.data.shuffle, seed=recipe.run.seed)
        rows = len(layout.epoch(0)[1])
        result[name] = {"rows": rows, "efficiency": efficiency(cache.lengths, rows, length)}
    used = result["packed" if recipe.data.pack else "unpacked"]["rows"]
    result["steps_per_epoch"] = used / recipe.data.global_batch
    return result


def pack(recipe: Recipe, registry: Registry, folder: Path) -> dict[str, Any]:
    """Tokenise into the cache that a run of this recipe uses, and say how the samples pack. A tokenizer that has to be
    trained first is put into `folder`; the run trains an equal one."""
    if registry.get("data_sources", recipe.data.source).reader is None:
        raise UserError(f"There is nothing to tokenise: the source {recipe.data.source} makes its batches itself.")
    if found := problems(recipe, registry):
        raise DataError(found)
    prepared = prepare(recipe, folder, registry=registry)
    return {
        "cache": str(prepared.train.folder),
        "notes": list(prepared.notes),
        "samples": len(prepared.train),
        "tokens": int(prepared.train.lengths.sum()),
        "packing": packing(recipe, prepared.train),
    }
