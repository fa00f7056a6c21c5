"""Every path that CONTRIBUTING names exists, and so does every nox session that prose mentions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PATHS = sorted(set(re.findall(r"`((?:packages|docs|tools|tests|examples|constraints)/[\w./-]*)`", CONTRIBUTING)))


def test_the_table_names_paths() -> None:
    table = CONTRIBUTING.split("## Where do I change it?")[1].split("##")[0]
    assert len(re.findall(r"`packages/[\w./-]+`", table)) >= 12


@pytest.mark.parametrize("path", PATHS)
def test_paths_exist(path: str) -> None:
    assert (ROOT / path).exists()


def test_sessions_exist() -> None:
    sessions = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(encoding="utf-8"), re.MULTILINE))
    wanted = {"quickstart", "tests", "contracts", "e2e", "lint", "types", "docs", "build", "release", "gpu"}
    assert wanted <= sessions
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob(".ci/*")]:
        for name in re.findall(r"nox -s \"?(\w+)", page.read_text(encoding="utf-8")):
            assert name in sessions, f"{page.name}: nox -s {name}"


def test_ci_runs_the_command_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^python3\.12 .* -s tests$", readme, re.MULTILINE)
    words = [part.replace("--quiet ", "").strip() for part in command.split("&&")]
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").replace("--quiet ", "")
    assert all(word in script for word in words)
