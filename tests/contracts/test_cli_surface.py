"""The words of the command line are frozen in `command_line.json`: a change there is a change for users and scripts.

After a deliberate change: `PYTHONPATH=tools python tests/contracts/test_cli_surface.py` writes the file anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pages
import pytest

GOLDEN = Path(__file__).with_name("command_line.json")
READS_MACHINES = ("plan", "doctor", "plugins", "models", "recipes")


def surface() -> dict[str, list[str]]:
    """Every command with its arguments (upper case) and options, all spellings."""
    found = {}
    for words, command in pages.commands(pages.command_tree()):
        if hasattr(command, "commands"):
            continue
        names = [item.name.upper() for item in command.params if item.param_type_name == "argument"]
        options = [item for item in command.params if item.param_type_name == "option"]
        names += sorted(name for item in options for name in (*item.opts, *item.secondary_opts))
        found[" ".join(words)] = names
    return found


def test_the_surface_is_the_frozen_one() -> None:
    assert surface() == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_the_commands_that_scripts_rely_on() -> None:
    groups = {words.split()[1] for words in surface()}
    wanted = {"train", "plan", "doctor", "plugins", "models", "recipes", "generate", "new", "data", "ckpt", "schema"}
    assert wanted | {"bench"} <= groups
    assert {
        "loong new model",
        "loong new backend",
        "loong new plugin",
        "loong data inspect",
        "loong data check",
    } <= set(surface())


@pytest.mark.parametrize("name", READS_MACHINES)
def test_what_a_machine_may_read_has_json(name: str) -> None:
    assert "--json" in surface()[f"loong {name}"]


@pytest.mark.parametrize("words", list(surface()))
def test_every_command_shows_an_example(words: str) -> None:
    words = words.split(" (")[0]  # the variants of `loong generate` are shown by its help
    program = f"import sys; from loong_core.cli import main; sys.argv = {[*words.split(), '--help']!r}; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "xample" in done.stdout and words in done.stdout


@pytest.mark.parametrize("words", [["plugins"], ["models"], ["recipes"]])
def test_json_is_json(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loong_core", *words, "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(surface(), indent=2) + "\n", encoding="utf-8")
