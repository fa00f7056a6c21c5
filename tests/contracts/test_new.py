"""`loong new`: what it writes installs beside loong and passes its own tests; what it refuses, it explains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from loong_core.cli.new import create, name_problems
from loong_core.errors import UserError

if TYPE_CHECKING:
    from conftest import CleanEnvironment

KINDS = ("model", "backend", "plugin")


@pytest.fixture(scope="module")
def generated(clean_environment: CleanEnvironment, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One package of each kind, written by the command and installed from wheels next to each other."""
    folder = tmp_path_factory.mktemp("generated")
    for kind in KINDS:
        printed = clean_environment.check("loong", "new", kind, f"fresh_{kind}", cwd=folder)
        assert f"loong-fresh-{kind}" in printed and "pytest" in printed
    projects = {kind: folder / f"loong-fresh-{kind}" for kind in KINDS}
    clean_environment.install(*projects.values())
    return projects


@pytest.mark.parametrize("kind", KINDS)
def test_generated_package_passes_its_own_tests(
    kind: str, generated: dict[str, Path], clean_environment: CleanEnvironment
) -> None:
    words = ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    closing = clean_environment.check(*words, cwd=generated[kind]).strip().splitlines()[-1]
    assert " passed" in closing and "failed" not in closing and "skipped" not in closing, closing


def test_generated_plugins_work_side_by_side(
    generated: dict[str, Path], clean_environment: CleanEnvironment, tmp_path: Path
) -> None:
    rows = clean_environment.json("loong", "plugins", "--json", cwd=tmp_path)["plugins"]
    provided = {row["name"]: row["provides"] for row in rows if row["error"] is None}
    assert provided["fresh_model"] == {"model_families": ["fresh_model"]}
    assert provided["fresh_backend"] == {"backends": ["fresh_backend"], "ops": ["rms_norm.fresh_backend"]}
    assert provided["fresh_plugin"] == {"data_sources": ["fresh_plugin"]}


@pytest.mark.parametrize("kind", KINDS)
def test_written_text_is_complete_and_tidy(kind: str, tmp_path: Path) -> None:
    folder = create(kind, "a_much_longer_name_than_most", tmp_path / "package")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"README.md", "pyproject.toml", "plugin.py", "test_contract.py"}
    for path in files:
        text = path.read_text("utf-8")
        assert "$" not in text, f"{path.name} has a word that was not filled in"
        assert "__module__" not in str(path) and ".template" not in path.name
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length", "120", "--select", "E,F,I,UP,B,SIM"]
    result = subprocess.run([*ruff, str(folder)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ["Acme", "acme-chip", "1st", "acme__chip", "class", "", "a b", "../up", "x" * 41, "ä"])
def test_malformed_name_is_refused(name: str) -> None:
    (problem,) = name_problems(name)
    assert repr(name) in problem and "For example: acme" in problem


@pytest.mark.parametrize("name", ["llm", "core", "ckpt"])
def test_taken_name_is_refused(name: str) -> None:
    (problem,) = name_problems(name)
    assert "a plugin of this name is installed" in problem


def test_existing_folder_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    with pytest.raises(UserError, match="exists already"):
        create("model", "acme", target)
    assert list(target.iterdir()) == []
    with pytest.raises(UserError) as caught:
        create("model", "Bad", target)
    assert len(caught.value.problems) == 2, "both problems at once"


def test_nothing_is_left_where_it_cannot_be_written(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.touch()
    with pytest.raises(UserError, match="cannot be written"):
        create("model", "acme", blocker / "below" / "acme")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_command_reports_wrong_input_with_code_2(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "loong_core", "new", "model", "Not-A-Name"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert "Not-A-Name" in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
