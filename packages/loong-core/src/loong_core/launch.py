"""Starting workers and standing between them and the terminal: signals go down, an honest exit code comes up.

Workers inherit this process's output, so a progress bar is drawn on the user's own terminal. They run in a session of
their own: Ctrl-C reaches them once, forwarded from here, and not a second time from the terminal.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from loong_core.startup import VARIABLE, Startup
from loong_core.types import Backend, Cluster, ParallelPlan

WORKER = "loong_core.train.worker"
ELASTIC = "loong_core.elastic"
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def launch(
    recipe_path: Path,
    cluster: Cluster,
    backend: Backend,
    folder: Path,
    startup: Startup | None = None,
    plan: ParallelPlan | None = None,
) -> int:
    """Run the workers of one machine to their end.

    One worker is a plain child process; several are started by torch.distributed.run (see `loong_core.elastic`), which
    every machine of several runs for itself and which meets the others at the recipe's `launch.rendezvous`.

    Args:
        recipe_path: the resolved recipe, handed to the workers.
        cluster: how many workers, on how many machines.
        backend: its `env` is given to the workers; a variable that the user set wins.
        folder: the run folder; workers leave `logs/exit-<rank>.json` there.
        startup: what was measured so far; workers go on with it.
        plan: its `env` is given to the workers, over that of the backend.

    Returns:
        0, 1 (the run failed, or was stopped), or 2 (a worker found the input wrong).
    """
    for stale in (folder / "logs").glob("exit-*.json"):
        stale.unlink(missing_ok=True)
    command = worker_command(recipe_path, cluster)
    single = cluster.world == 1
    variables = worker_variables(cluster, backend, os.environ, plan)
    variables[VARIABLE] = "" if startup is None else startup.dump()
    code = _supervise(command, variables, escalate=single)
    if sys.stdout.isatty():
        # A worker that was killed in the middle of drawing its progress bar leaves the cursor hidden.
        sys.stdout.write("\x1b[?25h")
        sys.stdout.flush()
    return _exit_code(code, folder, single)


def worker_command(recipe_path: Path, cluster: Cluster) -> list[str]:
    """The argument list that starts this machine's workers."""
    python = [sys.executable, "-u", "-m"]
    if cluster.world == 1:
        return [*python, WORKER, str(recipe_path)]
    if cluster.nodes == 1:
        # Port 0: torchrun takes a free port and tells the workers, so two runs on one machine cannot collide.
        meeting = ["--rdzv-endpoint=127.0.0.1:0", f"--rdzv-id={uuid.uuid4()}", "--local-addr=127.0.0.1"]
    else:
        settings = _launch_settings(recipe_path)
        meeting = [f"--rdzv-endpoint={settings['rendezvous']}", f"--rdzv-id={recipe_path.parent.name}"]
    return [
        *python,
        ELASTIC,
        f"--nnodes={cluster.nodes}",
        f"--nproc-per-node={cluster.devices_per_node}",
        "--rdzv-backend=c10d",
        *meeting,
        "--max-restarts=0",
        "-m",
        WORKER,
        str(recipe_path),
    ]


def worker_variables(
    cluster: Cluster, backend: Backend, environ: Mapping[str, str], plan: ParallelPlan | None = None
) -> dict[str, str]:
    """The environment of workers: the backend's, overruled by the plan's and the user's, and a fair share of cores
    for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // cluster.devices_per_node)),
        # `python -m` would put the working directory first on the path, where a file of the user's may hide a module.
        "PYTHONSAFEPATH": "1",
        **backend.env,
        **({} if plan is None else plan.env),
    }
    return {**defaults, **environ}


def _launch_settings(recipe_path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(recipe_path.read_text(encoding="utf-8"))["launch"]


def _supervise(command: list[str], variables: dict[str, str], escalate: bool) -> int:
    """Run `command`, forward signals, and wait for its end; returns its code, negative when a signal ended it.

    The first signal is passed on. A further one kills a single worker (`escalate`); torchrun is left to end its
    workers, which it does within 30 seconds, because a second signal would make it forget them.
    """
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if child is None or child.poll() is not None:
            return
        if len(received) == 1:
            child.send_signal(number)
        elif escalate:
            child.kill()

    previous = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        child = subprocess.Popen(command, env=variables, start_new_session=True)
        if received:
            child.send_signal(received[0])
        return child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _exit_code(code: int, folder: Path, single: bool) -> int:
    """The command line's code. torchrun says 1 whatever happened, so workers leave their own codes in files."""
    if code == 0:
        return 0
    outcomes = []
    for path in sorted((folder / "logs").glob("exit-*.json")):
        try:
            outcomes.append(int(json.loads(path.read_text(encoding="utf-8"))["exit_code"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if single and code < 0 and not outcomes:
        name = signal.Signals(-code).name
        hint = "; the machine may be out of memory" if name == "SIGKILL" else ""
        sys.stderr.write(f"error: the worker was ended by {name}{hint}. See {folder / 'logs'}.\n")
    return 2 if 2 in outcomes or (single and code == 2) else 1


# --------------------------------------------------------------------------- processes that others started
def in_worker() -> bool:
    """Whether this process is already one of a launched world (torchrun, or a task of srun), not the parent of one.

    Under srun it also gives the variables torchrun's names, so that everything after it reads one dialect.
    """
    variables = worker_environment(os.environ)
    if variables is None:
        return False
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    return True


def worker_environment(environ: Mapping[str, str]) -> dict[str, str] | None:
    """Rank, world and meeting point in torchrun's names, from torchrun's own variables or those of a SLURM step.

    None where this process was not launched as a rank. A SLURM batch script or allocation shell is not: only `srun`
    sets a step's variables, and only a step of several tasks is a world.
    """
    if "RANK" in environ:
        found = {name: environ[name] for name in _TORCHRUN if name in environ}
        world = found.setdefault("WORLD_SIZE", "1")
        found.setdefault("LOCAL_WORLD_SIZE", world)
        found.setdefault("LOCAL_RANK", str(int(found["RANK"]) % int(found["LOCAL_WORLD_SIZE"])))
        return found
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_PROCID" not in environ or int(tasks) < 2:
        return None
    nodes = int(environ.get("SLURM_STEP_NUM_NODES", "1"))
    job = int(environ.get("SLURM_JOB_ID", "0"))
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(int(tasks) // nodes),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        # All tasks must come to the same port without talking: it is a function of what they share.
        "MASTER_PORT": environ.get("MASTER_PORT") or str(20000 + job % 20000),
    }


def first_host(hosts: str) -> str:
    """The first name of a SLURM host list: `gpu[03-05,9],login` -> `gpu03`."""
    match = re.match(r"([^,\[]*)(?:\[([^\]]*)\]([^,]*))?", hosts)
    assert match is not None
    prefix, ranges, suffix = match.groups()
    return prefix if ranges is None else prefix + re.split(r"[-,]", ranges)[0] + (suffix or "")
