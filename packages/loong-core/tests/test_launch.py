"""The launcher with real child processes: a small program stands in for the worker."""

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

from loong_core import launch
from loong_core.startup import Startup
from loong_core.types import Backend, Cluster, ParallelPlan

WORKER = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1]).parent
rank = os.environ.get("RANK", "0")
order = json.loads((folder / "order.json").read_text())
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "OMP_NUM_THREADS", "FROM_BACKEND", "PYTHONSAFEPATH")
names += ("LOONG_STARTUP",)
seen = {name: os.environ.get(name) for name in names}
seen["pid"], seen["path"] = os.getpid(), sys.path
(folder / f"seen-{rank}.json").write_text(json.dumps(seen))
print("worker", rank, "says", order.get("say", "nothing"))
if order.get("wait"):
    def stop(number, frame):
        (folder / f"stopped-{rank}").write_text(signal.Signals(number).name)
        time.sleep(order.get("linger", 0))
        sys.exit(1)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    (folder / f"ready-{rank}").touch()
    time.sleep(60)
if order.get("kill"):
    os.kill(os.getpid(), signal.SIGKILL)
code = order.get("codes", {}).get(rank, 0)
if order.get("record", True):
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "logs" / f"exit-{int(rank):04d}.json").write_text(json.dumps({"rank": int(rank), "exit_code": code}))
if code == 0 and any(order.get("codes", {}).values()):
    time.sleep(60)
sys.exit(code)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder, and a module `stand_in_worker` in place of the real worker."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "stand_in_worker.py").write_text(WORKER)
    old = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "modules"), *([old] if old else [])]))
    for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "WORKER", "stand_in_worker")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("launch: {devices: 1, nodes: 1, rendezvous: 'node1:29500'}\n")
    return run


def backend(**env: str) -> Backend:
    none = "nowhere:nothing"
    return Backend(
        name="cpu", device_type="cpu", collective="gloo", probe=none, setup=none, layer_provider=none, env=env
    )


def started(folder: Path, devices: int, env: dict[str, str] | None = None, **order: Any) -> int:
    (folder / "order.json").write_text(json.dumps(order))
    return launch.launch(folder / "recipe.yaml", Cluster(devices_per_node=devices), backend(**(env or {})), folder)


def seen(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"seen-{rank}.json").read_text())


def test_one_worker_is_a_child(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert started(folder, 1, say="hello") == 0
    assert capfd.readouterr().out == "worker 0 says hello\n"
    assert seen(folder)["WORLD_SIZE"] is None and seen(folder)["pid"] != os.getpid()


def test_workers_go_on_measuring(folder: Path) -> None:
    startup = Startup()
    startup.mark("checks")
    (folder / "order.json").write_text("{}")
    launch.launch(folder / "recipe.yaml", Cluster(devices_per_node=1), backend(), folder, startup)
    assert Startup.read(seen(folder)["LOONG_STARTUP"]).parts == startup.parts


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (1, 1), (2, 2), (77, 1)])
def test_one_workers_code(folder: Path, code: int, expected: int) -> None:
    assert started(folder, 1, codes={"0": code}) == expected
    assert started(folder, 1, codes={"0": code}, record=False) == expected


def test_a_killed_worker_is_explained(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert started(folder, 1, kill=True) == 1
    error = capfd.readouterr().err
    assert "SIGKILL" in error and "memory" in error and "logs" in error


def test_a_stale_code_is_not_believed(folder: Path) -> None:
    (folder / "logs").mkdir()
    (folder / "logs" / "exit-0003.json").write_text('{"rank": 3, "exit_code": 2}')
    assert started(folder, 1, codes={"0": 1}) == 1


def test_damaged_outcomes_are_passed_over(folder: Path) -> None:
    (folder / "logs").mkdir()
    for name, text in (("exit-0000.json", "{"), ("exit-0001.json", "[]"), ("exit-0002.json", '{"exit_code": null}')):
        (folder / "logs" / name).write_text(text)
    assert launch._exit_code(1, folder, single=False) == 1


def test_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started(folder, 1, {"FROM_BACKEND": "theirs"})
    assert seen(folder)["FROM_BACKEND"] == "theirs"
    assert seen(folder)["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    monkeypatch.setenv("FROM_BACKEND", "the user's")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    started(folder, 1, {"FROM_BACKEND": "theirs", "OMP_NUM_THREADS": "9"})
    assert seen(folder)["FROM_BACKEND"] == "the user's" and seen(folder)["OMP_NUM_THREADS"] == "3"


def test_files_of_the_working_directory_hide_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = folder.parent / "trap"
    trap.mkdir()
    (trap / "json.py").write_text("raise SystemExit(5)")
    monkeypatch.chdir(trap)
    assert started(folder, 1) == 0


def test_a_plan_overrules_the_backend_and_the_user_both() -> None:
    env = {"FROM_BACKEND": "the plan's", "OMP_NUM_THREADS": "7"}
    plan = ParallelPlan(planner="megatron", world=1, env=env)
    found = launch.worker_variables(Cluster(), backend(FROM_BACKEND="theirs"), {"OMP_NUM_THREADS": "3"}, plan)
    assert found["FROM_BACKEND"] == "the plan's" and found["OMP_NUM_THREADS"] == "3"


def test_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10)))
    shares = [
        launch.worker_variables(Cluster(devices_per_node=n), backend(), {})["OMP_NUM_THREADS"] for n in (1, 4, 16)
    ]
    assert shares == ["10", "2", "1"]


def test_several_workers_through_torchrun(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert started(folder, 2, say="hi") == 0
    out = capfd.readouterr().out
    assert "worker 0 says hi\n" in out and "worker 1 says hi\n" in out
    ranks = [seen(folder, rank) for rank in (0, 1)]
    assert [(each["RANK"], each["LOCAL_RANK"], each["WORLD_SIZE"]) for each in ranks] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"] != "0"


@pytest.mark.parametrize(("code", "expected"), [(1, 1), (2, 2)])
def test_code_of_one_rank_of_several(folder: Path, code: int, expected: int, capfd: pytest.CaptureFixture[str]) -> None:
    # Rank 0 sleeps: it must be ended, not waited for.
    began = time.monotonic()
    assert started(folder, 2, codes={"1": code}) == expected
    assert time.monotonic() - began < 55
    assert "Traceback" not in capfd.readouterr().err


def test_a_killed_rank_of_several_is_explained(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert started(folder, 2, kill=True) == 1
    error = capfd.readouterr().err
    assert "the worker of rank 0 was ended by SIGKILL; the machine may be out of memory." in error
    assert "Traceback" not in error


PARENT = """
import sys
from pathlib import Path
from loong_core import launch
from loong_core.types import Backend, Cluster
launch.WORKER = "stand_in_worker"
none = "nowhere:nothing"
backend = Backend(name="cpu", device_type="cpu", collective="gloo", probe=none, setup=none, layer_provider=none)
folder = Path(sys.argv[1])
sys.exit(launch.launch(folder / "recipe.yaml", Cluster(devices_per_node=int(sys.argv[2])), backend, folder))
"""


def parent_of(folder: Path, devices: int, **order: Any) -> subprocess.Popen[bytes]:
    (folder / "order.json").write_text(json.dumps({"wait": True, **order}))
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), str(devices)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not all((folder / f"ready-{rank}").exists() for rank in range(devices)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("devices", [1, 2])
def test_signals_reach_the_workers_and_are_waited_for(folder: Path, number: signal.Signals, devices: int) -> None:
    process = parent_of(folder, devices, linger=1)
    process.send_signal(number)
    assert process.wait(60) == 1
    for rank in range(devices):
        assert (folder / f"stopped-{rank}").read_text() == number.name
        with pytest.raises(ProcessLookupError):
            os.kill(seen(folder, rank)["pid"], 0)


def test_a_second_signal_ends_a_worker_that_does_not_go(folder: Path) -> None:
    process = parent_of(folder, 1, linger=60)
    process.send_signal(signal.SIGINT)
    while not (folder / "stopped-0").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 1


def test_handlers_are_restored(folder: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    started(folder, 1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_commands(folder: Path) -> None:
    path = folder / "recipe.yaml"
    several = launch.worker_command(path, Cluster(nodes=4, devices_per_node=8))
    assert "--nnodes=4" in several and "--nproc-per-node=8" in several
    assert "--rdzv-endpoint=node1:29500" in several and "--rdzv-id=run" in several
    one, other = (launch.worker_command(path, Cluster(devices_per_node=2)) for _ in range(2))
    assert one != other, "two runs of one machine do not meet each other"


def test_worker_environment() -> None:
    assert launch.worker_environment({}) is None
    assert launch.worker_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None
    assert launch.worker_environment({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None
    found = launch.worker_environment({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})
    assert found == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    step = {
        "SLURM_PROCID": "9",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_NODELIST": "gpu[03-04]",
    }
    found = launch.worker_environment(step)
    assert found is not None
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("9", "16", "1", "8")
    assert found["MASTER_ADDR"] == "gpu03" and 1024 < int(found["MASTER_PORT"]) < 65536


def test_in_worker_speaks_torchruns_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "x")  # so that the test's end removes what is set meanwhile
        monkeypatch.delenv(name)
    assert not launch.in_worker()
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert launch.in_worker() and os.environ["RANK"] == "1" and os.environ["WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu01", "gpu01"),
        ("gpu01,gpu02", "gpu01"),
        ("gpu[03-05,9],login", "gpu03"),
        ("gpu[7,9]", "gpu7"),
        ("rack[1-2]-ib", "rack1-ib"),
    ],
)
def test_first_host(hosts: str, first: str) -> None:
    assert launch.first_host(hosts) == first
