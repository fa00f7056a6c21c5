"""GPUs that copy from each other bring what collectives bring, whichever rank is late."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loong_core.backends import cuda

WORKER = Path(__file__).with_name("peer_copies_worker.py")


@pytest.mark.gpu
@pytest.mark.skipif(cuda.probe().devices < 2, reason="needs two CUDA devices")
def test_copies_bring_what_collectives_bring() -> None:
    devices = cuda.probe().devices
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={devices}", "--rdzv-backend=c10d"]
    command = [*launcher, "--rdzv-endpoint=127.0.0.1:0", str(WORKER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("rounds equal") == devices
