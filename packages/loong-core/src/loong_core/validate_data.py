"""Whether a recipe's data can be trained on: source, options and files, and how they suit the task and the model."""

from __future__ import annotations

from typing import cast

from loong_core.findings import Findings
from loong_core.recipe import DataSection, Recipe
from loong_core.recipe_load import check_options
from loong_core.registry import Registry, resolve
from loong_core.types import DataSource, Task
from loong_core.validate_model import Model

_OF_ROWS = ("seq_len", "pack", "bad_rows", "cache")
"""Keys of `data` that mean something only where rows of text are cut into batches."""


def check_source(recipe: Recipe, registry: Registry, findings: Findings, purpose: str) -> DataSource | None:
    """The data source, its options, and, to `train`, a quick look at the files. None where no such source exists."""
    source = findings.attempt("data.source", lambda: cast(DataSource, registry.get("data_sources", recipe.data.source)))
    if source is None:
        return None
    owner = f"the data source {source.name!r}"
    options, wrong = check_options(findings.loaded.document, ("data", "options"), source.options, owner)
    findings.messages.extend(str(problem) for problem in wrong)
    if purpose != "train":
        return source
    paths = {"data.path": recipe.data.path}
    if recipe.data.eval is not None and recipe.data.eval.path is not None:
        paths["data.eval.path"] = recipe.data.eval.path
    check = findings.attempt("data.source", lambda: resolve(source.check, owner))
    for key, path in paths.items():
        if check is None or (path is None and findings.suspect("data")):
            continue
        with findings.at(key):
            other = f"Set {key} to what the source {source.name} reads, or choose another data.source."
            texts = [str(text).replace("`data.path`", f"`{key}`").rstrip(". ") for text in check(path, options)]
            for text in texts:
                # What is wrong with the source's own options is no fault of the files.
                remedy = "" if text.startswith("data.options.") else f" {source.remedy or other}"
                findings.absorb(key, [f"{text}.{remedy}"])
    return source


def check_match(source: DataSource, task: Task, findings: Findings) -> None:
    """A task of rows needs rows, any other task a source that makes batches."""
    if task.encoder is not None and source.reader is None:
        findings.add(
            "data.source",
            f"the task {task.name!r} reads rows of text, and the source {source.name!r} holds none. Choose another "
            "data.source, or the task.name that belongs to it.",
        )
    if task.encoder is None and source.stream is None:
        findings.add(
            "data.source",
            f"the task {task.name!r} does not read rows of text, which is all that the source {source.name!r} holds. "
            "Set data.source to one that makes batches itself (`loong plugins` lists the sources).",
        )


def check_fit(recipe: Recipe, source: DataSource, model: Model, findings: Findings) -> None:
    """What the source itself finds when it compares its data with the model. Left out where the files are already
    known to be wrong."""
    if source.fit is None or findings.suspect("data", "model") or findings.messages:
        return
    with findings.at("data.path"):
        fit = resolve(source.fit, f"the data source {source.name!r}")
        findings.absorb("data.path", [str(problem) for problem in fit(recipe, model.shape, model.config)])


def unused_keys(recipe: Recipe, source: DataSource) -> list[str]:
    """Notes on keys that are set and have no effect with this source."""
    if source.stream is None:
        return []
    default = DataSection()
    changed = [name for name in _OF_ROWS if getattr(recipe.data, name) != getattr(default, name)]
    return [f"warning: data.{name} has no effect with the source {source.name}" for name in changed]
