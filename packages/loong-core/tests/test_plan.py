"""The planner: what it refuses and in which words, what it resolves, and that it is pure."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loong_core.errors import RecipeError
from loong_core.parallel.plan import PLANNERS, choose_planner, plan
from loong_core.recipe import Recipe
from loong_core.testing.shapes import decoder_shape
from loong_core.types import Cluster, ModelShape, ParallelPlan, PrecisionPolicy

BF16 = PrecisionPolicy(name="bf16", parameters="bfloat16", activations="bfloat16")
GIB = 2**30


def recipe(data: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **parallel: Any) -> Recipe:
    return Recipe.model_validate(
        {"data": {"seq_len": 64, "global_batch": 24, **(data or {})}, "parallel": parallel, "model": model or {}}
    )


def made(shape: ModelShape, devices: int, asked: Recipe, memory: int = 0, nodes: int = 1) -> ParallelPlan:
    cluster = Cluster(nodes=nodes, devices_per_node=devices // nodes, memory=memory)
    return plan(shape, asked, cluster, BF16)


def refused(shape: ModelShape, devices: int, asked: Recipe) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        made(shape, devices, asked)
    return caught.value.problems


# ------------------------------------------------------------------------------------------------- refusals
DENSE, SPARSE = decoder_shape(heads=6, kv_heads=6), decoder_shape(experts=6)

REFUSALS: list[tuple[str, ModelShape, int, Recipe, list[str]]] = [
    (
        "world",
        DENSE,
        4,
        recipe(tp=3),
        ["parallel.tp x parallel.pp x parallel.cp = 3 x 1 x 1 = 3", "4 devices", "1, 2, 4"],
    ),
    ("world, product", DENSE, 4, recipe(pp=2, cp=3), ["1 x 2 x 3 = 6 does not divide 4 devices"]),
    ("too many", DENSE, 1, recipe(pp=2), ["does not divide 1 device:", "launch.devices to a multiple of 2"]),
    ("heads", DENSE, 12, recipe(tp=4), ["parallel.tp = 4 does not divide 6 attention heads: allowed here 1, 2, 3, 6"]),
    ("experts", SPARSE, 4, recipe(ep=4), ["parallel.ep = 4 does not divide 6 experts: allowed here 1, 2"]),
    ("ep without experts", DENSE, 2, recipe(ep=2), ["parallel.ep = 2", "no experts", "remove parallel.ep"]),
    ("etp without experts", DENSE, 2, recipe(etp=2), ["parallel.etp = 2", "no experts", "remove parallel.etp"]),
    ("expert ranks", SPARSE, 4, recipe(ep=3), ["parallel.etp x parallel.ep = 1 x 3 = 3", "4 devices", "1, 2, 4"]),
    (
        "gathered parts",
        SPARSE,
        4,
        recipe(tp=2, etp=2, options={"dispatch": "gather"}),
        ["dispatch = gather", "etp = 2", "alltoall"],
    ),
    (
        "visiting parts",
        SPARSE,
        4,
        recipe(tp=2, etp=2, options={"dispatch": "weights"}),
        ["dispatch = weights", "etp = 2", "alltoall"],
    ),
    ("expert ranks of a stage", SPARSE, 4, recipe(ep=2, etp=2, pp=2), ["2 x 2 = 4 does not divide the 2 devices"]),
    ("experts need sp", SPARSE, 2, recipe(tp=2, sp=False), ["parallel.sp = false", "parallel.tp = 2", "true or auto"]),
    ("vpp without pp", DENSE, 2, recipe(vpp=2), ["parallel.vpp = 2", "parallel.pp is 1", "remove parallel.vpp"]),
    (
        "vpp and layers",
        decoder_shape(layers=6),
        2,
        recipe(pp=2, vpp=2),
        ["2 x 2 = 4 does not divide 6 layers", "here 3"],
    ),
    ("pp and layers", decoder_shape(layers=2), 4, recipe(pp=4), ["parallel.pp = 4 is more than 2 layers", "1 to 2"]),
    ("layout length", DENSE, 2, recipe(pp=2, layout=[1, 2, 1]), ["parallel.layout has 3 entries", "allowed here 2"]),
    ("layout sum", DENSE, 2, recipe(pp=2, layout=[1, 2]), ["parallel.layout adds up to 3 layers: allowed here 4"]),
    ("layout empty", DENSE, 2, recipe(pp=2, layout=[0, 4]), ["parallel.layout has an entry of 0 layers"]),
    ("cp", DENSE, 2, recipe({"seq_len": 62}, cp=2), ["data.seq_len = 62", "2 x parallel.cp = 4", "60 or 64"]),
    ("sp", DENSE, 2, recipe({"seq_len": 63}, tp=2), ["data.seq_len = 63", "parallel.tp = 2 (seq", "62 or 64"]),
    (
        "sp and cp",
        DENSE,
        12,
        recipe({"seq_len": 65}, tp=3, cp=2),
        ["data.seq_len = 65", "2 x parallel.cp = 4", "nor by parallel.cp x parallel.tp = 2 x 3 = 6", "60 or 72"],
    ),
    (
        "batch",
        DENSE,
        4,
        recipe({"global_batch": 6}),
        ["data.global_batch = 6", "1 x 4 = 4", "multiples of 4", "4 or 8"],
    ),
    ("batch, small", DENSE, 4, recipe({"global_batch": 2, "micro_batch": 2}), ["2 x 4 = 8", "such as 8;"]),
    (
        "interleaved",
        DENSE,
        2,
        recipe({"global_batch": 3}, pp=2, vpp=2),
        [
            "data.global_batch = 3 makes 3 micro-batches",
            "parallel.pp = 2 does not divide",
            "2 or 4",
            "remove parallel.vpp",
        ],
    ),
    ("components", DENSE, 1, recipe(components={"tower": {"tp": 1}}), ["parallel.components = tower", "remove"]),
]


@pytest.mark.parametrize(
    ("shape", "devices", "asked", "parts"), [row[1:] for row in REFUSALS], ids=[r[0] for r in REFUSALS]
)
def test_refusal_says_what_is_allowed(shape: ModelShape, devices: int, asked: Recipe, parts: list[str]) -> None:
    problems = refused(shape, devices, asked)
    assert any(all(part in problem for part in parts) for problem in problems), problems
    assert all("allowed" in problem for problem in problems)


def test_all_problems_at_once() -> None:
    asked = recipe({"seq_len": 63, "global_batch": 5}, tp=4, pp=2, vpp=3, ep=2, cp=1)
    problems = "\n".join(refused(DENSE, 8, asked))
    parts = ("parallel.tp = 4", "parallel.ep = 2", "parallel.vpp", "data.seq_len = 63", "data.global_batch = 5 makes 5")
    for part in parts:
        assert part in problems


def test_families_that_forget_a_rule_are_caught() -> None:
    forgetful = decoder_shape(ffn=97)
    silent = ModelShape(**{**vars(forgetful), "divisors": ()})
    (problem,) = refused(silent, 2, recipe(tp=2))
    assert "cannot cut axis" in problem and "layers.0.mlp" in problem
    sparse = decoder_shape(experts=5)
    (problem,) = refused(ModelShape(**{**vars(sparse), "divisors": ()}), 2, recipe(ep=2))
    assert "parallel.ep = 2 does not divide 5 experts: allowed here 1" in problem


# ------------------------------------------------------------------------------------------------- results
def test_everything_is_resolved() -> None:
    shape = decoder_shape(experts=6, layers=5)
    found = made(shape, 8, recipe(tp=2, pp=2, ep=2))
    assert (found.tp, found.sp, found.pp, found.cp, found.ep, found.etp, found.dp) == (2, True, 2, 1, 2, 1, 2)
    assert found.world == 8 and found.micro_batches == 12 and found.micro_batch == 1
    assert [len(stage) for stage in found.stages] == [3, 2]
    assert found.parameters == sum(spec.size for spec in shape.parameters)
    assert len(found.parameters_per_rank) == 2
    assert found.flops_per_step == shape.train_flops(24 * 64, 64)
    assert set(found.memory) == {
        "parameters", "gradients", "master", "optimizer", "activations", "logits", "total"
    }  # fmt: skip
    assert found.planner == "megatron" and found.recompute == "none"


def test_logits_are_held_where_the_reference_computes_the_loss() -> None:
    named = recipe({"seq_len": 65536}).model_copy(update={"ops": {"linear_cross_entropy": "torch"}})
    on_cpu, on_cuda = (Cluster(backend=backend) for backend in ("cpu", "cuda"))
    held = 65536 * 131 * (2 + 2)
    assert plan(DENSE, recipe({"seq_len": 65536}), on_cpu, BF16).memory["logits"] == held
    assert plan(DENSE, named, on_cuda, BF16).memory["logits"] == held
    assert plan(DENSE, recipe({"seq_len": 65536}), on_cuda, BF16).memory["logits"] < held / 5


def test_expert_degree_of_a_dense_model_follows_tp() -> None:
    assert made(DENSE, 2, recipe(tp=2)).etp == 2
    assert made(DENSE, 2, recipe(tp=2, etp=2)).etp == 2
    assert made(SPARSE, 2, recipe(tp=2)).etp == 1
    assert made(SPARSE, 2, recipe(tp=2, etp=2)).etp == 2


def test_layout_and_virtual_chunks() -> None:
    found = made(DENSE, 2, recipe(pp=2, layout=[1, 3]))
    assert found.stages == ((0,), (1, 2, 3))
    found = made(decoder_shape(layers=6), 2, recipe(pp=2, vpp=2, layout=[1, 2, 2, 1]))
    assert found.vpp == 2 and found.stages == ((0,), (1, 2), (3, 4), (5,))


def test_settings_without_effect_are_told() -> None:
    found = made(DENSE, 1, recipe(sp=True, vpp=1))
    assert not found.sp
    assert any("parallel.sp = true has no effect" in reason for reason in found.reasons)
    assert any("parallel.vpp = 1 has no effect" in reason for reason in found.reasons)
    for shape, asked in (
        (DENSE, recipe(recompute="selective")),
        (SPARSE, recipe(recompute="selective")),
        (SPARSE, recipe(ep=2, recompute="selective", options={"dispatch": "alltoall"})),
        (SPARSE, recipe(ep=2, recompute="selective", options={"dispatch": "weights"})),
    ):
        assert any("selective has no effect" in reason for reason in made(shape, 2, asked).reasons)
    assert not any("selective" in reason for reason in made(SPARSE, 2, recipe(ep=2, recompute="selective")).reasons)
    asked = recipe(ep=2, options={"dispatch": "alltoall", "exchange": "collectives", "exchange_pieces": 3})
    told = [reason for reason in made(SPARSE, 2, asked).reasons if "gathered" in reason]
    assert len(told) == 2 and "parallel.options.exchange_pieces has no effect" in told[1]
    asked = recipe(ep=2, options={"dispatch": "weights", "exchange": "collectives", "exchange_pieces": 3})
    (told,) = [reason for reason in made(SPARSE, 2, asked).reasons if "gathered" in reason]
    assert "parallel.options.exchange_pieces has no effect" in told
    told = [
        (DENSE, 1, {"dispatch": "weights"}),
        (SPARSE, 2, {"dispatch": "gather"}),
        (DENSE, 1, {"overlap": "parameters"}),
    ]
    for shape, ranks, options in told:
        (name,) = options
        (reason,) = [reason for reason in made(shape, ranks, recipe(options=options)).reasons if "no effect" in reason]
        assert f"parallel.options.{name}" in reason
    for ranks, pieces in ((2, recipe(ep=2, options={"exchange_pieces": 3})), (1, recipe())):
        assert not any("no effect" in reason for reason in made(SPARSE, ranks, pieces).reasons)
    found = made(DENSE, 4, recipe(tp=2), nodes=4)
    assert any("spans nodes of 1 device" in reason for reason in found.reasons)
    found = made(decoder_shape(), 2, recipe(tp=2))
    assert "embed is padded from 131 to 132 so that parallel.tp = 2 divides it" in found.reasons


# ---------------------------------------------------------------------------------------------------- auto
BIG = decoder_shape(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocabulary=128_000)
AUTO = {"tp": "auto", "pp": "auto", "cp": "auto", "ep": "auto"}


def test_auto_is_one_where_memory_is_unknown() -> None:
    found = made(BIG, 8, recipe({"seq_len": 32768}, **AUTO))
    assert (found.tp, found.pp, found.cp, found.ep, found.dp) == (1, 1, 1, 1, 8)
    assert any("unknown" in reason for reason in found.reasons)


def test_auto_takes_the_smallest_that_fits() -> None:
    long = {"seq_len": 4096, "global_batch": 64}
    degrees = {}
    for memory in (1000, 80, 40, 24):
        found = made(BIG, 64, recipe(long, **AUTO), memory=memory * GIB, nodes=8)
        assert found.memory["total"] <= 0.9 * memory * GIB
        assert found.tp <= 8
        degrees[memory] = found.tp * found.pp * found.cp
        assert any(f"parallel.tp = {found.tp}: smallest" in reason for reason in found.reasons)
    assert degrees[1000] == 1
    assert list(degrees.values()) == sorted(degrees.values()) and degrees[24] > degrees[80]
    assert made(BIG, 64, recipe(long, **AUTO), memory=24 * GIB, nodes=8).cp == 1, "rows are short"


def test_auto_spreads_experts_first() -> None:
    sparse = decoder_shape(layers=16, hidden=2048, heads=16, kv_heads=4, ffn=768, experts=64, vocabulary=32_000)
    found = made(sparse, 8, recipe({"seq_len": 2048}, **AUTO), memory=32 * GIB)
    assert found.ep > 1 and (found.tp, found.pp, found.cp) == (1, 1, 1)


def test_auto_cuts_long_rows() -> None:
    long = {"seq_len": 131_072, "global_batch": 8}
    found = made(BIG, 64, recipe(long, tp=8, pp=1, cp="auto", recompute="none"), memory=80 * GIB, nodes=8)
    assert found.cp > 1 and found.memory["total"] <= 0.9 * 80 * GIB


def test_auto_keeps_what_is_fixed_and_divides_the_batch() -> None:
    found = made(BIG, 8, recipe({"global_batch": 2}, tp="auto", pp=2), memory=1000 * GIB)
    assert found.pp == 2 and found.dp <= 2
    assert found.tp == 2, "only cutting tensors leaves few enough replicas for two rows"


def test_auto_that_never_fits_takes_what_needs_least_and_warns() -> None:
    found = made(BIG, 2, recipe(**AUTO), memory=GIB)
    assert any(reason.startswith("warning: the memory estimate") for reason in found.reasons)
    assert found.recompute == "full" and found.tp * found.pp == 2


def test_auto_without_any_valid_layout_names_the_problem() -> None:
    (problem,) = refused(DENSE, 7, recipe({"global_batch": 3}, tp="auto"))
    assert "data.global_batch = 3" in problem and "7" in problem


def test_recompute_auto_takes_the_first_that_fits() -> None:
    data, sparse = {"seq_len": 8192, "global_batch": 8}, decoder_shape(layers=32, hidden=1024, experts=8)
    for kind in ("none", "selective", "full"):
        needed = made(sparse, 8, recipe(data, ep=8, recompute=kind)).memory["total"]
        assert made(sparse, 8, recipe(data, ep=8), memory=int(needed / 0.9) + 2).recompute == kind
    assert made(sparse, 8, recipe(data, ep=8), memory=int(needed / 0.9) - 2).reasons[-1].startswith("warning")
    assert made(BIG, 8, recipe(recompute="selective"), memory=GIB).recompute == "selective"
    needed = made(BIG, 8, recipe(data, recompute="selective")).memory["total"]
    assert made(BIG, 8, recipe(data), memory=int(needed / 0.9) - 2).recompute == "full"


def test_selective_keeps_no_tokens_of_other_ranks() -> None:
    def saved(dispatch: str) -> int:
        none, selective = (
            made(SPARSE, 2, recipe(ep=2, recompute=kind, options={"dispatch": dispatch})).memory["activations"]
            for kind in ("none", "selective")
        )
        return none - selective

    assert saved("gather") - saved("alltoall") == 2 * SPARSE.hidden * SPARSE.layers * 64 * 2


@pytest.mark.parametrize(
    ("ranks", "parallel", "found"),
    [
        (2, {"ep": 2}, "gather: parallel.ep is 2, at most 8"),
        (2, {"ep": 2, "options": {"dispatch": "auto"}}, "gather: parallel.ep is 2, at most 8"),
        (16, {"ep": 16}, "alltoall: parallel.ep is 16, more than 8"),
        (4, {"tp": 2, "etp": 2}, "alltoall: experts are cut (parallel.etp is 2)"),
    ],
)
def test_what_dispatch_became_is_told(ranks: int, parallel: dict[str, Any], found: str) -> None:
    sparse = decoder_shape(experts=16)
    reasons = made(sparse, ranks, recipe({"global_batch": 16}, **parallel)).reasons
    assert f"parallel.options.dispatch = {found}" in reasons
    explicit = made(sparse, 2, recipe(ep=2, options={"dispatch": "weights"})).reasons
    assert not any("dispatch" in reason for reason in explicit)


def test_experts_that_travel_need_room_for_two_layers_and_keep_no_tokens() -> None:
    gathered, visiting, frozen = (
        made(SPARSE, 2, recipe(ep=2, options={"dispatch": dispatch}, model={"freeze": freeze})).memory
        for dispatch, freeze in (("gather", []), ("weights", []), ("weights", ["*.moe.*"]))
    )
    whole = sum(spec.size for spec in SPARSE.parameters if spec.expert is not None and spec.layer == 0)
    assert visiting["parameters"] - gathered["parameters"] == 2 * whole * 2
    assert visiting["gradients"] - gathered["gradients"] == 3 * whole * 4
    assert gathered["activations"] - visiting["activations"] == 2 * SPARSE.hidden * SPARSE.layers * 64 * 2
    assert frozen["parameters"] == visiting["parameters"]
    trained = sum(spec.size for spec in SPARSE.parameters if ".moe." not in spec.role)
    assert frozen["gradients"] == trained * 4


def test_tensor_parallelism_asks_for_one_queue() -> None:
    assert made(DENSE, 2, recipe(tp=2)).env == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert made(DENSE, 2, recipe()).env == {}


def test_frozen_parameters_need_no_optimizer() -> None:
    whole = made(DENSE, 1, recipe()).memory
    frozen = made(DENSE, 1, recipe(model={"freeze": ["*"]})).memory
    assert frozen["parameters"] == whole["parameters"] and frozen["gradients"] == frozen["optimizer"] == 0


def test_671b_over_512_ranks() -> None:
    shape = decoder_shape(
        layers=61,
        hidden=7168,
        heads=128,
        kv_heads=128,
        ffn=2048,
        experts=256,
        top_k=8,
        vocabulary=129_280,
        dense_layers=3,
    )
    assert shape.layers * 256 * 2 < len(shape.parameters) + 2000
    found = made(shape, 512, recipe({"seq_len": 4096, "global_batch": 2048}, **AUTO), memory=141 * GIB, nodes=64)
    assert found.parameters > 600e9 and found.memory["total"] <= 0.9 * 141 * GIB
    assert found.ep > 1


@settings(deadline=None, max_examples=60)
@given(
    tp=st.sampled_from([1, 2, 3, "auto"]),
    pp=st.sampled_from([1, 2, 3, "auto"]),
    cp=st.sampled_from([1, 2, "auto"]),
    ep=st.sampled_from([1, 2, 3, "auto"]),
    devices=st.integers(1, 24),
    experts=st.sampled_from([0, 6]),
    seq_len=st.integers(16, 72),
    batch=st.integers(1, 24),
    memory=st.sampled_from([0, 2**20, 2**30]),
)
def test_a_plan_is_whole_or_refused(
    tp: Any, pp: Any, cp: Any, ep: Any, devices: int, experts: int, seq_len: int, batch: int, memory: int
) -> None:
    shape = decoder_shape(experts=experts, tied=True)
    asked = recipe({"seq_len": seq_len, "global_batch": batch}, tp=tp, pp=pp, cp=cp, ep=ep)
    before = asked.model_dump()
    try:
        found = made(shape, devices, asked, memory)
    except RecipeError as error:
        assert error.problems and error.exit_code == 2
        return
    assert asked.model_dump() == before and found == made(shape, devices, asked, memory)
    assert found.tp * found.pp * found.cp * found.dp == devices
    assert devices % (found.etp * found.ep * found.pp) == 0
    assert found.micro_batches * found.micro_batch * found.dp == batch
    assert sorted(layer for stage in found.stages for layer in stage) == list(range(shape.layers))
    assert found.sp == (found.tp > 1)
    if found.cp > 1:
        assert seq_len % (2 * found.cp) == 0
    if found.sp:
        assert seq_len % (found.tp * found.cp) == 0
    assert all(getattr(found, name) == value for name, value in [("tp", tp), ("pp", pp), ("ep", ep)] if value != "auto")


def test_descriptor_and_choice() -> None:
    assert [row.name for row in PLANNERS] == ["megatron", "torch"]
    assert choose_planner(recipe(), Cluster()) == "megatron"


def test_planning_side_imports_no_tensor_library() -> None:
    train = ("train.schedule", "train.metrics", "train.watch", "train.report")
    modules = ("parallel.plan", "parallel.torch_plan", "cluster", "launch", "log", "testing.shapes", *train)
    code = f"import sys, {', '.join(f'loong_core.{name}' for name in modules)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "megatron", "transformers"} & set(loaded)


def test_copies_need_gpus_and_whole_layers() -> None:
    (problem,) = refused(SPARSE, 2, recipe(ep=2, options={"exchange": "copies"}))
    assert "exchange = copies on the backend cpu" in problem and "auto, collectives" in problem
    assert made(SPARSE, 2, recipe(options={"exchange": "copies"})).ep == 1  # nothing travels
