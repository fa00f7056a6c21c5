"""Which machines a run gets: alone, under torchrun, under srun."""

from __future__ import annotations

from typing import Any

import pytest

from loong_core.cluster import detect
from loong_core.errors import RecipeError
from loong_core.recipe import Recipe
from loong_core.types import Backend, Cluster, PrecisionPolicy, Probe

GIB = 2**30


def peak(device_name: str, dtype: str) -> float:
    return {"bfloat16": 1e15, "float32": 5e13}.get(dtype, 0.0) if device_name == "card" else 0.0


def backend(device_type: str = "cuda", **fields: Any) -> Backend:
    none = "nowhere:nothing"
    return Backend(
        name=device_type,
        device_type=device_type,
        collective="gloo",
        probe=none,
        setup=none,
        layer_provider=none,
        **fields,
    )


def found(device_type: str, probe: Probe, environ: dict[str, str] | None = None, **launch: Any) -> Cluster:
    return detect(backend(device_type), probe, Recipe.model_validate({"launch": launch}), environ=environ or {})


def problems(device_type: str, probe: Probe, environ: dict[str, str] | None = None, **launch: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        found(device_type, probe, environ, **launch)
    return caught.value.problems


CARDS = Probe(devices=8, memory=141 * GIB, device_name="card")
MACHINE = Probe(devices=1, memory=64 * GIB, device_name="cpu")


def test_auto_takes_every_card_and_one_cpu_worker() -> None:
    cluster = found("cuda", CARDS)
    assert (cluster.nodes, cluster.devices_per_node, cluster.memory) == (1, 8, 141 * GIB)
    assert found("cpu", MACHINE).world == 1


def test_cpu_workers_share_the_memory() -> None:
    cluster = found("cpu", MACHINE, devices=4)
    assert cluster.world == 4 and cluster.memory == 16 * GIB


def test_several_machines() -> None:
    cluster = found("cuda", CARDS, nodes=4, rendezvous="node1:29500")
    assert cluster.world == 32 and cluster.devices_per_node == 8


def test_peak_follows_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("peak_of_a_test")
    module.peak = peak  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "peak_of_a_test", module)
    card = backend(peak_flops="peak_of_a_test:peak")
    bf16, fp32 = Recipe(precision="bf16"), Recipe(precision="fp32")
    assert detect(card, CARDS, bf16, environ={}).peak_flops == 1e15
    assert detect(card, CARDS, fp32, environ={}).peak_flops == 5e13
    policy = PrecisionPolicy(name="mine", parameters="bfloat16", activations="bfloat16", matmul="float32")
    assert detect(card, CARDS, bf16, policy, environ={}).peak_flops == 5e13
    assert detect(backend(), CARDS, bf16, environ={}).peak_flops == 0.0


@pytest.mark.parametrize(
    ("launch", "parts"),
    [
        ({"devices": 9}, ["launch.devices = 9", "8 cuda devices", "auto or 1 to 8"]),
        ({"nodes": 2}, ["launch.rendezvous = null", "host:port"]),
        ({"nodes": 2, "rendezvous": "node1"}, ["launch.rendezvous = node1", "host:port"]),
        ({"nodes": 2, "rendezvous": "node1:99999"}, ["node1:99999"]),
    ],
)
def test_contradictions(launch: dict[str, Any], parts: list[str]) -> None:
    (problem,) = problems("cuda", CARDS, **launch)
    assert all(part in problem for part in parts), problem


def test_no_device_gives_the_probes_reason_with_everything_else() -> None:
    first, second = problems("cuda", Probe(devices=0, reason="libcuda.so.1 is absent"), nodes=2)
    assert "libcuda.so.1 is absent" in first and "cpu" in first and "launch.rendezvous" in second


def torchrun(world: int, local: int) -> dict[str, str]:
    return {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(local)}


def test_the_launched_world_wins() -> None:
    cluster = found("cuda", CARDS, torchrun(8, 4))
    assert (cluster.nodes, cluster.devices_per_node) == (2, 4)
    assert found("cpu", MACHINE, torchrun(4, 4)).memory == 16 * GIB
    assert found("cuda", CARDS, torchrun(8, 4), devices=4, nodes=2).world == 8


def test_a_recipe_that_contradicts_the_launched_world() -> None:
    (problem,) = problems("cuda", CARDS, torchrun(8, 4), devices=8)
    assert "launch.devices = 8" in problem and "auto or 4" in problem
    first, second = problems("cuda", CARDS, torchrun(8, 4), devices=2, nodes=4)
    assert "launch.devices = 2" in first and "launch.nodes = 4" in second and "allowed here 2" in second
    (problem,) = problems("cuda", CARDS, torchrun(7, 4))
    assert "WORLD_SIZE = 7" in problem


def test_srun_counts_as_launched() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}
    cluster = found("cuda", CARDS, step)
    assert (cluster.nodes, cluster.devices_per_node) == (2, 8)
    allocation = {"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}
    assert found("cuda", CARDS, allocation).world == 8, "a batch script is not a rank"
