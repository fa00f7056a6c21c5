"""Plugins load in isolation: whatever one of them does wrong, the others work and the fault is named."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path

import pytest

from loong_core import plugins

HOOK = "from loong_core import hookimpl, RecipeFolder\nfrom pathlib import Path\n"
GOOD = HOOK + "@hookimpl\ndef loong_recipes():\n    return [RecipeFolder(name={name!r}, path=Path('.'))]\n"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write importable modules; they are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written: list[str] = []

    def write(name: str, text: str) -> EntryPoint:
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)
        return EntryPoint(name.removeprefix("plugin_"), name, "loong")

    yield write
    for name in written:
        sys.modules.pop(name, None)


def test_the_core_comes_through_the_same_door() -> None:
    loaded = plugins.load([], {})
    assert [info.name for info in loaded.working] == ["core"]
    assert loaded.infos["core"].dist == "loong-core"
    assert loaded.infos["core"].version == plugins.core_version()
    assert "loong_backends" in loaded.infos["core"].hooks


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import a_module_nobody_has", "ModuleNotFoundError: No module named 'a_module_nobody_has'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def (", "SyntaxError"),
        (HOOK + "@hookimpl\ndef loong_backend():\n    return []\n", "Did you mean loong_backends?"),
        (HOOK + "@hookimpl(specname='loong_tsks')\ndef tasks():\n    return []\n", "Did you mean loong_tasks?"),
        (HOOK + "def loong_tasks():\n    return []\n", "without @hookimpl"),
        (HOOK + "@hookimpl\ndef loong_tasks(recipe):\n    return []\n", "declared in the hookimpl"),
    ],
)
def test_a_broken_plugin_is_isolated_and_named(module, text: str, reason: str) -> None:
    points = [module("plugin_bad", text), module("plugin_fine", GOOD.format(name="fine"))]
    loaded = plugins.load(points, {})
    assert [info.name for info in loaded.working] == ["core", "fine"]
    assert reason in loaded.infos["bad"].reason()
    assert "bad (" in loaded.failures()
    assert not loaded.manager.has_plugin("bad")
    assert len(loaded.hook.loong_recipes()) == 1


def test_two_distributions_with_one_plugin_name(module, tmp_path: Path) -> None:
    point = module("plugin_twin", GOOD.format(name="twin"))
    dists = []
    for name in ("first", "second"):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        dists.append(EntryPoint(point.name, point.value, point.group)._for(Distribution.at(folder)))
    loaded = plugins.load(reversed(dists), {})
    assert loaded.infos["twin"].dist == "first"
    assert "already taken by 'twin' (first 1.0)" in loaded.infos["twin of second"].reason()


def test_nobody_takes_the_name_of_the_core(module) -> None:
    loaded = plugins.load([module("plugin_core", GOOD.format(name="x"))], {})
    assert loaded.infos["core"].error is None
    assert "already taken" in loaded.failures()


def test_loong_plugins_restricts(module) -> None:
    points = [module("plugin_one", GOOD.format(name="one")), module("plugin_two", GOOD.format(name="two"))]
    loaded = plugins.load(points, {"LOONG_PLUGINS": "two, three"})
    assert [info.name for info in loaded.working] == ["core", "two"]
    assert "not installed. Installed: one, two" in loaded.infos["three"].reason()
    assert [info.name for info in plugins.load(points, {"LOONG_PLUGINS": ""}).working] == ["core"]


def test_single_file_plugins(tmp_path: Path) -> None:
    good, clash = tmp_path / "my_own_plugin.py", tmp_path / "json.py"
    for path in (good, clash):
        path.write_text(GOOD.format(name=path.stem))
    names = ":".join(map(str, (good, clash, tmp_path / "absent.py")))
    try:
        loaded = plugins.load([], {"LOONG_PLUGIN_FILES": names})
        assert [info.name for info in loaded.working] == ["core", "my_own_plugin"]
        assert sys.modules["my_own_plugin"].__file__ == str(good)
        assert "module named 'json' exists already" in loaded.infos["json"].reason()
        assert "no such file" in loaded.infos["absent"].reason()
        assert plugins.load([], {"LOONG_PLUGIN_FILES": str(good)}).infos["my_own_plugin"].error is None
    finally:
        sys.modules.pop("my_own_plugin", None)


def test_single_file_plugin_in_the_working_folder(tmp_path: Path) -> None:
    """Workers are started with `python -m`, which puts the working folder, and so the file itself, on the path."""
    (tmp_path / "here.py").write_text(GOOD.format(name="here"))
    script = "from loong_core import plugins; print(plugins.load([]).infos['here'].reason() or 'loaded')"
    words = [sys.executable, "-c", f"import sys; sys.path.insert(0, ''); {script}"]
    environ = {**os.environ, "LOONG_PLUGIN_FILES": "here.py"}
    result = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert result.stdout.strip() == "loaded", result.stdout + result.stderr


def test_hook_calls_are_traced_on_request(module, capsys: pytest.CaptureFixture[str]) -> None:
    points = [module("plugin_seen", HOOK + "@hookimpl\ndef loong_run_start(run):\n    pass\n")]
    plugins.load(points, {}).hook.loong_run_start(run=None)
    assert capsys.readouterr().err == ""
    plugins.load(points, {"LOONG_TRACE_HOOKS": "1"}).hook.loong_run_start(run=None)
    assert "loong_run_start(run) -> seen" in capsys.readouterr().err
