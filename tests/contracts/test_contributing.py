"""CONTRIBUTING.md is run as it stands: the blocks after `<!-- test: name -->`, in order, in a clean environment.

A block whose first line is `# file: path` is written to that path; a bash block is run. Blocks of one name share a
folder and a shell.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import CleanEnvironment

GUIDE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
BLOCK = re.compile(r"<!-- test: (?P<name>\w+) -->\n+```(?P<language>\w+)\n(?P<text>.*?)\n```", re.DOTALL)
FILE = re.compile(r"# file: (\S+)\n")
END = "END_OF_FILE"


def scripts(guide: str) -> dict[str, str]:
    """Name -> one bash script of all its blocks."""
    found: dict[str, str] = {}
    for block in BLOCK.finditer(guide):
        text = block["text"]
        if named := FILE.match(text):
            text = f"mkdir -p $(dirname {named[1]})\ncat > {named[1]} <<'{END}'\n{text}\n{END}"
        else:
            assert block["language"] == "bash", f"a block of {block['name']} is neither a file nor bash"
        found[block["name"]] = found.get(block["name"], "set -euo pipefail\n") + text + "\n"
    return found


SCRIPTS = scripts(GUIDE.read_text("utf-8"))
EXPECTED = {
    "model": ("mistral", "MistralForCausalLM"),
    "kernel": ("fused",),
    "backend": ("acme_chip",),
}


def test_the_guide_tells_of_models_kernels_and_backends() -> None:
    assert set(SCRIPTS) == set(EXPECTED)
    marks = re.findall(r"<!-- test: ", GUIDE.read_text("utf-8"))
    assert len(marks) == len(BLOCK.findall(GUIDE.read_text("utf-8"))), "a mark stands before no block"


@pytest.mark.parametrize("name", EXPECTED)
def test_the_steps_work(name: str, clean_environment: CleanEnvironment, tmp_path: Path) -> None:
    result = run(SCRIPTS[name], clean_environment, tmp_path)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    tests = re.search(r"^\d+ passed.*$", result.stdout, re.MULTILINE)
    assert tests and "skipped" not in tests[0], result.stdout
    last = result.stdout[tests.end() :]
    assert all(word in last for word in EXPECTED[name]), last


def test_a_step_that_fails_is_noticed(clean_environment: CleanEnvironment, tmp_path: Path) -> None:
    guide = "<!-- test: x -->\n```bash\nfalse\necho reached\n```\n"
    result = run(scripts(guide)["x"], clean_environment, tmp_path)
    assert result.returncode != 0 and "reached" not in result.stdout


def run(script: str, environment: CleanEnvironment, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in an empty folder with the programs of the clean environment, its libraries instead of an index."""
    settings = {"PIP_NO_DEPS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_QUIET": "1"}
    if importlib.util.find_spec("hatchling") is not None:
        settings |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # pip reads this switch the other way round
    environment.add_programs("pip", "pytest")
    return subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={**environment.environ(), **settings, "PYTEST_ADDOPTS": "-q -p no:cacheprovider"},
        capture_output=True,
        text=True,
        timeout=900,
    )
