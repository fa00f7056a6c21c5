"""Run a function on several gloo ranks from inside a test, without leaving anything behind in the test's process.

The test process imports megatron.core once with the CPU device active, switches the device off again, and forks one
child per call, which forks the ranks. Functions may be closures and arguments any object, because a fork copies them;
results come back as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

KILLED_WITH_PARENT = 1  # PR_SET_PDEATHSIG
GRACE_SECONDS = 5.0


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds its number, its traceback and the end of its output."""


def free_port() -> int:
    """A TCP port of this machine that was free just now, outside the range the system gives out by itself."""
    while True:
        port = random.SystemRandom().randrange(10000, 30000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def run_ranks(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120.0,
    init: bool = False,
    megatron: bool = True,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Call `function(rank, *args)` on `world` forked ranks; returns their JSON-able results in order of rank.

    Every rank has RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT set (and `env`), one
    torch thread and the CPU device active. With `init` the default gloo group exists before `function` runs.
    `megatron=False` leaves megatron.core unimported. Tuples come back as lists.

    Raises `RankError` where a rank raises, dies, or is not done within `timeout` seconds; then all are killed.
    """
    prepare(megatron)
    with tempfile.TemporaryDirectory(prefix="loong-ranks-") as name:
        folder = Path(name)
        leader = _fork(lambda: _lead(world, function, args, folder, timeout, init, env or {}))
        try:
            status = _wait(leader, timeout + 60.0)
        except BaseException:
            _kill_group(leader)
            raise
        _kill_group(leader)
        return _collect(world, folder, status, timeout)


def prepare(megatron: bool = True) -> None:
    """Import what every rank needs into this process; all calls of `run_ranks` share the seconds it takes."""
    from loong_core.backends import cpu_device

    if not megatron or "megatron.core.optimizer" in sys.modules:
        return
    was_active = cpu_device.active()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        cpu_device.activate()
        for name in ("distributed", "models.gpt", "optimizer"):
            importlib.import_module(f"megatron.core.{name}")
    if not was_active:
        cpu_device.deactivate()


def _fork(body: Callable[[], int]) -> int:
    """Fork a child that ends with `body`'s exit code and without any of the parent's clean-up."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with warnings.catch_warnings():
        # Python warns about a fork beside other threads; the child starts no code of theirs
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        ctypes.CDLL(None).prctl(KILLED_WITH_PARENT, signal.SIGKILL)
        if os.getppid() == parent:
            code = body()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _redirect(path: Path) -> None:
    """Send everything this process prints, from Python or from below, to a file."""
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - lives as long as the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def _lead(
    world: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    folder: Path,
    timeout: float,
    init: bool,
    env: dict[str, str],
) -> int:
    """The forked child: fork the ranks and wait for them."""
    os.setsid()
    _redirect(folder / "leader.log")
    os.environ.update({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    import torch

    torch.set_num_threads(1)
    from loong_core.backends import cpu_device

    cpu_device.activate()
    shared = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **env,
    }
    ranks: dict[int, int] = {}
    for rank in range(world):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), **shared}
        pid = _fork(partial(_rank, rank, variables, function, args, folder, timeout, init))
        ranks[pid] = rank
    deadline = time.monotonic() + timeout
    while ranks and time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in ranks:
            rank = ranks.pop(pid)
            if status:
                (folder / f"{rank}.died").write_text(str(os.waitstatus_to_exitcode(status)))
                # the others hang in a collective that will never end
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        elif pid == 0:
            time.sleep(0.005)
    for pid, rank in ranks.items():
        (folder / f"{rank}.hung").touch()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return 0


def _rank(
    rank: int,
    variables: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    folder: Path,
    timeout: float,
    init: bool,
) -> int:
    _redirect(folder / f"{rank}.log")
    os.environ.update(variables)
    try:
        import torch.distributed as dist

        if init:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=int(variables["WORLD_SIZE"]),
                timeout=timedelta(seconds=timeout),
            )
        result = json.dumps(function(rank, *args))
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves early would break the others' last collective
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        return 1
    (folder / f"{rank}.json").write_text(result)
    return 0


def _wait(pid: int, seconds: float) -> int | None:
    """The exit code of `pid`, None where it does not end in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(leader, 0)


def _collect(world: int, folder: Path, status: int | None, timeout: float) -> list[Any]:
    """The results of all ranks, or one error that tells what became of each rank without one."""
    problems: list[str] = []
    for rank in range(world):
        if (folder / f"{rank}.json").exists() and not (folder / f"{rank}.died").exists():
            continue
        log = folder / f"{rank}.log"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:]) if log.exists() else ""
        if (error := folder / f"{rank}.error").exists():
            problems.insert(0, f"rank {rank} of {world} raised:\n{error.read_text()}\nits output ended:\n{tail}")
        elif (died := folder / f"{rank}.died").exists():
            problems.insert(0, f"rank {rank} of {world} ended with code {died.read_text()}; its output ended:\n{tail}")
        elif (folder / f"{rank}.hung").exists():
            problems.append(f"rank {rank} of {world} was not done (limit {timeout} s); its output ended:\n{tail}")
    if status != 0:
        text = (folder / "leader.log").read_text(errors="replace") if (folder / "leader.log").exists() else ""
        problems.append(f"the process that forks the ranks ended with code {status}:\n{text[-4000:]}")
    if problems:
        raise RankError("\n\n".join(problems))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
