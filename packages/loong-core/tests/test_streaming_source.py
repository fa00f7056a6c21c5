"""A source that makes its own batches: checked against task and model in the parent, driven by the loop and stopped."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from loong_core.cli import run
from loong_core.data.prepare import encoder_of, rows_of
from loong_core.errors import RecipeError, RunError
from loong_core.findings import Findings
from loong_core.recipe_load import LoadedRecipe, from_mapping
from loong_core.recipe_yaml import Document
from loong_core.registry import Registry, architecture_of
from loong_core.testing.shapes import decoder_shape
from loong_core.train import loop, worker
from loong_core.train.checkpoints import Checkpoints
from loong_core.types import DataSource, ModelFamily, ParallelPlan, Task
from loong_core.validate import _familys_planner
from loong_core.validate_data import check_fit, check_match, unused_keys

ROBOT = DataSource(name="robot", check="robot_data:check", stream="robot_data:stream", fit="robot_data:fit")
TEXT = DataSource(name="text", check="robot_data:check", reader="robot_data:read")
FLOW = Task(name="flow", loss="robot_data:loss", evaluate="robot_data:evaluate", counts="elements of action chunks")
WORDS = Task(name="words", encoder="robot_data:encode", loss="robot_data:loss")


class Frames:
    """Batches of one number each; those from step 2 on have a problem."""

    eval_count = 1

    def __init__(self, replica: int = 0) -> None:
        self.replica, self.asked = replica, -1
        self.closed = False

    def batches(self, step: int) -> list[Any]:
        self.asked = step
        return [{"value": step}]

    def coming(self, step: int) -> list[Any] | None:
        return None

    def eval_batches(self, index: int) -> list[Any]:
        return [{"value": index}]

    def samples(self, step: int) -> int:
        return 4

    tokens = samples

    def flops(self, step: int) -> float | None:
        return None

    def recomputed(self, step: int) -> float:
        return 0.0

    def problem(self) -> str | None:
        return "cam0 of episode 3: 5 frames do not decode, data.options.skip allows 4." if self.asked >= 2 else None

    def state(self) -> dict[str, Any]:
        return {"step": self.asked + 1}

    def load_state(self, state: Mapping[str, Any]) -> int:
        return int(state["step"])

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("robot_data")
    module.__dict__.update(
        check=lambda path, options: [],
        fit=lambda recipe, shape, config: [f"the policy takes {shape.hidden} numbers of state, episode 0 has 7"],
        stream=lambda run, replica: Frames(replica),
        evaluate=lambda run, engine, data: {"eval_mae": 0.25},
    )
    monkeypatch.setitem(sys.modules, "robot_data", module)


def loaded(value: dict[str, Any]) -> LoadedRecipe:
    recipe = from_mapping(value)
    return LoadedRecipe(recipe, "recipe.yaml", {}, Document(value, {}, {}))


class Table(Registry):
    """A registry of what is handed to it."""

    def __init__(self, **tables: Any) -> None:
        self._held = tables

    def get(self, kind: str, name: str) -> Any:
        return self._held[kind][name]


def test_a_task_gets_the_kind_of_source_it_reads() -> None:
    for source, task, expected in (
        (ROBOT, FLOW, ""),
        (TEXT, WORDS, ""),
        (TEXT, FLOW, "does not read rows"),
        (ROBOT, WORDS, "reads rows of text"),
    ):
        findings = Findings(loaded({}))
        check_match(source, task, findings)
        assert [expected in message for message in findings.messages] == ([True] if expected else [])


def test_rows_and_encoders_that_are_not_there_are_named() -> None:
    table = Table(data_sources={"robot": ROBOT}, tasks={"flow": FLOW})
    recipe = from_mapping({"data": {"source": "robot"}, "task": {"name": "flow"}})
    with pytest.raises(RecipeError, match=r"`data\.source`: robot holds no rows"):
        rows_of(recipe, None, table)
    with pytest.raises(RecipeError, match=r"`task\.name`: flow"):
        encoder_of(recipe, table)


def test_the_data_is_compared_with_the_model_unless_something_is_wrong_already() -> None:
    shape = decoder_shape()
    model: Any = SimpleNamespace(shape=shape, config={})
    for already, expected in (([], 1), (["model.weights: broken"], 1)):
        findings = Findings(loaded({"data": {"path": "episodes"}}))
        findings.messages.extend(already)
        check_fit(findings.loaded.recipe, ROBOT, model, findings)
        assert len(findings.messages) == expected
        assert already or f"takes {shape.hidden} numbers" in findings.messages[0]


def test_settings_without_effect_are_told() -> None:
    recipe = from_mapping({"data": {"seq_len": 77, "pack": True, "bad_rows": "skip"}})
    notes = unused_keys(recipe, ROBOT)
    assert [note.split()[1] for note in notes] == ["data.seq_len", "data.bad_rows"]
    assert unused_keys(recipe, TEXT) == []


def test_a_family_may_ask_for_its_planner() -> None:
    family: dict[str, Any] = {"hf_architectures": (), "describe": "", "builder": "", "arch": {}, "from_hf": {}}
    asks = ModelFamily(name="robot", weights=(), planner="torch", **family)
    model: Any = SimpleNamespace(family=asks)
    for given, wanted, told in (("auto", "torch", True), ("megatron", "megatron", False)):
        recipe, note = _familys_planner(from_mapping({"parallel": {"planner": given}}), model)
        assert recipe.parallel.planner == wanted and bool(note) == told
    silent: Any = SimpleNamespace(family=ModelFamily(name="text", weights=(), **family))
    assert _familys_planner(from_mapping({}), silent)[0].parallel.planner == "auto"


def test_policies_name_their_architecture_by_type() -> None:
    assert architecture_of({"type": "pi05"}) == "pi05"
    assert architecture_of({"architectures": ["A", "B"], "type": "pi05"}) == "A"
    assert architecture_of({"architectures": "A"}) is architecture_of({"type": 3}) is architecture_of({}) is None


def running(folder: Path, every: int | None, **sections: Any) -> Any:
    sections = {"run": {"steps": 5}, "checkpoint": {"every": every}, "data": {"source": "robot"}, **sections}
    recipe = from_mapping(sections)
    events = SimpleNamespace(step_end=lambda run, metrics: None)
    registry = SimpleNamespace(events=events, get=lambda kind, name: ROBOT)
    plan = ParallelPlan(planner="torch", world=4, dp=4)
    where = {"plan": plan, "rank": 3, "is_main": False}
    return SimpleNamespace(recipe=recipe, folder=folder, step=0, task=FLOW, registry=registry, **where)


class Engine:
    """Losses that fall."""

    def forward_backward(self, batches: Any, step: int, coming: Any = None) -> dict[str, float]:
        return {"loss": 1.0 / (1 + step), "counted": 8.0}

    def step(self, lr: float) -> float:
        return 1.0

    def evaluate(self, batches: Any) -> dict[str, float]:
        return {"loss": 0.5, "counted": 8.0}


class Report:
    """Keeps rows and asks the data, as the real one does on every rank."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def step(self, run: Any, metrics: dict[str, Any], data: Frames, stop: bool = False) -> bool:
        self.rows.append(dict(metrics, step=run.step))
        return stop or data.problem() is not None


def held(run: Any) -> tuple[Checkpoints, list[int]]:
    """Checkpoints without a format: what would be saved."""
    saved: list[int] = []
    made = Checkpoints.__new__(Checkpoints)
    store = SimpleNamespace(save=lambda engine, state: saved.append(state["step"]), close=lambda: saved.append(-1))
    made.__dict__.update(_section=run.recipe.checkpoint, _saved=-1, _store=store)
    return made, saved


@pytest.mark.parametrize(("every", "told"), [(2, "is saved in"), (None, "is not saved, because checkpoint.every")])
def test_data_that_gives_out_ends_the_run_after_a_checkpoint(tmp_path: Path, every: int | None, told: str) -> None:
    going, report = running(tmp_path, every), Report()
    frames = worker._stream(going, None)
    assert isinstance(frames, Frames) and frames.replica == 3
    checkpoints, saved = held(going)
    with pytest.raises(RunError, match=f"episode 3: 5 frames do not decode.* stopped after step 3, which {told}"):
        loop.train(going, Engine(), frames, checkpoints, report)  # type: ignore[arg-type]
    assert [row["step"] for row in report.rows] == [1, 2, 3]
    assert saved == ([2, 3, -1] if every else [-1])


def test_held_out_data_of_which_nothing_counts_have_no_loss(tmp_path: Path) -> None:
    class Nothing(Engine):
        def evaluate(self, batches: Any) -> dict[str, float]:
            return {"loss": 0.0, "counted": 0.0}

    going, report = running(tmp_path, None, run={"steps": 1}, data={"source": "robot", "eval": {}}), Report()
    loop.train(going, Nothing(), Frames(), held(going)[0], report)  # type: ignore[arg-type]
    assert report.rows[0]["eval_loss"] is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step_and_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    class Told(Engine):
        def step(self, lr: float) -> float:
            if going.step == 1:
                signal.raise_signal(number)
                signal.raise_signal(number)  # a scheduler may tell the launcher and every process beneath it
            return 1.0

    going, report = running(tmp_path, 4), Report()
    checkpoints, saved = held(going)
    with pytest.raises(
        RunError, match=f"Interrupted by {number.name}. The run stopped after step 2, which is saved in"
    ):
        loop.train(going, Told(), Frames(), checkpoints, report)  # type: ignore[arg-type]
    assert [row["step"] for row in report.rows] == [1, 2] and saved == [2, -1]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_task_adds_figures_to_an_evaluation(tmp_path: Path) -> None:
    going, report = running(tmp_path, None, run={"steps": 2}, data={"source": "robot", "eval": {}}), Report()
    loop.train(going, Engine(), Frames(), held(going)[0], report)  # type: ignore[arg-type]
    first, last = report.rows
    assert "eval_mae" not in first and last["eval_mae"] == 0.25 and last["eval_loss"] == 0.5


# ---------------------------------------------------------------------------------------------------- `loong data`
PLUGIN = """
from pathlib import Path
from loong_core.hookspecs import hookimpl
from loong_core.types import DataSource


def claims(path):
    return (path / "robot.json").is_file()


def check(path, options):
    return []


def report(path, options, thorough, picture):
    if picture is not None:
        picture.write_bytes(b"PNG")
    problems = ["episode 3: its video ends after frame 7"] if thorough else []
    table = {"columns": ["camera", "frames"], "rows": [["top", 8], ["wrist", 9]]}
    return {"facts": [["episodes", "4"]], "tables": [table], "problems": problems, "seen": str(path)}


@hookimpl
def loong_data_sources():
    here = "robot_plugin"
    return [DataSource(name="robots", check=f"{here}:check", stream=f"{here}:claims", report=f"{here}:report",
                       claims=f"{here}:claims")]
"""


@pytest.fixture
def episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("robot_plugin.py").write_text(PLUGIN)
    monkeypatch.setenv("LOONG_PLUGIN_FILES", "robot_plugin.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "robot_plugin", raising=False)
    Path("demo").mkdir()
    Path("demo/robot.json").touch()
    return Path("demo")


def data(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = run(["data", *words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_source_reports_on_its_own_data(episodes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = data(capsys, "inspect", "demo")
    assert code == 0 and "episodes  4" in out and "problems" not in out
    assert [line.split() for line in out.splitlines()[-2:]] == [["top", "8"], ["wrist", "9"]]
    code, out, _ = data(capsys, "check", "demo", "--contact-sheet", "sheet.png")
    assert code == 2 and "episode 3: its video ends after frame 7" in out
    assert Path("sheet.png").read_bytes() == b"PNG"
    code, out, _ = data(capsys, "check", "demo", "--json")
    assert code == 2 and json.loads(out)["seen"] == "demo"


def test_words_that_have_no_meaning_for_it_are_refused(episodes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = data(capsys, "check", "demo", "--seq-len", "8")
    assert code == 2 and "--seq-len would be ignored" in err
    Path("recipe.yaml").write_text("data: {source: robots, path: demo}\n")
    code, _, err = data(capsys, "pack", "recipe.yaml")
    assert code == 2 and "nothing to tokenise" in err
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    code, _, err = data(capsys, "check", "rows.jsonl", "--contact-sheet", "x.png")
    assert code == 2 and "--contact-sheet: the source jsonl holds no images" in err
