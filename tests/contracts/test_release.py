"""Releasing a package, on a copy: version, changelog section and tag agree, and what is wrong is said."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import release

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "packages/loong-ckpt"
    shutil.copytree(ROOT / "packages/loong-ckpt", folder, ignore=shutil.ignore_patterns("tests", "__pycache__"))
    for path in (folder / "changes").iterdir():
        path.unlink()
    (folder / "changes/12.fix.md").write_text("Name the shard that is missing.\n")
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def test_bump_writes_version_and_changelog(copy: Path) -> None:
    major, minor, _ = release.version("loong-ckpt", copy).split(".")
    number = release.bump("loong-ckpt", "minor", copy)
    assert number == release.version("loong-ckpt", copy) == f"{major}.{int(minor) + 1}.0"
    changelog = (copy / "packages/loong-ckpt/CHANGELOG.md").read_text()
    assert f"## {number} (" in changelog and "### Fixes\n\n- Name the shard that is missing. (#12)" in changelog
    assert release.fragments("loong-ckpt", copy) == []
    assert release.check_tag(f"loong-ckpt-v{number}", copy) == "loong-ckpt"


def test_a_first_release_keeps_its_version(copy: Path) -> None:
    declared = release.version("loong-ckpt", copy)
    assert release.bump("loong-ckpt", "current", copy) == declared
    assert release.check_tag(f"loong-ckpt-v{declared}", copy) == "loong-ckpt"


@pytest.mark.parametrize(
    ("tag", "says"),
    [("v0.1.0", "no release tag"), ("loong-ckpt-v9.9.9", "declares"), ("loong-nothing-v0.1.0", "no package named")],
)
def test_a_wrong_tag_is_refused(copy: Path, tag: str, says: str) -> None:
    with pytest.raises(SystemExit, match=says):
        release.check_tag(tag, copy)


def test_a_version_without_a_changelog_section_is_refused(copy: Path) -> None:
    with pytest.raises(SystemExit, match="newest section"):
        release.check_tag(f"loong-ckpt-v{release.version('loong-ckpt', copy)}", copy)


def test_a_release_needs_something_to_tell(copy: Path) -> None:
    (copy / "packages/loong-ckpt/changes/12.fix.md").unlink()
    with pytest.raises(SystemExit, match="no fragment"):
        release.bump("loong-ckpt", "patch", copy)


@pytest.mark.parametrize("package", [path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")])
def test_waiting_fragments_have_names_towncrier_reads(package: str) -> None:
    release.fragments(package)


def test_a_fragment_with_a_wrong_name_is_refused(copy: Path) -> None:
    (copy / "packages/loong-ckpt/changes/12.bug.md").write_text("x")
    with pytest.raises(SystemExit, match="breaking, feature, fix, perf, docs"):
        release.fragments("loong-ckpt", copy)


def _extras() -> ModuleType:
    spec = importlib.util.spec_from_file_location("extras", ROOT / "tools/extras.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_extras_point_into_a_checkout_and_are_ranges_elsewhere(tmp_path: Path) -> None:
    hook, extras = _extras().ExtrasHook, {"extras": {"x": ["loong-core[data,torch]>=0.1,<0.2", "numpy>=2"]}}
    inside: dict[str, dict[str, list[str]]] = {}
    hook(str(ROOT), extras).update(inside)
    folder = (ROOT / "packages/loong-core").as_uri()
    assert inside["optional-dependencies"]["x"] == [
        f"loong-core @ {folder}",
        f"loong-core[data,torch] @ {folder}",
        "numpy>=2",
    ]
    outside: dict[str, dict[str, list[str]]] = {}
    hook(str(tmp_path), extras).update(outside)
    assert outside["optional-dependencies"] == extras["extras"]


def test_extras_reach_every_sibling_that_a_sibling_needs() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = settings["tool"]["hatch"]["metadata"]["hooks"]["custom"]["extras"]
    for name, requirements in extras.items():
        listed = {word.split("[")[0].split(">")[0] for word in requirements}
        for sibling in listed & {path.name for path in (ROOT / "packages").iterdir()}:
            project = tomllib.loads((ROOT / "packages" / sibling / "pyproject.toml").read_text(encoding="utf-8"))
            needed = {
                w.split("[")[0].split(">")[0] for w in project["project"]["dependencies"] if w.startswith("loong-")
            }
            assert needed <= listed, f"{name}: {sibling} needs {needed - listed}"
