"""The machines of a run, from the recipe, the probe, and, where somebody else started the processes, their world."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from loong_core.errors import RecipeError
from loong_core.launch import worker_environment
from loong_core.recipe import Recipe
from loong_core.types import Backend, Cluster, PrecisionPolicy, Probe

_POLICY_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def detect(
    backend: Backend,
    probe: Probe,
    recipe: Recipe,
    precision: PrecisionPolicy | None = None,
    environ: Mapping[str, str] | None = None,
) -> Cluster:
    """The cluster a run gets.

    Under torchrun or srun the launched world counts; a recipe that names another number is an error. Otherwise
    `launch.devices` is the number of workers on each of `launch.nodes` machines; `auto` takes every device the probe
    found, and one worker on a CPU, whose memory all workers share. `precision` decides which peak FLOP/s are meant;
    without it the name of the recipe's policy does.

    Raises:
        RecipeError: with every contradiction at once.
    """
    launched = worker_environment(os.environ if environ is None else environ)
    if launched is None:
        found = list(_own_problems(backend, probe, recipe))
        nodes, devices = recipe.launch.nodes, recipe.launch.devices
        devices = _automatic(backend, probe) if devices == "auto" else devices
    else:
        world, local = int(launched["WORLD_SIZE"]), int(launched["LOCAL_WORLD_SIZE"])
        found = list(_launched_problems(recipe, world, local))
        nodes, devices = max(world // local, 1), local
    if found:
        raise RecipeError(found)
    return Cluster(
        nodes=nodes,
        devices_per_node=devices,
        memory=probe.memory // devices if backend.device_type == "cpu" else probe.memory,
        device_name=probe.device_name,
        backend=backend.name,
        capabilities=backend.capabilities,
        peak_flops=_peak_flops(backend, probe, recipe, precision),
    )


def _automatic(backend: Backend, probe: Probe) -> int:
    return 1 if backend.device_type == "cpu" else max(probe.devices, 1)


def _own_problems(backend: Backend, probe: Probe, recipe: Recipe) -> Iterator[str]:
    launch = recipe.launch
    if backend.device_type != "cpu":
        if probe.devices < 1:
            reason = f": {probe.reason}" if probe.reason else ""
            yield (
                f"backend {backend.name} finds no device{reason}; choose another backend (cpu runs everywhere), or run "
                "`loong doctor`"
            )
        elif launch.devices != "auto" and launch.devices > probe.devices:
            yield (
                f"launch.devices = {launch.devices}: this machine has {probe.devices} {backend.name} device"
                f"{'s' if probe.devices > 1 else ''}; allowed here auto or 1 to {probe.devices}; lower launch.devices"
            )
    if launch.nodes > 1:
        host, _, port = (launch.rendezvous or "").rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            yield (
                f"launch.rendezvous = {'null' if launch.rendezvous is None else launch.rendezvous}: {launch.nodes} "
                "machines must know where to meet; allowed is host:port of the first one, such as node1:29500; set "
                "launch.rendezvous, or launch.nodes to 1"
            )


def _launched_problems(recipe: Recipe, world: int, local: int) -> Iterator[str]:
    if local < 1 or world % local:
        yield (
            f"WORLD_SIZE = {world} is not a multiple of LOCAL_WORLD_SIZE = {local}: loong wants equally many workers "
            "on every machine; start it so"
        )
        return
    devices, nodes = recipe.launch.devices, recipe.launch.nodes
    if devices != "auto" and devices != local:
        yield (
            f"launch.devices = {devices}, but this process was started as one of {local} workers on its machine "
            f"(LOCAL_WORLD_SIZE): allowed here auto or {local}; change launch.devices, or start `loong train` by itself"
        )
    if nodes not in (1, world // local):
        yield (
            f"launch.nodes = {nodes}, but {world // local} machine{'s were' if world > local else ' was'} started "
            f"(WORLD_SIZE / LOCAL_WORLD_SIZE): allowed here {world // local}; change launch.nodes"
        )


def _peak_flops(backend: Backend, probe: Probe, recipe: Recipe, precision: PrecisionPolicy | None) -> float:
    if backend.peak_flops is None:
        return 0.0
    from loong_core.registry import resolve

    dtype = _POLICY_DTYPES.get(recipe.precision, recipe.precision)
    if precision is not None:
        dtype = precision.activations if precision.matmul == "same" else precision.matmul
    return float(resolve(backend.peak_flops)(probe.device_name, dtype))
