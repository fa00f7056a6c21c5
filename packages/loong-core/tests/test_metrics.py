"""metrics.jsonl is a public contract: fields, exact floats, valid JSON, and what a kill and a resume leave."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loong_core.errors import RunError, Unsupported
from loong_core.startup import FIRST_STEP, Startup
from loong_core.testing.shapes import decoder_shape
from loong_core.train import metrics
from loong_core.types import Cluster, ParallelPlan


def measured(**changes: Any) -> dict[str, Any]:
    return {
        "loss": 2.5,
        "counted": 100.0,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "step_seconds": 0.5,
        "data_seconds": 0.1,
        **changes,
    }


def row(step: int = 1, **changes: Any) -> dict[str, Any]:
    counted = {"flops": 4e12, "recomputed": 1e12, "world": 2, "peak_flops": 1e13}
    return metrics.row(measured(**changes), step=step, samples=8, memory_bytes=2**20, **counted)


def test_fields_and_their_order() -> None:
    assert tuple(row()) == metrics.FIELDS
    assert tuple(row(eval_loss=3.0, aux_loss=0.1)) == (*metrics.FIELDS, "eval_loss", "aux_loss")


def test_values() -> None:
    found = row()
    assert found["tokens"] == 100 and found["samples"] == 8 and found["step"] == 1
    assert found["tokens_per_second"] == 200.0
    assert found["tflops_per_device"] == 4.0 and found["mfu"] == pytest.approx(0.4)
    assert found["hfu"] == pytest.approx(0.5)
    counted = {"flops": 1.0, "recomputed": 0.0, "world": 1, "peak_flops": 0.0}
    unknown = metrics.row(measured(), step=1, samples=1, memory_bytes=0, **counted)
    assert unknown["mfu"] is None and unknown["hfu"] is None
    assert row(step_seconds=0.0)["tokens_per_second"] == row(step_seconds=0.0)["samples_per_second"] == 0.0
    assert found["samples_per_second"] == 16.0


def test_unknown_work_is_null() -> None:
    counted: dict[str, Any] = {"flops": None, "recomputed": 0.0, "world": 2, "peak_flops": 1e13}
    found = metrics.row(measured(), step=1, samples=1, memory_bytes=0, **counted)
    assert found["tflops_per_device"] is None and found["mfu"] is None and found["hfu"] is None


@given(st.floats())
def test_floats_survive_exactly_and_the_rest_is_null(value: float) -> None:
    text = metrics.encode({"loss": value})
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["loss"]
    assert found == value if math.isfinite(value) else found is None


def written(path: Path, steps: range) -> None:
    sink = metrics.open_metrics(path, steps.start - 1)
    for step in steps:
        sink.write(row(step, loss=1 / step))
    sink.close()


def test_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    written(path, range(1, 4))
    assert [found["loss"] for found in metrics.read(path)] == [1.0, 0.5, 1 / 3]
    assert metrics.read(tmp_path / "absent.jsonl") == []


def test_resume_drops_what_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 9))
    whole = path.read_bytes()
    metrics.open_metrics(path, 5).close()
    assert [found["step"] for found in metrics.read(path)] == [1, 2, 3, 4, 5]
    assert whole.startswith(path.read_bytes()), "kept rows are kept byte for byte"
    written(path, range(6, 9))
    assert path.read_bytes() == whole
    metrics.open_metrics(path, 0).close()
    assert path.read_bytes() == b""
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("rest", [b'{"step": 3, "lo', b"\xff\xfe\x00", b"[1]\n", b"null\n"])
def test_what_a_kill_leaves_is_dropped(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 3))
    with path.open("ab") as file:
        file.write(rest)
    assert [found["step"] for found in metrics.read(path)] == [1, 2]
    written(path, range(3, 4))
    assert [found["step"] for found in metrics.read(path)] == [1, 2, 3]
    assert path.read_bytes().count(b"\n") == 3


def test_a_whole_row_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 4))
    path.write_bytes(path.read_bytes()[:-1])
    assert [found["step"] for found in metrics.read(path)] == [1, 2, 3]
    written(path, range(4, 5))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_nothing_to_drop_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 3))
    before = path.stat().st_ino
    metrics.open_metrics(path, 2).close()
    assert path.stat().st_ino == before


KILLED = """
import os, signal, sys
from pathlib import Path
from loong_core.testing.shapes import decoder_shape
from loong_core.train import metrics
sink = metrics.open_metrics(Path(sys.argv[1]), 0)
for step in range(1, 51):
    sink.write({"step": step, "loss": 1 / step})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_keeps_every_finished_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [found["step"] for found in metrics.read(path)] == list(range(1, 51))


def test_sink_problems() -> None:
    assert metrics.sink_problems(["console", "jsonl"]) == []
    (problem,) = metrics.sink_problems(["jsnol"])
    assert "log.to" in problem and "did you mean jsonl?" in problem and "console, jsonl, tensorboard" in problem


def test_absent_tensorboard_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    (problem,) = metrics.sink_problems(["tensorboard"])
    assert "not installed" in problem and "install the package" in problem
    with pytest.raises(Unsupported, match="not installed"):
        metrics.Reporter(run(tmp_path, ["tensorboard"]))  # type: ignore[arg-type]


def run(folder: Path, sinks: list[str], main: bool = True) -> SimpleNamespace:
    """The parts of a `Run` that reporting reads."""
    recipe = SimpleNamespace(log=SimpleNamespace(to=sinks, every=1), run=SimpleNamespace(name="demo", steps=4))
    plan = ParallelPlan(planner="megatron", world=1, recompute="full")
    return SimpleNamespace(
        recipe=recipe,
        folder=folder,
        step=0,
        is_main=main,
        device="cpu",
        plan=plan,
        shape=decoder_shape(),
        task=SimpleNamespace(counts="tokens"),
        world=1,
        cluster=Cluster(peak_flops=1e12),
    )


class Data:
    """Samples of 40 and of 60 tokens."""

    context = (40**2 + 60**2) / 100
    reason: str | None = None

    def samples(self, step: int) -> int:
        return 10 + step

    def flops(self, step: int) -> float | None:
        return decoder_shape().train_flops(100, self.context)

    def recomputed(self, step: int) -> float:
        return decoder_shape().recomputed_flops(100, self.context, "full")

    def problem(self) -> str | None:
        return self.reason


def test_reporter_writes_rank_zeros_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    going = run(tmp_path, ["console", "jsonl", "jsonl"])
    reporter = metrics.Reporter(going)  # type: ignore[arg-type]
    for step in (1, 2):
        going.step = step
        assert not reporter.step(going, measured(), Data())  # type: ignore[arg-type]
    reporter.close()
    reporter.close()
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [(found["step"], found["samples"]) for found in rows] == [(1, 10), (2, 11)]
    assert rows[0]["memory_bytes"] > 2**20
    shape, context = going.shape, (40**2 + 60**2) / 100
    assert rows[0]["mfu"] == pytest.approx(shape.train_flops(100, context) / 0.5 / 1e12)
    extra = shape.recomputed_flops(100, context, "full")
    assert extra > 0 and rows[0]["hfu"] - rows[0]["mfu"] == pytest.approx(extra / 0.5 / 1e12)
    assert "step 1/4" in capsys.readouterr().out
    going.step = 1
    metrics.Reporter(going).close()  # type: ignore[arg-type]
    assert [found["step"] for found in metrics.read(tmp_path / "metrics.jsonl")] == [1]


def test_the_start_up_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    going, startup = run(tmp_path, ["console", "jsonl"]), Startup()
    startup.parts = {"checks": 1.25}
    caplog.set_level("INFO", logger="loong")
    reporter = metrics.Reporter(going, startup)  # type: ignore[arg-type]
    for step in (1, 2):
        going.step = step
        reporter.step(going, measured(), Data())  # type: ignore[arg-type]
    reporter.close()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("start-up")]
    assert said == [startup.line()] == caplog.messages
    assert list(startup.parts) == ["checks", FIRST_STEP] and startup.parts[FIRST_STEP] < 10
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_first_step_does_not_count_the_memory_of_setting_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loong_core.train import memory_use

    asked: list[str] = []
    monkeypatch.setattr(memory_use, "used", lambda device: asked.append(device) or 7)
    metrics.Reporter(run(tmp_path, []))  # type: ignore[arg-type]
    assert asked == ["cpu"]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    going = run(tmp_path, ["console", "jsonl"], main=False)
    reporter = metrics.Reporter(going)  # type: ignore[arg-type]
    going.step = 1
    reporter.step(going, measured(), Data())  # type: ignore[arg-type]
    reporter.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_a_problem_of_the_data_is_told(tmp_path: Path) -> None:
    data = Data()
    data.reason = "3 frames do not decode."
    for main in (True, False):
        going = run(tmp_path, ["jsonl"], main=main)
        reporter = metrics.Reporter(going)  # type: ignore[arg-type]
        going.step = 1
        assert reporter.step(going, measured(), data)  # type: ignore[arg-type]
        reporter.close()


def test_a_run_that_is_to_stop_is_told_of_with_data_that_are_fine(tmp_path: Path) -> None:
    for stop in (True, False):
        reporter = metrics.Reporter(run(tmp_path, []))  # type: ignore[arg-type]
        assert reporter.step(run(tmp_path, []), measured(), Data(), stop) == stop  # type: ignore[arg-type]
        reporter.close()


def test_tensorboard_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    calls: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None = None) -> None:
            assert purge_step == 6

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append(("closed", 0, 0))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    sink = metrics.TensorBoard(tmp_path, 5)
    sink.write({"step": 6, "loss": 1.5, "mfu": None, "eval_loss": 2.0})
    sink.close()
    assert calls == [("loss", 1.5, 6), ("eval_loss", 2.0, 6), ("closed", 0, 0)]


def test_full_disk_is_an_error_with_a_remedy() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    sink = metrics.JsonLines(full)
    with pytest.raises(RunError, match="No space left.*Free space"):
        sink.write(row())
    sink.close()
