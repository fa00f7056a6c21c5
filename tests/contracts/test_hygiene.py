"""What no file of the repository may hold: hosts of package registries, paths of one machine, unsafe loading."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
# Written in pieces, so that this file does not hold them either.
HOSTS = re.compile("|".join((r"py" r"pi\.", r"python" r"hosted", r"npm" r"js\.", r"repo\.anaconda", r"crates" r"\.io")))
MACHINE = re.compile("|".join((r"/wo" r"rk/\w", r"/ro" r"ot/", r"/home" r"/\w+", r"/opt" r"/\w+", r"/Us" r"ers/\w")))
UNSAFE = re.compile(
    "|".join(
        (
            r"\bpick" r"le\.(load|dump)",
            r"allow_pick" r"le=True",
            r"weights_only=Fa" r"lse",
            r"yaml\.lo" r"ad\(",
            r"shell=Tr" r"ue",
            r"trust_remote_code=Tr" r"ue",
        )
    )
)


def _files() -> list[Path]:
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        found = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        found = [
            path for path in ROOT.rglob("*") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
        ]
    return [path for path in found if path.is_file() and path.stat().st_size < 1_000_000]


def _hits(pattern: re.Pattern[str], files: list[Path]) -> list[str]:
    hits = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        hits += [f"{path.relative_to(ROOT)}: {found[0]}" for found in pattern.finditer(text)]
    return hits


def test_there_are_files() -> None:
    assert len(_files()) > 100


@pytest.mark.parametrize("pattern", [HOSTS, MACHINE], ids=["registry hosts", "machine paths"])
def test_no_file_names(pattern: re.Pattern[str]) -> None:
    assert _hits(pattern, _files()) == []


def test_no_source_loads_unsafely() -> None:
    sources = [path for path in _files() if path.suffix == ".py" and "tests" not in path.parts]
    assert _hits(UNSAFE, sources) == []


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: folder.name)
def test_every_package_is_complete(folder: Path) -> None:
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == folder.name
    assert project["license"] == "Apache-2.0"
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    module = folder.name.replace("-", "_")
    for name in (
        "README.md",
        "CHANGELOG.md",
        "changes",
        f"src/{module}/__about__.py",
        f"src/{module}/py.typed",
        "tests",
    ):
        assert (folder / name).exists(), name


def test_siblings_depend_on_ranges() -> None:
    for folder in PACKAGES:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for requirement in project["dependencies"]:
            if requirement.startswith("loong-"):
                assert re.fullmatch(r"loong-\w+(\[[\w,]+\])?>=\d+\.\d+,<\d+\.\d+", requirement), requirement


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in _files() if path.match("test_*.py") and "examples" not in path.parts]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
