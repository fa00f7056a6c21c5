"""A run that is told to end saves its step and continues as if nobody had told it: `loong train` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_torch_runs import data, padded, recipe  # noqa: F401

from loong_core.testing import decoder

STEPS = 9
SLOW = """
import time
from loong_core.hookspecs import hookimpl

@hookimpl
def loong_step_end(run, metrics):
    time.sleep(0.4)
"""


def start(folder: Path, document: dict[str, Any], devices: int, slow: bool) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    plugin, path = folder / "plugin.py", folder / "recipe.json"
    plugin.write_text(decoder.PLUGIN + (SLOW if slow else ""))
    document["run"] |= {"name": "run", "dir": str(folder), "steps": STEPS}
    document["checkpoint"]["every"] = 100
    path.write_text(json.dumps(document | {"launch": {"devices": devices}, "log": {"to": ["jsonl"]}}))
    command = [sys.executable, "-m", "loong_core", "train", str(path)]
    environment = os.environ | {"LOONG_PLUGIN_FILES": str(plugin), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize(("devices", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_run_that_is_interrupted_loses_nothing(
    data: Path,  # noqa: F811
    tmp_path: Path,
    devices: int,
    number: signal.Signals,
) -> None:
    whole = start(tmp_path / "whole", recipe(data), devices, slow=False)
    going = start(tmp_path / "parts", recipe(data), devices, slow=True)
    while len(rows(tmp_path / "parts")) < 2 and going.poll() is None:
        time.sleep(0.02)
    going.send_signal(number)
    _, told = going.communicate(timeout=60)
    done = len(rows(tmp_path / "parts"))
    assert going.returncode == 1 and 2 <= done < STEPS, told
    assert f"{number.name}: the run ends after this step." in told
    assert told.count(f"Interrupted by {number.name}. The run stopped after step {done}, which is saved") == 1
    assert "Traceback" not in told

    again = start(tmp_path / "parts", recipe(data), devices, slow=False)
    for process in (whole, again):
        said, told = process.communicate(timeout=60)
        assert process.returncode == 0, told
        assert ("continues after step" in said) == (process is again)
    assert f"continues after step {done} of {STEPS}, from " in said
    one, other = (padded(rows(tmp_path / name)) for name in ("whole", "parts"))
    assert one == other and len(one) == STEPS
