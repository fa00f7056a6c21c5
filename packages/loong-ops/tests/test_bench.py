"""`loong bench ops`: what is measured, what is said of rows that cannot run, the results file. The card is played."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from loong_core.backends import cuda
from loong_core.errors import NotFound, Unsupported
from loong_core.parallel import varlen_attention
from loong_core.references.ragged_attention import ragged_attention as ragged_reference
from loong_ops import bench
from loong_ops.bench import attention, linear, ragged_attention, run
from loong_ops.bench.card import Card, Ceilings, driver_version
from loong_ops.bench.row import Missing, Row
from loong_ops.cli import app

LIMITS = Ceilings(1e15, 1e12)


class Played(Card):
    """Takes 2 ms for everything; `dead` once a thunk has said so."""

    def __init__(self) -> None:
        self.dead = False
        self.tidied = 0

    def facts(self) -> dict[str, Any]:
        return {"card": "Played H1", "driver": "1.2.3", "cuda": "13.0"}

    def limits(self, measured: Ceilings) -> Ceilings:
        return measured

    def ceilings(self) -> Ceilings:
        return LIMITS

    def seconds(self, thunk: Any) -> float:
        thunk()
        return 2e-3

    def added(self, thunk: Any) -> int:
        thunk()
        return 3 << 20

    def tidy(self) -> None:
        self.tidied += 1

    def works(self) -> bool:
        return not self.dead


def raising(error: BaseException) -> Any:
    def thunk() -> None:
        raise error

    return thunk


def row(name: str = "ours", op: str = "rms_norm", shape: str = "t=4", make: Any = None, **more: Any) -> Row:
    settings = {"direction": "forward", "flops": 1e12, "bytes": 1e9, **more}
    return Row(op=op, shape=shape, name=name, make=make or (lambda: lambda: None), **settings)


def test_numbers_of_a_row() -> None:
    result = run.measure(row(), Played())
    assert result.seconds == 2e-3 and result.memory == 3 << 20
    found = result.record(LIMITS)
    assert found["status"] == "measured" and found["ms"] == 2.0 and found["tflops"] == pytest.approx(500)
    assert found["tb_per_s"] == pytest.approx(0.5)
    assert found["share_of_limit"] == pytest.approx(0.5)  # of 1 ms, by bytes as well as by operations
    assert run.measure(row(bytes=0.0), Played()).record(LIMITS)["share_of_limit"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("make", "reason", "status"),
    [
        (raising(Missing("transformer_engine")), "missing: transformer_engine", "missing"),
        (raising(ModuleNotFoundError("No module named 'quack'")), "missing: No module named 'quack'", "missing"),
        (raising(ValueError("tiles\n  do not fit")), "ValueError: tiles", "failed"),
        (raising(AssertionError()), "AssertionError", "failed"),
        (raising(torch.OutOfMemoryError("CUDA out of memory. Tried ...")), "out of memory", "failed"),
        (lambda: raising(torch.OutOfMemoryError("later")), "out of memory", "failed"),
        (lambda: raising(RuntimeError("in the thunk")), "RuntimeError: in the thunk", "failed"),
    ],
)
def test_rows_that_cannot_run_say_why(make: Any, reason: str, status: str) -> None:
    card = Played()
    result = run.measure(row(make=make), card)
    found = result.record(LIMITS)
    assert result.seconds is None and found["reason"] == reason and found["status"] == status
    assert "ms" not in found and card.tidied == 1


def test_nothing_is_tried_on_a_device_that_stopped() -> None:
    card = Played()

    def fatal() -> Any:
        card.dead = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    results = list(run.measure_all([row(), row("broken", make=fatal), row("next")], card))
    assert [result.seconds is None for result in results] == [False, True, True]
    assert "not tried: the device stopped working in broken, t=4, forward" in results[2].reason


def test_a_failure_stops_nothing_else() -> None:
    results = list(run.measure_all([row("a", make=raising(ValueError("no"))), row("b")], Played()))
    assert results[1].seconds == 2e-3


# ----------------------------------------------------------------------------------------------------- selection
ROWS = [
    row("triton", shape="t=32"),
    row("fast", op="swiglu"),
    row("triton[2]", shape="t=32", headline=False),
    row("torch", shape="t=64"),
    row("late", shape="t=32"),
    row("late", shape="t=32", direction="backward"),
]


def names(**settings: Any) -> list[str]:
    return [found.name for found in run.select(ROWS, run.Settings(**settings))]


def test_rows_of_a_shape_stand_together() -> None:
    assert names() == ["triton", "late", "fast", "torch", "late"]
    assert names(everything=True)[:3] == ["triton", "triton[2]", "late"]
    assert names(ops=("swiglu",)) == ["fast"] and names(shape="64") == ["torch"]


def test_unknown_ops_and_shapes_are_refused() -> None:
    with pytest.raises(NotFound, match="Did you mean swiglu"):
        names(ops=("swigul",))
    with pytest.raises(NotFound, match="declared but has no benchmark"):
        names(ops=("route",))
    with pytest.raises(NotFound, match="Shapes: t=32; t=4; t=64"):
        names(shape="s=1")


def test_every_bench_module_gives_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: nothing is allocated before a row is made."""
    found, problems = run.discover()
    assert not problems
    assert {"attention", "linear"} <= {each.op for each in found}
    keys = [(each.op, each.shape, each.name, each.direction) for each in found]
    assert len(set(keys)) == len(keys), "two rows cannot be told apart"
    for each in found:
        assert each.direction in ("forward", "backward", "both") and each.flops + each.bytes > 0


def test_a_module_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sound.py").write_text("def rows():\n    return []\n")
    (tmp_path / "broken.py").write_text("import a_library_that_nobody_has\n")
    (tmp_path / "helper.py").write_text("ROWS = 3\n")
    monkeypatch.setattr(bench, "__path__", [str(tmp_path)])
    found, (problem,) = run.discover()
    assert found == [] and problem.startswith("bench module broken: ModuleNotFoundError")


# -------------------------------------------------------------------------------------------------------- a whole run
def test_table_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = row("wrong", shape="t=32", make=raising(ValueError("no such tile")))
    rows = [*ROWS, wrong, row("te", make=raising(Missing("x")))]
    monkeypatch.setattr(run, "discover", lambda: (rows, ["bench module odd: ImportError: no"]))
    target = tmp_path / "found.json"
    assert run.run(run.Settings(json=target), Played()) == 1
    text = capsys.readouterr().out
    assert "left out: bench module odd" in text and "Played H1, driver 1.2.3" in text
    assert "1000 TFLOP/s and 1.00 TB/s" in text
    assert "rms_norm, forward: t=32" in text and "rms_norm, backward: t=32" in text
    (line,) = (line for line in text.splitlines() if line.startswith("  fast"))
    assert line.split() == ["fast", "2.000", "500", "0.50", "50%", "3.00", "MiB"]
    assert "wrong   ValueError: no such tile" in text and "missing: x" in text
    found = json.loads(target.read_text())
    assert found["card"] == "Played H1" and torch.__version__.startswith(found["versions"]["torch"])
    assert found["measured"] == {"matmul_tflops": 1000.0, "copy_tb_per_s": 1.0} and found["skipped"]
    assert [each["status"] for each in found["rows"]].count("measured") == 5
    assert {"revision", "changed"} == set(found["git"] or {"revision": 0, "changed": 0})
    assert list(tmp_path.iterdir()) == [target]


def test_only_headline_failures_fail_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = row("te", make=raising(Missing("x")))
    variant = row("triton[9]", make=raising(ValueError("too large")), headline=False)
    monkeypatch.setattr(run, "discover", lambda: ([row(), missing, variant], []))
    assert run.run(run.Settings(everything=True), Played()) == 0
    monkeypatch.setattr(run, "discover", lambda: ([dataclasses.replace(variant, headline=True)], []))
    assert run.run(run.Settings(), Played()) == 1


def test_what_was_measured_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "found.json"
    monkeypatch.setattr(run, "discover", lambda: ([row(), row("slow", make=raising(KeyboardInterrupt()))], []))
    with pytest.raises(KeyboardInterrupt):
        run.run(run.Settings(json=target), Played())
    assert [each["name"] for each in json.loads(target.read_text())["rows"]] == ["ours"]


def test_limits_of_known_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Ceilings(5e14, 2e12)
    for name, expected in (("NVIDIA H200", (790e12, 4.3e12)), ("NVIDIA GH200 480GB", measured), ("L4", measured)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert Card().limits(measured) == expected


def test_the_drivers_version(tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\nGCC 12.2\n")
    assert driver_version(file) == "580.159.04"
    assert driver_version(tmp_path / "absent") is None


# -------------------------------------------------------------------------------------------------- the command line
def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "probe", lambda: cuda.Probe(devices=0, reason="no NVIDIA driver"))
    outcome = CliRunner().invoke(app, ["ops"])
    assert isinstance(outcome.exception, Unsupported) and outcome.exception.exit_code == 2
    assert "no NVIDIA driver" in str(outcome.exception)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command starts, on a machine with a GPU; it leaves with the code in front."""
    calls: list[Any] = [0]

    def play(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        calls.append((command, json.loads(settings["input"])))
        return subprocess.CompletedProcess(command, calls[0])

    monkeypatch.setattr(cuda, "probe", lambda: cuda.Probe(devices=1))
    monkeypatch.setattr(subprocess, "run", play)
    return calls


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (1, 1), (2, 2), (-9, 1)])
def test_the_command_measures_in_a_process_of_its_own(
    started: list[Any], tmp_path: Path, code: int, expected: int
) -> None:
    started[0] = code
    target = tmp_path / "x.json"
    outcome = CliRunner().invoke(app, ["ops", "swiglu", "route", "--all", "--shape", "t=4", "--json", str(target)])
    assert outcome.exit_code == expected
    ((command, settings),) = started[1:]
    assert command[0] == sys.executable and command[-1] == "loong_ops.bench.run"
    assert settings == {"ops": ["swiglu", "route"], "shape": "t=4", "everything": True, "json": str(target)}


def test_an_unwritable_file_is_refused_first(started: list[Any], tmp_path: Path) -> None:
    outcome = CliRunner().invoke(app, ["ops", "--json", str(tmp_path / "absent" / "x.json")])
    assert isinstance(outcome.exception, Unsupported) and "--json" in str(outcome.exception) and len(started) == 1


def test_the_measuring_process_reads_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[run.Settings] = []
    settings = {"ops": ["swiglu"], "shape": "", "everything": True, "json": None}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(settings)))
    monkeypatch.setattr(cuda, "setup", lambda rank: "cuda:0")
    monkeypatch.setattr(run, "run", lambda found, card: seen.append(found) or 0)
    assert run.main() == 0 and seen == [run.Settings(ops=("swiglu",), everything=True)]


# --------------------------------------------------------------------------------------------------------- its own rows
def test_documents_fill_the_row() -> None:
    lengths = attention.documents()
    assert sum(lengths) == 32768 and all(length >= 64 for length in lengths[:-1]) and len(lengths) > 8
    case = attention.Case(8, 2, 4, 2)
    assert case.flops == 2 * 2 * (2 * 8 * 8 * 4 * 128) / 2  # two products, b s^2 h d, causal half
    assert attention.Case(8, 1, 4, 2, (8,)).flops * 2 == case.flops


@pytest.mark.parametrize("maker", [attention._torch, attention._flash4])
def test_thunks_of_attention(maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run the op as layers call it; played on the CPU, where FlashAttention-4 is missing."""
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object() if name == "torch" else None)
    true = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device, **more: true(*shape, **more))
    case = attention.Case(8, 1, 4, 2)
    if maker is attention._flash4:
        with pytest.raises(Missing, match="flash_attn"):
            attention._thunk(case, maker, "both")
        return
    assert attention._thunk(case, maker, "forward")().shape == (8, 1, 512)
    assert [part.shape[2] for part in attention._thunk(case, maker, "both")()] == [4, 2, 2]


def test_thunks_of_ragged_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """All implementations take the same inputs; played on the CPU, with the kernels of neither library."""
    monkeypatch.setattr(
        ragged_attention.importlib.util, "find_spec", lambda name: object() if name == "torch" else None
    )
    case = ragged_attention.Case(3, 4, 7)
    assert case.flops == 2 * 2 * 3 * (4 * 7) * 8 * 256
    with pytest.raises(Missing, match="flash_attn"):
        ragged_attention._thunk(case, ragged_attention._flash4, "both", "cpu")
    monkeypatch.setattr(varlen_attention, "ragged_attention", ragged_reference)
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda kernel: contextlib.nullcontext())
    makers = (ragged_attention._varlen, ragged_attention._cudnn)
    results = [ragged_attention._thunk(case, maker, "forward", "cpu")() for maker in makers]
    torch.testing.assert_close(*results)
    assert results[0].shape == (12, 2048)
    gradients = [ragged_attention._thunk(case, maker, "both", "cpu")() for maker in makers]
    assert [part.shape[1] for part in gradients[0]] == [8, 1, 1]
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(cuda.probe().devices == 0, reason="needs a CUDA device")
def test_rows_on_a_card(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = [each for each in attention.rows() if each.shape.startswith("b=1 s=4096") and each.name == "torch"]
    products = [each for each in linear.rows() if each.name == "torch"][:2]
    monkeypatch.setattr(run, "discover", lambda: ([*small, *products], []))
    assert run.run(run.Settings(), Card()) == 0
    assert "failed" not in capsys.readouterr().out
