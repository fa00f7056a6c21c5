"""The megatron planner: a pure function from model, recipe and cluster to a resolved layout; runs on a laptop.

What the recipe leaves to `auto` is searched, smallest model parallelism first, with the memory estimate as the test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, product

from loong_core.errors import RecipeError
from loong_core.parallel.layout import Count, Degrees, Inventory, split_layers
from loong_core.parallel.memory import RECOMPUTE, Recompute, estimate
from loong_core.parallel.options import WIDEST_GATHER, Way, way
from loong_core.parallel.rules import allowed, divisors_of, problems
from loong_core.recipe import Recipe
from loong_core.types import Cluster, ModelShape, ParallelPlan, ParallelPlanner, PrecisionPolicy

USABLE = 0.9
"""Share of a device's memory that an estimate may fill."""
LONG_SEQUENCE = 16384
"""Tokens per row from which `parallel.cp: auto` may cut rows."""
WIDEST_TENSOR_PARALLEL = 8
"""Largest `tp` that `auto` takes: beyond it the shards of common layers are too thin to be worth their messages."""

PLANNERS: tuple[ParallelPlanner, ...] = (
    ParallelPlanner(
        name="megatron",
        plan="loong_core.parallel.plan:plan",
        build="loong_core.parallel.megatron:build",
        options="loong_core.parallel.options:MegatronOptions",
        summary="Tensor, sequence, pipeline, context, expert and data parallelism on megatron-core.",
    ),
    ParallelPlanner(
        name="torch",
        plan="loong_core.parallel.torch_plan:plan",
        build="loong_core.parallel.torch_engine:build",
        options="loong_core.parallel.torch_options:TorchOptions",
        summary="Data parallelism in plain torch: whole models, or sharded (ZeRO-1, FSDP2, HSDP).",
    ),
)


def choose_planner(recipe: Recipe, cluster: Cluster) -> str:
    """The planner behind `parallel.planner: auto`, for families that ask for none."""
    return "megatron"


def plan(shape: ModelShape, recipe: Recipe, cluster: Cluster, precision: PrecisionPolicy) -> ParallelPlan:
    """Resolve a recipe's parallel section for a model on a cluster.

    `parameters` counts the model once, without padding. `parameters_per_rank[i]` is what each rank of pipeline stage
    i holds: vocabulary padding and the copy of a tied embedding on the last stage included. `memory` is the estimate
    for the fullest rank, in bytes.

    Raises:
        RecipeError: with every problem of the layout at once.
    """
    inventory = Inventory(shape, recipe.model.freeze)
    failures = []
    tried: list[_Trial] = []
    chosen: _Trial | None = None
    for _, cut in groupby(_candidates(shape, recipe, cluster, inventory), key=lambda it: (it.tp, it.pp, it.cp)):
        fitting = []
        for degrees in cut:
            if found := problems(shape, recipe, cluster, degrees, inventory):
                failures.append(found)
                continue
            tried.append(_try(shape, recipe, cluster, precision, degrees, inventory))
            fitting += tried[-1:] if tried[-1].fits else []
        if fitting:
            # Spreading experts further costs less than computing layers again.
            chosen = min(fitting, key=lambda trial: RECOMPUTE.index(trial.recompute))
            break
    if not tried:
        raise RecipeError(min(failures, key=len))
    chosen = chosen or min(tried, key=lambda trial: trial.memory["total"])
    return _finish(shape, recipe, cluster, inventory, chosen)


@dataclass(frozen=True)
class _Trial:
    degrees: Degrees
    stages: tuple[tuple[int, ...], ...]
    per_rank: tuple[int, ...]
    micro_batches: int
    recompute: Recompute
    memory: dict[str, int]
    fits: bool


def _try(
    shape: ModelShape,
    recipe: Recipe,
    cluster: Cluster,
    precision: PrecisionPolicy,
    degrees: Degrees,
    inventory: Inventory,
) -> _Trial:
    """Estimate one valid layout under the fastest recomputation that fits, or the leanest if none does."""
    section, data = recipe.parallel, recipe.data
    stages = split_layers(shape.layers, degrees.pp, degrees.vpp, section.layout)
    counts = inventory.per_stage(degrees, stages)
    micro_batches = data.global_batch // (data.micro_batch * degrees.dp)
    options: tuple[Recompute, ...] = RECOMPUTE if section.recompute == "auto" else (section.recompute,)
    budget = cluster.memory * USABLE if cluster.memory else float("inf")
    # On a CPU no implementation but the reference runs.
    fused_loss = cluster.backend != "cpu" and recipe.ops.get("linear_cross_entropy") != "torch"
    tokens = data.micro_batch * data.seq_len
    fixed = shape, degrees, stages, counts, precision, tokens, micro_batches
    visiting = inventory.experts_of_a_layer if _way(recipe, degrees, inventory) == "weights" else Count()
    for recompute in options:
        exchanged = _exchanged(shape, recipe, degrees, inventory, recompute)
        memory = estimate(*fixed, recompute, fused_loss, exchanged, visiting)
        fits = memory["total"] <= budget
        if fits:
            break
    per_rank = tuple(count.total for count in counts)
    return _Trial(degrees, stages, per_rank, micro_batches, recompute, memory, fits)


def _exchanged(
    shape: ModelShape, recipe: Recipe, degrees: Degrees, inventory: Inventory, recompute: Recompute
) -> float:
    """Elements per token and layer that are kept of tokens which came from other ranks for their experts."""
    if degrees.ep * degrees.etp == 1:
        return 0.0
    copies = {
        "local": 0,
        "weights": 0,
        "gather": 0 if recompute == "selective" else degrees.ep,  # gathered again, or everybody's tokens
        "alltoall": 2 * shape.experts_per_token,  # what a token's experts get and give
    }
    return inventory.sparse_share * copies[_way(recipe, degrees, inventory)] * shape.hidden


def _way(recipe: Recipe, degrees: Degrees, inventory: Inventory) -> Way:
    """How tokens meet experts that other ranks hold."""
    if not inventory.experts:
        return "local"
    return way(str(recipe.parallel.options.get("dispatch", "auto")), degrees.ep, degrees.etp)


# ------------------------------------------------------------------------------------------------ auto
def _candidates(shape: ModelShape, recipe: Recipe, cluster: Cluster, inventory: Inventory) -> Iterator[Degrees]:
    """Layouts to try, in order of preference: few ranks per replica first; among equals experts are spread before
    tensors are cut, tensors within a node before pipeline stages, and rows last."""
    section = recipe.parallel
    world, unknown = cluster.world, not cluster.memory
    choices: dict[str, list[int]] = {}
    for degree in ("tp", "pp", "cp", "ep"):
        value = getattr(section, degree)
        if value != "auto":
            choices[degree] = [value]
        elif unknown:
            choices[degree] = [1]
    within_node = min(WIDEST_TENSOR_PARALLEL, cluster.devices_per_node)
    choices.setdefault("tp", [tp for tp in allowed(shape, "tp", world) if cluster.devices_per_node % tp == 0])
    if section.tp == "auto":
        choices["tp"] = [tp for tp in choices["tp"] if tp <= within_node]
    choices.setdefault("pp", divisors_of(world, shape.layers))
    long = recipe.data.seq_len > LONG_SEQUENCE
    choices.setdefault("cp", [cp for cp in divisors_of(world) if cp & (cp - 1) == 0] if long else [1])
    choices.setdefault("ep", allowed(shape, "ep", world) if inventory.experts else [1])
    if section.pp == "auto" and (section.vpp or 1) > 1:
        # Virtual chunks were asked for, so there shall be stages.
        choices["pp"] = [pp for pp in choices["pp"] if pp > 1] or [1]
    ordered = sorted(
        product(choices["tp"], choices["pp"], choices["cp"], choices["ep"]),
        key=lambda degrees: (degrees[0] * degrees[1] * degrees[2], degrees[2], degrees[1], degrees[0], degrees[3]),
    )
    for tp, pp, cp, ep in ordered:
        etp = section.etp if section.etp is not None else (1 if inventory.experts else tp)
        sp = tp > 1 and section.sp is not False
        yield Degrees(world=world, tp=tp, sp=sp, pp=pp, vpp=section.vpp or 1, cp=cp, ep=ep, etp=etp)


# --------------------------------------------------------------------------------------------- the result
def _finish(shape: ModelShape, recipe: Recipe, cluster: Cluster, inventory: Inventory, chosen: _Trial) -> ParallelPlan:
    degrees, data = chosen.degrees, recipe.data
    # Without experts an expert degree describes nothing: megatron-core then wants it equal to tp.
    degrees = degrees if inventory.experts else replace(degrees, etp=degrees.tp)
    return ParallelPlan(
        planner="megatron",
        world=cluster.world,
        tp=degrees.tp,
        sp=degrees.sp,
        pp=degrees.pp,
        vpp=degrees.vpp,
        cp=degrees.cp,
        ep=degrees.ep,
        etp=degrees.etp,
        dp=degrees.dp,
        stages=chosen.stages,
        micro_batch=data.micro_batch,
        micro_batches=chosen.micro_batches,
        recompute=chosen.recompute,
        parameters=inventory.total,
        parameters_per_rank=chosen.per_rank,
        memory=chosen.memory,
        flops_per_step=shape.train_flops(data.global_batch * data.seq_len, data.seq_len),
        reasons=tuple(_reasons(shape, recipe, cluster, inventory, chosen)),
        options=dict(recipe.parallel.options),
        # One hardware queue keeps communication kernels in launch order, which megatron-core's tensor parallelism
        # relies on. Without it what runs on a stream beside another is not to wait for that one.
        env={"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if degrees.tp > 1 else {},
    )


def gib(size: float) -> str:
    """Bytes in binary units, for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _reasons(
    shape: ModelShape, recipe: Recipe, cluster: Cluster, inventory: Inventory, chosen: _Trial
) -> Iterator[str]:
    """Why each `auto` became what it is, and which settings have no effect or a cost."""
    section, degrees = recipe.parallel, chosen.degrees
    total, budget = gib(chosen.memory["total"]), f"{USABLE:.0%} of {gib(cluster.memory)}"
    because = f"smallest model parallelism whose estimate, {total}, fits {budget}"
    if not cluster.memory:
        because = "the memory of a device is unknown"
    elif not chosen.fits:
        because = f"no layout fits {budget}; this one needs least"
    for degree in ("tp", "pp", "cp", "ep"):
        if getattr(section, degree) == "auto":
            yield f"parallel.{degree} = {getattr(degrees, degree)}: {because}"
    if section.sp == "auto" and degrees.sp:
        yield f"parallel.sp = true: on where parallel.tp > 1 (it is {degrees.tp})"
    if section.sp is True and not degrees.sp:
        yield "warning: parallel.sp = true has no effect where parallel.tp is 1: off"
    if section.vpp == 1:
        yield "warning: parallel.vpp = 1 has no effect"
    settings, met = recipe.parallel.options, _way(recipe, degrees, inventory)
    if inventory.experts and degrees.ep * degrees.etp > 1 and settings.get("dispatch", "auto") == "auto":
        yield f"parallel.options.dispatch = {met}: {_dispatch_reason(degrees)}"
    if settings.get("dispatch", "auto") != "auto" and (not inventory.experts or degrees.ep * degrees.etp == 1):
        yield "warning: parallel.options.dispatch has no effect where every rank holds all experts, or there are none"
    if settings.get("overlap") == "parameters" and degrees.dp * degrees.cp == 1:
        yield "warning: parallel.options.overlap = parameters has no effect without data parallelism"
    if "exchange" in settings and met not in ("gather", "weights"):
        yield "warning: parallel.options.exchange has no effect where neither tokens nor experts are gathered"
    if "exchange_pieces" in settings and met != "gather":
        yield "warning: parallel.options.exchange_pieces has no effect where no tokens are gathered for experts"
    if section.recompute == "selective" and met != "gather":
        yield "warning: parallel.recompute = selective has no effect where no tokens are gathered for experts"
    if section.recompute == "auto":
        yield f"parallel.recompute = {chosen.recompute}: {_recompute_reason(cluster, chosen, total, budget)}"
    if cluster.memory and not chosen.fits:
        yield (
            f"warning: the memory estimate of {total} is more than {budget}; raise parallel.tp, pp, cp or ep, or lower "
            "data.micro_batch or data.seq_len"
        )
    if degrees.tp > cluster.devices_per_node:
        yield (
            f"warning: parallel.tp = {degrees.tp} spans nodes of {cluster.devices_per_node} devices; tensor "
            "parallelism across machines is slow"
        )
    for group in (*inventory.first, *inventory.last):
        if group.padded and group.axis is not None:
            missing = -group.shape[group.axis] % (degrees.tp * group.blocks)
            if missing:
                yield (
                    f"{group.role} is padded from {group.shape[group.axis]} to {group.shape[group.axis] + missing} so "
                    f"that parallel.tp = {degrees.tp} divides it"
                )


def _dispatch_reason(degrees: Degrees) -> str:
    if degrees.etp > 1:
        return f"experts are cut (parallel.etp is {degrees.etp})"
    few = degrees.ep <= WIDEST_GATHER
    return f"parallel.ep is {degrees.ep}, {'at most' if few else 'more than'} {WIDEST_GATHER}"


def _recompute_reason(cluster: Cluster, chosen: _Trial, total: str, budget: str) -> str:
    if not cluster.memory:
        return "the memory of a device is unknown"
    if not chosen.fits:
        return f"nothing fits {budget}, this needs least"
    return f"first of {', '.join(RECOMPUTE)} whose estimate, {total}, fits {budget}"
