"""`log.profile`: which step is profiled, what is left of it, and what the table says."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loong_core.recipe_load import from_mapping
from loong_core.train.profile import Work, profiled, table


def test_the_table_adds_up_by_name_and_counts_what_overlaps_once() -> None:
    found = [Work("product", 0, 3000), Work("copy", 2000, 4000), Work("product", 6000, 7000), Work("copy", 6200, 6300)]
    first, head, *rows = table(found, seconds=0.01).splitlines()
    assert first == "step 10.00 ms, of which something ran for 5.00 ms (50.0 %)"
    assert head.split() == ["ms", "share", "calls", "name"]
    assert [row.split() for row in rows] == [["4.000", "40.0%", "2", "product"], ["2.100", "21.0%", "2", "copy"]]


def test_a_step_in_which_nothing_ran() -> None:
    assert table([], seconds=0.5).splitlines()[0] == "step 500.00 ms, of which something ran for 0.00 ms (0.0 %)"


def running(folder: Path, profile: int | None) -> Any:
    recipe = from_mapping({"run": {"steps": 3}, "log": {"profile": profile}})
    (folder / "logs").mkdir()
    return SimpleNamespace(recipe=recipe, folder=folder, rank=1, device="cpu", step=0)


@pytest.mark.parametrize("wanted", [1, 3])
def test_the_named_step_leaves_a_table_and_a_trace(wanted: int, tmp_path: Path) -> None:
    run = running(tmp_path, wanted)
    for _ in range(3):
        with profiled(run):
            torch.zeros(8) + run.step
        run.step += 1
        there = sorted(path.name for path in (tmp_path / "logs").iterdir())
        assert bool(there) == (run.step >= wanted)
    assert there == ["profile-rank-0001.trace.json.gz", "profile-rank-0001.txt"]
    assert "aten::add" in (tmp_path / "logs" / there[1]).read_text()
    with gzip.open(tmp_path / "logs" / there[0]) as file:
        assert any(event.get("name") == "aten::add" for event in json.load(file)["traceEvents"])


def test_a_step_that_fails_leaves_nothing_and_its_error(tmp_path: Path) -> None:
    run = running(tmp_path, 1)
    with pytest.raises(ValueError, match="broken"), profiled(run):
        raise ValueError("broken")
    assert not list((tmp_path / "logs").iterdir())


def test_no_step_is_profiled_unasked(tmp_path: Path) -> None:
    run = running(tmp_path, None)
    with profiled(run):
        torch.zeros(1)
    assert not list((tmp_path / "logs").iterdir())


@pytest.mark.parametrize("profiled_on_a_device", [True, False])
def test_a_profiled_process_leaves_without_exit_handlers(profiled_on_a_device: bool) -> None:
    program = (
        "import atexit\n"
        "from loong_core.train import profile, worker\n"
        "atexit.register(print, 'handled')\n"
        f"profile.on_a_device = {profiled_on_a_device}\n"
        "print('said', end='')\n"
        "worker.end(3)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    assert done.stdout == ("said" if profiled_on_a_device else "saidhandled\n")
