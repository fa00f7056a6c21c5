"""`loong generate` leaves the answer to the task of the model it is given."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from loong_core.cli import run

PLUGIN = """
from pathlib import Path
from typing import Annotated
import typer
from loong_core.hookspecs import hookimpl
from loong_core.types import ModelFamily, Task


def write(folder: Path, prompt: str, top: int = 1) -> None:
    "Continue a text."
    print("text", folder.name, prompt, top)


def act(folder: Path, frame: Annotated[int, typer.Option()] = 0) -> None:
    "Act on an observation."
    print("actions", folder.name, frame)
    raise typer.Exit(1 if frame < 0 else 0)


@hookimpl
def loong_model_families():
    empty = {"describe": "", "builder": "", "arch": {}, "from_hf": {}, "weights": ()}
    return [ModelFamily(name="robot", hf_architectures=("walker",), task="walk", **empty),
            ModelFamily(name="mute", hf_architectures=("mute",), task="mute", **empty)]


@hookimpl
def loong_tasks():
    here = "answering"
    return [Task(name="pretrain", loss="", generate=f"{here}:write"),
            Task(name="chat", loss="", generate=f"{here}:write"),
            Task(name="walk", loss="", generate=f"{here}:act"), Task(name="mute", loss="")]
"""


@pytest.fixture(autouse=True)
def _plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("answering.py").write_text(PLUGIN)
    monkeypatch.setenv("LOONG_PLUGIN_FILES", "answering.py")
    monkeypatch.setenv("LOONG_PLUGINS", "")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "answering", raising=False)
    for name, config in {"policy": {"type": "walker"}, "writer": {"architectures": ["X"]}}.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(config))
    Path("trained").mkdir()
    Path("trained/recipe.yaml").write_text("task: {name: walk}\n")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["policy", "--frame", "3"], 0, "actions policy 3"),
        (["--frame", "3", "trained"], 0, "actions trained 3"),
        (["policy", "--frame=-1"], 1, "actions policy -1"),
        (["writer", "once", "--top", "4"], 0, "text writer once 4"),
        (["absent", "once"], 0, "text absent once 1"),
    ],
)
def test_the_task_answers(words: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", *words]) == code
    assert capsys.readouterr().out.strip() == told


def test_wrong_words_are_those_of_the_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "policy", "--frame", "x"]) == 2
    assert "--frame" in capsys.readouterr().err
    assert run(["generate", "--frame"]) == 2
    assert "name the folder" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "kinds"), [(["--help"], 2), ([], 2), (["policy", "--help"], 1)])
def test_help_tells_every_kind_or_the_models_own(
    words: list[str], kinds: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", *words]) == 0
    text = capsys.readouterr().out
    assert text.count("Usage: loong generate") == kinds
    assert "Act on an observation." in text and ("Models trained with pretrain, chat" in text) == (kinds == 2)


def test_a_folder_that_is_none_where_no_task_takes_text(capsys: pytest.CaptureFixture[str]) -> None:
    Path("answering.py").write_text(PLUGIN.replace('Task(name="pretrain", loss="", generate=f"{here}:write"),', ""))
    assert run(["generate", "nowhere"]) == 2
    assert "`nowhere` is no folder. Name that of a run" in capsys.readouterr().err
