"""Turns `data` of a recipe into a tokenizer and caches of samples, once; every later caller finds them on disk.

Run as `python -m loong_core.data.prepare <resolved recipe.yaml>` it exits with 0, or with 2 and the reason on stderr.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

from loong_core.data import cache as caches
from loong_core.data import sources
from loong_core.data.cache import Cache
from loong_core.data.rows import CHAT_KINDS, Encoder, kind_of, texts
from loong_core.errors import DataError, LoongError, RecipeError
from loong_core.recipe import Recipe, TrainTokenizer
from loong_core.registry import Registry, open_registry, resolve
from loong_core.types import DataSource, Row, Task

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 0.2
_REMIND_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """What a run trains on. `held_out` is None unless `data.eval.path` is set: a fraction is taken by the stream.

    `tokenizer` is the folder of the tokenizer that was used, None where rows were token ids already. `notes` are facts
    the user should see, such as the number of rows left out.
    """

    train: Cache
    held_out: Cache | None = None
    tokenizer: Path | None = None
    notes: tuple[str, ...] = ()


def prepare(recipe: Recipe, folder: Path, *, rank: int | None = None, registry: Registry | None = None) -> PreparedData:
    """Build, or find, the tokenizer (in `folder`, the run folder) and the caches of a resolved recipe.

    Rank 0 builds; every other rank waits until the finished folders appear, however long that takes, without holding a
    collective. So the cache folder must be one that all ranks see. `rank` None: what torch.distributed says.

    Raises:
        DataError: bad rows under `data.bad_rows: error`, no usable row, unreadable files, an unwritable cache.
        RecipeError: no source or task of that name, no path, no tokenizer where one is needed.
    """
    registry = registry or open_registry()
    rank = _rank() if rank is None else rank
    task = task_of(recipe, registry)
    tokenizer = _tokenizer(recipe, folder, rank, registry)
    if tokenizer is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"tokenizer": tokenizer})})
    encoder = encoder_of(recipe, registry)
    train = _cached(recipe, recipe.data.path, task, encoder, rank, registry)
    held_out = None
    if recipe.data.eval is not None and recipe.data.eval.path is not None:
        held_out = _cached(recipe, recipe.data.eval.path, task, encoder, rank, registry)
    found = [("data.path", train), ("data.eval.path", held_out)]
    notes = [note for name, cache in found if cache is not None for note in _notes(name, cache)]
    used = getattr(encoder, "tokenizer_folder", tokenizer)
    return PreparedData(train=train, held_out=held_out, tokenizer=used, notes=tuple(notes))


def task_of(recipe: Recipe, registry: Registry) -> Task:
    """The task a recipe names, or its family's own."""
    name = recipe.task.name
    if name is None and recipe.model.family is not None:
        name = registry.get("model_families", recipe.model.family).task
    if name is None:
        raise RecipeError("`task.name` is not set, and no model.family is there to take it from.")
    return cast("Task", registry.get("tasks", name))


def encoder_of(recipe: Recipe, registry: Registry) -> Encoder:
    """The encoder of the recipe's task. Raises whatever it finds wrong with the recipe."""
    task = task_of(recipe, registry)
    if task.encoder is None:
        raise RecipeError(f"`task.name`: {task.name} trains on the batches of another kind of source, not on rows.")
    return cast("Encoder", resolve(task.encoder)(recipe))


def rows_of(recipe: Recipe, path: sources.Paths, registry: Registry) -> Iterator[Any]:
    """The rows of a path, read by the recipe's source."""
    source: DataSource = registry.get("data_sources", recipe.data.source)
    if source.reader is None:
        raise RecipeError(f"`data.source`: {source.name} holds no rows of text; it makes its batches itself.")
    return iter(resolve(source.reader)(path, recipe.data.options))


def cache_folder(recipe: Recipe) -> Path:
    """Where caches of a recipe are kept."""
    return recipe.data.cache or recipe.run.dir / ".cache"


def _tokenizer(recipe: Recipe, folder: Path, rank: int, registry: Registry) -> Path | None:
    """The folder of the tokenizer that the recipe names, or of the one it says to train."""
    wanted = recipe.data.tokenizer
    if not isinstance(wanted, TrainTokenizer):
        return wanted
    from loong_core.data.tokenizer import train

    target = folder / "tokenizer"
    if rank:
        _wait(lambda: (target / "tokenizer.json").is_file() or None, target)
        return target
    if (target / "tokenizer.json").is_file():
        return target
    rows = (row for row in rows_of(recipe, recipe.data.path, registry) if isinstance(row, Row))
    first = next(rows, None)
    chat = first is not None and kind_of(first.fields) in CHAT_KINDS
    everything = chain([first] if first is not None else [], rows)
    return train((text for row in everything for text in texts(row.fields)), wanted.train, target, chat)


def _cached(recipe: Recipe, path: sources.Paths, task: Task, encoder: Encoder, rank: int, registry: Registry) -> Cache:
    source = registry.get("data_sources", recipe.data.source)
    files = sources.files(source, path, recipe.data.options)
    if not files:
        raise DataError(*(resolve(source.check)(path, recipe.data.options) or [f"There is no file in `{path}`."]))
    name = caches.key(
        {
            "files": caches.file_identity(files),
            "source": [recipe.data.source, recipe.data.options],
            "task": [task.name, recipe.task.options],
            "encoder": getattr(encoder, "fingerprint", ""),
            "seq_len": recipe.data.seq_len,
            "bad_rows": recipe.data.bad_rows,
        }
    )
    folder = cache_folder(recipe) / name
    cache = caches.open_cache(folder)
    if cache is None and rank:
        cache = _wait(lambda: caches.open_cache(folder), folder)
    if cache is None:
        rows = rows_of(recipe, path, registry)
        skip = recipe.data.bad_rows == "skip"
        cache = caches.build(folder, rows, encoder, skip_bad=skip, seq_len=recipe.data.seq_len)
    return cache


def _rank() -> int:
    """This process's rank; 0 where no process group exists. Never imports torch for the question."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 0
    return int(distributed.get_rank())


def _wait(find: Any, folder: Path) -> Any:
    """Look for what another process is making until it is there."""
    started = reminded = time.monotonic()
    while (found := find()) is None:
        time.sleep(_WAIT_SECONDS)
        if time.monotonic() - reminded > _REMIND_SECONDS:
            reminded = time.monotonic()
            logger.warning("waiting %.0f s for rank 0 to finish `%s`", reminded - started, folder)
    return found


def _notes(name: str, cache: Cache) -> list[str]:
    index = cache.index
    notes = [
        f"{name}: {index['samples']:,} samples, {index['tokens']:,} tokens, {index['counted']:,} counted, "
        f"from {index['rows']:,} rows of {len(index['files']):,} files"
    ]
    if index["bad"]:
        example = cache.bad_rows()[0]
        notes.append(f"{name}: {index['bad']:,} rows were left out (data.bad_rows: skip), the first: {example}")
    notes += [f"{name}: {count:,} rows were {what}" for what, count in index["counters"].items() if count]
    return notes


def hash_files(files: Sequence[Path]) -> str:
    """One hash over names and contents of files, in the given order."""
    total = hashlib.sha256()
    for path in files:
        total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the data of the resolved recipe file named on the command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) != 1:
        sys.stderr.write("usage: python -m loong_core.data.prepare <resolved recipe.yaml>\n")
        return 2
    from loong_core.recipe_load import load

    logging.basicConfig(format="%(message)s")
    logging.getLogger("loong_core").setLevel(logging.INFO)
    try:
        registry = open_registry()
        recipe = load(given[0], [], registry).recipe
        for note in prepare(recipe, recipe.run.dir / recipe.run.name, registry=registry).notes:
            sys.stdout.write(f"{note}\n")
    except LoongError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
