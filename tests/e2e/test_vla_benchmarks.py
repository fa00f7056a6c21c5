"""The robot benchmark, tiny, on a CPU: loong and LeRobot train alike from the same weights; its figures are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))

import vla_report  # noqa: E402
import vla_rows  # noqa: E402

PEER = os.environ.get("LOONG_LEROBOT_PYTHON")
needs_peer = pytest.mark.skipif(PEER is None, reason="LOONG_LEROBOT_PYTHON names no interpreter with LeRobot")


def benchmark(folder: Path, script: str, row: str, *words: str) -> dict[str, Any]:
    """Run the script; the result of its row."""
    command = [sys.executable, str(BENCHMARKS / script), "--rows", row, "--tiny", "--backend", "cpu"]
    command += ["--precision", "fp32", "--out", str(folder), "--steps", "2", "--warmup", "1", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / f"{row}.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
@needs_peer
@pytest.mark.parametrize(
    ("script", "row", "setting", "tolerance"),
    [("vla_pi05.py", "pi05-14", "plain", 1e-5), ("vla_groot.py", "groot-n17-16", "defaults", 1e-3)],
)
def test_both_sides_train_alike(script: str, row: str, setting: str, tolerance: float, tmp_path: Path) -> None:
    found = benchmark(tmp_path, script, row, "--settings", setting, "--revision", "abc")
    ours, theirs = found["loong"], found["lerobot"][setting]
    assert "error" not in ours and "error" not in theirs, (ours.get("error"), theirs.get("error"))
    both = found["comparison"][setting]
    assert both["loss_difference_largest"] < tolerance and both["one_run"] is True
    assert ours["grad_norm"][0] == pytest.approx(theirs["grad_norm"][0], rel=1e-3)
    assert [len(side[name]) for side in (ours, theirs) for name in ("ms", "loss", "grad_norm")] == [3] * 6
    assert ours["first_step_seconds"] > 0 and theirs["first_step_seconds"] > 0
    assert ours["commit"] == {"revision": "abc"}
    assert str(Path.cwd()) not in json.dumps(found) and str(tmp_path) not in json.dumps(ours)


@pytest.mark.slow
def test_loong_alone_computes_no_padding(tmp_path: Path) -> None:
    found = benchmark(tmp_path, "vla_pi05.py", "pi05-14", "--only", "loong")
    assert found["work"]["cameras"] == [2, 1]
    assert found["work"]["images_of_a_sample"] == 2
    assert 20 < found["work"]["text_tokens_of_a_sample"] < 200
    assert "lerobot" not in found
    assert found["loong"]["layout"]["options"]["cuda_graph"] is True


def test_rows_are_those_of_the_issue() -> None:
    assert {row.batch for row in vla_rows.GROOT_ROWS.values() if row.family == "groot_n17"} == {16, 32, 64}
    rows = {**vla_rows.PI05_ROWS, **vla_rows.GROOT_ROWS}
    assert all(set(row.peers) <= set(vla_rows.PEER_SETTINGS) for row in rows.values())
    assert all(rows[name].name == name for name in rows)
    assert rows["pi05-14-all-tokens"].config == {"skip_padding": False}


WORK = {"tflop_per_step": 98.9, "world": 1, "batch": 14, "warmup": 1}


def test_rates_leave_the_warmup_out() -> None:
    side = vla_report.side([900.0, 100.0, 300.0, 200.0], [4.0, 3.0, 2.0, 1.0], 2**31, WORK)
    assert (side["median_ms"], side["peak_memory_gib"], side["samples_per_second"]) == (200.0, 2.0, 70.0)
    assert side["mfu_989"] == pytest.approx(0.5)


def test_comparison_with_each_setting_and_with_what_was_measured_before() -> None:
    ours = vla_report.side([9.0, 100.0], [2.0, 1.0], 0, WORK) | {"run": "1"}
    theirs = vla_report.side([9.0, 250.0], [2.0, 1.25], 0, WORK) | {"run": "2"}
    result = {"row": "a", "loong": ours, "lerobot": {"docs": theirs, "plain": {"error": "CUDA out of memory"}}}
    row = vla_rows.PI05_ROWS["pi05-14"]
    result["comparison"] = found = vla_report.compare(result, row)
    assert found["docs"]["speedup"] == 2.5 and found["docs"]["one_run"] is False
    assert found["docs"]["loss_difference_largest"] == pytest.approx(0.2)
    assert "plain" not in found
    assert found["OpenPI's PyTorch trainer"]["speedup"] == pytest.approx(140 / 13.6)
    lines = vla_report.table([result]).splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["row", "side"],
        ["a", "loong"],
        ["a", "docs"],
        ["a", "plain"],
        ["a", "OpenPI's"],
    ]
    assert "out of memory" in lines[3]


def test_packages_are_packed_without_what_they_need(tmp_path: Path) -> None:
    archive = tmp_path / "packed.tar.gz"
    command = [sys.executable, str(ROOT / "tools" / "pack_packages.py"), str(archive)]
    subprocess.run([*command, "pluggy"], check=True, capture_output=True)
    with tarfile.open(archive) as packed:
        names = packed.getnames()
    assert "pluggy/__init__.py" in names and not any("__pycache__" in name for name in names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"pluggy"}
    wrong = subprocess.run([*command, "no-such-package"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "no-such-package is not installed" in wrong.stderr
