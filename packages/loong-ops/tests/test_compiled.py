"""Every kernel as the ops launch it, compiled for a Hopper GPU: the interpreter takes what the compiler refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from compiled_cases import CASES, OPS

from loong_ops.plugin import TRITON

pytestmark = pytest.mark.slow

PROCESSES = 2
SHARED = 227 * 1024
"""Bytes of shared memory that a program may ask for on Hopper: a launch with more fails."""
SPILLED = 64
"""Bytes of a thread's registers that may go through memory; the kernels spill 8 at most."""


class Compiled(NamedTuple):
    """The package's kernels, and what became of each case."""

    kernels: set[str]
    cases: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("cases")
    # Without settings of Triton's from outside.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, str(Path(__file__).with_name("compile_for_hopper.py")), str(folder)]

    def work(cache: Path) -> subprocess.CompletedProcess[str]:
        own = environment | {"TRITON_CACHE_DIR": str(cache)}
        return subprocess.run(command, env=own, capture_output=True, text=True, timeout=900, check=False)

    with ThreadPoolExecutor(PROCESSES) as threads:
        done = list(threads.map(work, [tmp_path_factory.mktemp("cache") for _ in range(PROCESSES)]))
    said = "\n".join(process.stderr for process in done)
    cases = {}
    for case in CASES:
        file = folder / f"{case}.json"
        text = file.read_text() if file.exists() else ""
        cases[case] = json.loads(text) if text else {"error": f"not finished\n{said}", "launched": [], "compiled": []}
    assert all(process.returncode == 0 for process in done), said
    return Compiled(set(json.loads(done[0].stdout.splitlines()[0])), cases)


def variants(compiled: Compiled) -> Iterator[tuple[str, dict[str, Any]]]:
    for case, result in compiled.cases.items():
        for kernel in result["compiled"]:
            yield case, kernel


def test_every_op_has_cases() -> None:
    assert not set(TRITON) - set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_compiles(op: str, compiled: Compiled) -> None:
    results = {f"{op}-{name}": compiled.cases[f"{op}-{name}"] for name in OPS[op]}
    errors = [f"{case}: {result['error']}" for case, result in results.items() if result["error"]]
    if errors:
        pytest.fail("\n\n".join(errors), pytrace=False)
    assert all(result["launched"] for result in results.values()), results


def test_every_kernel_is_launched(compiled: Compiled) -> None:
    """A new one needs a case in `compiled_cases`."""
    launched = {kernel for result in compiled.cases.values() for kernel in result["launched"]}
    assert launched == compiled.kernels
    print(f"{len(list(variants(compiled)))} variants of {len(launched)} kernels:", *sorted(launched))


def test_kernels_fit_into_a_multiprocessor(compiled: Compiled) -> None:
    too_much = [
        (case, kernel)
        for case, kernel in variants(compiled)
        if kernel["shared"] > SHARED or kernel["spilled"] > SPILLED
    ]
    assert not too_much
