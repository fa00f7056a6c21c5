"""LeRobot in an interpreter of its own, which the nox session `parity` makes: its pins and ours clash."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

INTERPRETER = os.environ.get("LOONG_LEROBOT_PYTHON")
ABSENT = "LOONG_LEROBOT_PYTHON names no interpreter that has lerobot, which ours is compared with: run `nox -s parity`"
needs_lerobot = pytest.mark.skipif(INTERPRETER is None, reason=ABSENT)
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}


def command(script: str, *words: str | Path) -> list[str]:
    """The words that run a script of `parity/`; skips the test where there is no LeRobot."""
    if INTERPRETER is None:
        pytest.skip(ABSENT)
    return [INTERPRETER, str(Path(__file__).parent / "parity" / script), *map(str, words)]


def run(script: str, *words: str | Path) -> None:
    """Run a script of `parity/` to its end."""
    done = subprocess.run(command(script, *words), capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
