"""A clean environment for tests that install packages: it sees every installed library, but loong only as wheels."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Tests run in it see no GPU, one thread a process, and nothing of the test run's own settings.
SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
DROPPED = ("PYTHONPATH", "PYTHONHOME", "LOONG_PLUGINS", "LOONG_PLUGIN_FILES", "LOONG_TRACE_HOOKS", "VIRTUAL_ENV")


@dataclass
class CleanEnvironment:
    """A virtual environment. Third-party libraries are linked from the running one, loong's own packages are not."""

    folder: Path
    installed: set[str] = field(default_factory=set)

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def create(self) -> None:
        """Make it: a few hundred links instead of gigabytes."""
        subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True, capture_output=True)
        links = self.folder / "links"
        links.mkdir()
        for site in {Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))}:
            for entry in site.iterdir():
                ours = entry.name.lower().replace("-", "_").startswith(("loong", "_editable", "__editable__"))
                if not ours and entry.suffix != ".pth" and entry.name not in ("__pycache__", "pip", "_virtualenv.py"):
                    (links / entry.name).symlink_to(entry)
        (self.site / "links.pth").write_text(f"{links}\n")

    @property
    def site(self) -> Path:
        """Its own site-packages, which come before the linked ones."""
        return next((self.folder / "lib").glob("python3.*/site-packages"))

    def wheel(self, project: Path) -> Path:
        """Build the wheel of a project folder."""
        target = self.folder / "wheels" / project.name
        if importlib.util.find_spec("hatchling") is not None:
            words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
        elif uv := _uv():
            words = [*uv, "build", "--wheel", "--out-dir", str(target), str(project)]
        else:
            words = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(target), str(project)]
        result = subprocess.run(words, cwd=project, capture_output=True, text=True)
        assert result.returncode == 0, f"{project.name}: {result.stdout}{result.stderr}"
        (found,) = target.glob("*.whl")
        return found

    def install(self, *projects: Path) -> None:
        """Build and install project folders as wheels, without looking at dependencies; once each."""
        wanted = [project for project in projects if project.name not in self.installed]
        if not wanted:
            return
        wheels = [str(self.wheel(project)) for project in wanted]
        words = [str(self.python), "-m", "pip", "install", "--no-deps", "--no-index", *wheels]
        result = subprocess.run(words, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        self.installed.update(project.name for project in wanted)

    def run(self, *words: str, cwd: Path, timeout: float = 600, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a program of this environment (`python`, `loong`) and return what it printed, whatever its exit code."""
        program = str(self.folder / "bin" / words[0])
        return subprocess.run(
            [program, *words[1:]],
            cwd=cwd,
            env={**self.environ(), **environ},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def environ(self) -> dict[str, str]:
        """The environment variables of its programs."""
        base = {name: value for name, value in os.environ.items() if name not in DROPPED}
        base["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{base.get('PATH', '')}"
        return {**base, **SETTINGS}

    def add_programs(self, *names: str) -> None:
        """Give linked libraries their command: a module of that name is run with this environment's interpreter."""
        for name in names:
            program = self.folder / "bin" / name
            if not program.exists():
                program.write_text(f'#!/bin/sh\nexec "{self.python}" -m {name} "$@"\n')
                program.chmod(0o755)

    def check(self, *words: str, cwd: Path, timeout: float = 600, **environ: str) -> str:
        """As `run`; anything but exit code 0 fails the test with what was printed."""
        result = self.run(*words, cwd=cwd, timeout=timeout, **environ)
        assert result.returncode == 0, f"{' '.join(words)}: {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    def json(self, *words: str, cwd: Path, **environ: str) -> Any:
        """The JSON that a command prints."""
        return json.loads(self.check(*words, cwd=cwd, **environ))


def _uv() -> list[str] | None:
    """How to call uv here; None where it is not installed."""
    if path := shutil.which("uv"):
        return [path]
    return [sys.executable, "-m", "uv"] if importlib.util.find_spec("uv") is not None else None


def packages() -> list[Path]:
    """The folders of loong's own packages."""
    return sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))


@pytest.fixture(scope="module")
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> CleanEnvironment:
    """One per test file, with loong's own packages installed from wheels."""
    environment = CleanEnvironment(tmp_path_factory.mktemp("clean") / "venv")
    environment.create()
    environment.install(*packages())
    return environment
