"""The torch planner: what is shared out, what is refused, and that the estimate is what an engine holds."""

from __future__ import annotations

from typing import Any

import pytest

from loong_core.errors import RecipeError
from loong_core.parallel.torch_options import TorchOptions
from loong_core.parallel.torch_plan import estimate, plan
from loong_core.precision import POLICIES
from loong_core.recipe import Recipe
from loong_core.testing import decoder
from loong_core.types import Cluster, ModelShape, ParallelPlan, ParameterSpec, PrecisionPolicy

BF16 = next(policy for policy in POLICIES if policy.name == "bf16")
GIB = 2**30


def recipe(options: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Recipe:
    data = {"global_batch": 16, "micro_batch": 1, "seq_len": 64} | sections.pop("data", {})
    parallel = {"options": options or {}} | sections.pop("parallel", {})
    return Recipe(data=data, parallel=parallel, **sections)


def model(parameters: int = 3 * 10**9, layers: int = 30) -> ModelShape:
    """`parameters` in equal layers; a layer keeps 100 elements per token."""
    specs = tuple(
        ParameterSpec(role=f"layers.{layer}.up", shape=(parameters // layers // 100, 100), layer=layer)
        for layer in range(layers)
    )
    sizes = {"layers": layers, "hidden": 10, "active_parameters": parameters, "activation_replicated": 100.0}
    return ModelShape(family="any", fields={}, parameters=specs, **sizes)


def made(devices: int = 8, memory: float = 140, nodes: int = 1, **arguments: Any) -> ParallelPlan:
    shape = arguments.pop("shape", None) or model()
    cluster = Cluster(nodes=nodes, devices_per_node=devices // nodes, memory=int(memory * GIB), backend="cuda")
    return plan(shape, recipe(**arguments), cluster, BF16)


@pytest.mark.parametrize(
    ("devices", "nodes", "memory", "shard", "size", "recompute"),
    [
        (1, 1, 140, "none", 1, "none"),  # nobody to share with
        (8, 1, 140, "optimizer", 1, "none"),
        (8, 1, 8, "full", 8, "none"),
        (16, 2, 8, "hybrid", 8, "none"),
        (16, 2, 4.5, "full", 16, "none"),
        (8, 1, 0, "optimizer", 1, "none"),  # unknown memory
        (8, 1, 1, "full", 8, "full"),  # fits nowhere
    ],
)
def test_the_least_sharding_that_fits(
    devices: int, nodes: int, memory: float, shard: str, size: int, recompute: str
) -> None:
    found = made(devices, memory, nodes)
    assert (found.options["shard"], found.options["shard_size"], found.recompute) == (shard, size, recompute)
    assert found.dp == found.world == devices and found.micro_batches == 16 // devices
    assert found.parameters_per_rank == (-(-found.parameters // size),)
    if memory > 1:
        assert found.memory["total"] <= 0.9 * memory * GIB
    assert any("warning" in reason for reason in found.reasons) == (memory == 1)


def test_activations_are_computed_again_before_a_plan_does_not_fit() -> None:
    wide = model()
    need = made(8, 0, shape=wide, data={"seq_len": 10**6}).memory["activations"] / GIB
    found = made(8, 8 + need / 5, shape=wide, data={"seq_len": 10**6})
    assert found.recompute == "full" and found.memory["activations"] < need * GIB / 5


def test_named_sharding_is_kept() -> None:
    for shard in ("none", "optimizer", "full"):
        assert made(8, 1, options={"shard": shard}).options["shard"] == shard
    found = made(8, 140, options={"shard": "hybrid", "shard_size": 4})
    assert found.options["shard_size"] == 4 and found.parameters_per_rank == (found.parameters // 4,)


def test_the_estimate_counts_bytes() -> None:
    trained, frozen = 240, 48
    specs = (
        ParameterSpec(role="layers.0.up", shape=(20, 12), layer=0),
        ParameterSpec(role="eyes", shape=(4, 12), frozen=True),
    )
    shape = ModelShape(family="any", fields={}, layers=1, hidden=12, parameters=specs)
    options = TorchOptions(ema=0.9)

    def bytes_of(shard: Any, size: int, world: int, policy: PrecisionPolicy = BF16) -> dict[str, int]:
        return estimate(shape, recipe(), policy, options, shard, size, world)

    whole = {"parameters": 2 * (trained + frozen), "gradients": 4 * trained}
    state = {"master": 2 * trained, "optimizer": 8 * trained, "ema": 4 * trained}
    assert bytes_of("none", 1, 4) == whole | state
    assert bytes_of("optimizer", 1, 4) == whole | {name: size // 4 for name, size in state.items()}
    assert bytes_of("full", 4, 4) == {
        "parameters": 2 * frozen // 4 + 2 * 2 * trained,
        "gradients": 4 * trained // 4 + 4 * trained,
        "master": 4 * trained // 4,
        "optimizer": 8 * trained // 4,
        "ema": 4 * trained // 4,
    }
    narrow = next(policy for policy in POLICIES if policy.name == "bf16_gradients")
    assert bytes_of("none", 1, 4, narrow) == whole | state | {"gradients": 2 * trained}
    # Slices are float32 masters, and their gradients with them.
    assert bytes_of("full", 4, 4, narrow)["gradients"] == 4 * trained // 4 + 2 * trained


def test_samples_of_other_lengths_than_rows() -> None:
    """A model that reads no rows of text says how many tokens a sample has."""
    shape = model()
    other = ModelShape(**{**vars(shape), "fields": {"sample_tokens": 640}})
    assert made(shape=other).flops_per_step == 10 * made(shape=shape).flops_per_step


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"parallel": {"tp": 2}}, "parallel.tp = 2"),
        ({"parallel": {"pp": 4, "cp": 3}}, "parallel.cp = 3"),
        ({"parallel": {"ep": 5}}, "parallel.ep = 5"),
        ({"parallel": {"sp": True}}, "parallel.sp"),
        ({"parallel": {"vpp": 2}}, "parallel.vpp = 2"),
        ({"parallel": {"components": {"eyes": {}}}}, "eyes"),
        ({"parallel": {"recompute": "selective"}}, "none, full, auto"),
        ({"data": {"global_batch": 12}}, "allowed here multiples of 8, such as 8 or 16"),
        ({"options": {"shard": "hybrid", "shard_size": 3}}, "allowed here 1, 2, 4, 8"),
        ({"options": {"export": "ema"}}, "parallel.options.ema"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        made(**arguments)


def test_all_problems_come_together() -> None:
    with pytest.raises(RecipeError) as caught:
        made(parallel={"tp": 2, "recompute": "selective"}, data={"global_batch": 9}, options={"export": "ema"})
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(
    ("devices", "options", "words"),
    [
        (1, {"shard": "full"}, "no effect on one device"),
        (8, {"shard": "full", "cuda_graph": True}, "cuda_graph = true has no effect"),
        (8, {"shard": "none", "shard_size": 4}, "shard_size = 4 has no effect"),
    ],
)
def test_settings_without_effect_are_named(devices: int, options: dict[str, Any], words: str) -> None:
    warnings = [reason for reason in made(devices, options=options).reasons if reason.startswith("warning")]
    assert len(warnings) == 1 and words in warnings[0]


def test_compiling_has_no_effect_on_a_cpu() -> None:
    shape = decoder.describe(decoder.FAMILY, decoder.CONFIG)
    cluster = Cluster(backend="cpu", memory=GIB)
    found = plan(shape, recipe({"compile": True, "cuda_graph": True}), cluster, BF16)
    assert sum("no effect on the cpu backend" in reason for reason in found.reasons) == 2


def test_collectives_go_before_graphs() -> None:
    assert made().env == {"TORCH_NCCL_HIGH_PRIORITY": "1"}
