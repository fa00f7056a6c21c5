"""The run folder before the run: identity, records, and taking back what was never used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from loong_core import run_folder
from loong_core.errors import RunError
from loong_core.recipe import Recipe
from loong_core.recipe_load import dump, from_mapping


def recipe(**sections: dict[str, object]) -> Recipe:
    return from_mapping({"model": {"family": "x", "config": {"a": 1}}, "task": {"name": "t"}, **sections})


@pytest.mark.parametrize(
    "sections",
    [
        {"run": {"steps": 5, "dir": "elsewhere"}},
        {"optim": {"lr": 1.0}},
        {"parallel": {"tp": 2}, "launch": {"devices": 2}, "backend": "cuda", "ops": {"attention": "x"}},
        {"checkpoint": {"every": 3}, "log": {"every": 2}},
        {"data": {"micro_batch": 2, "eval": {"batches": 3}, "cache": "c"}},
        {"data": {"options": {"skip_quota": 500, "threads": 2}}},
    ],
)
def test_what_may_change_within_a_run(sections: dict[str, dict[str, object]]) -> None:
    assert run_folder.differences(recipe(), recipe(**sections)) == []


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"run": {"seed": 5}}, "run.seed (0 there, 5 now)"),
        ({"model": {"family": "x", "config": {"a": 2}}}, "model.config.a (1 there, 2 now)"),
        ({"model": {"family": "x", "config": {"a": 1, "b": 2}}}, "model.config.b (null there, 2 now)"),
        ({"model": {"family": "y", "config": {"a": 1}}}, 'model.family ("x" there, "y" now)'),
        ({"data": {"path": "new"}}, "data.path"),
        ({"data": {"global_batch": 3}}, "data.global_batch (8 there, 3 now)"),
        ({"data": {"options": {"episodes": [1]}}}, "data.options.episodes (null there, [1] now)"),
        ({"precision": "fp32"}, "precision"),
        ({"task": {"name": "other"}}, "task.name"),
    ],
)
def test_what_makes_another_run(sections: dict[str, dict[str, object]], key: str) -> None:
    (found,) = run_folder.differences(recipe(), recipe(**sections))
    assert found.startswith(key)


def test_paths_are_compared_by_what_they_mean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    here, there = recipe(data={"path": ["a", "b"]}), recipe(data={"path": [str(tmp_path / "a"), str(tmp_path / "b")]})
    assert run_folder.differences(here, there) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", " a", "a ", "a*", "a:b", "a\0"])
def test_names_that_are_no_folder(name: str) -> None:
    assert "Allowed" in run_folder.name_problem(name)


@pytest.mark.parametrize("name", ["demo", "2024", "a.b", "größe", "a b"])
def test_names_that_are(name: str) -> None:
    assert run_folder.name_problem(name) == ""


def test_a_folder_with_an_unreadable_recipe_is_not_taken(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("nonsense: [")
    (text,) = run_folder.problems(recipe(run={"dir": str(tmp_path)}))
    assert "cannot be read" in text and "another run.name" in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_permissions(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    (text,) = run_folder.problems(recipe(run={"dir": str(tmp_path)}))
    assert "not writable" in text


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    run_folder.write(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        run_folder.write(path, "new")
    assert path.read_text() == "old"


def test_discard_leaves_what_it_did_not_write(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    for name in ("recipe.yaml", "plan.json", "manifest.json"):
        (folder / name).write_text("x")
    (folder / "logs" / "rank-0000.log").write_text("something happened")
    run_folder.discard(folder)
    assert [path.name for path in sorted(folder.rglob("*"))] == ["logs", "rank-0000.log"]
    (folder / "logs" / "rank-0000.log").unlink()
    run_folder.discard(folder)
    assert not folder.exists()


def test_the_saved_recipe_is_itself_the_same_run(tmp_path: Path) -> None:
    mine = recipe(run={"dir": str(tmp_path)})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump(mine))
    assert run_folder.problems(mine) == []


def test_git_revision(tmp_path: Path) -> None:
    assert run_folder.git_revision(tmp_path) is None
    here = run_folder.git_revision(Path(__file__).parent)
    if here is not None:
        assert len(here["revision"]) == 40 and isinstance(here["changed"], bool)
        json.dumps(here)


def test_the_records_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("loong_llm", reason="needs a real model family")
    from loong_core import recipe_load, registry, validate

    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOONG_PLUGINS", "LOONG_PLUGIN_FILES"):
        monkeypatch.delenv(name, raising=False)
    Path("a.txt").write_text("text")
    Path("r.yaml").write_text(
        "run: {seed: 7}\nmodel: {family: qwen3, config: qwen3-0.6b}\ndata: {source: text, path: a.txt}\n"
    )
    plugins = registry.open_registry()
    prepared = validate.prepare(recipe_load.load("r.yaml", [], plugins), plugins)
    folder = run_folder.create(prepared, plugins)
    assert folder == tmp_path / "runs" / "run"
    assert sorted(path.name for path in folder.iterdir()) == ["logs", "manifest.json", "plan.json", "recipe.yaml"]
    assert recipe_load.load_file(folder / "recipe.yaml") == prepared.recipe
    assert run_folder.wait_for(prepared, seconds=1) == folder
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["world"] == plan["tp"] == 1 and plan["model"]["layers"] == 28 and plan["parameters"] > 5e8
    record = json.loads((folder / "manifest.json").read_text())
    assert record["packages"]["loong-core"] and record["seeds"] == {"run": 7}
    assert {"core", "llm"} <= {item["name"] for item in record["plugins"]}
    assert record["ops"]["attention"]["reason"] and record["hardware"]["backend"] == prepared.backend.name
    other = validate.prepare(recipe_load.load("r.yaml", ["run.steps=3"], plugins), plugins)
    with pytest.raises(RunError, match="Rank 0 has not written"):
        run_folder.wait_for(other, seconds=0.3)
