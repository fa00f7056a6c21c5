"""The torch planner: every rank is a replica; what is left to decide is what the replicas share out among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from loong_core.errors import RecipeError
from loong_core.parallel.memory import dtype_bytes
from loong_core.parallel.plan import USABLE, gib
from loong_core.parallel.rules import divisors_of, neighbours, words
from loong_core.parallel.torch_options import Shard, TorchOptions
from loong_core.recipe import Recipe
from loong_core.types import Cluster, ModelShape, ParallelPlan, PrecisionPolicy

SAMPLE_TOKENS = "sample_tokens"
"""Field of a `ModelShape` with the tokens its layers see of one sample, for models whose rows are not
`data.seq_len` tokens."""
DEGREES = ("tp", "pp", "cp", "ep")


@dataclass(frozen=True)
class _Trial:
    shard: Shard
    recompute: str
    memory: Mapping[str, int]
    fits: bool


def plan(shape: ModelShape, recipe: Recipe, cluster: Cluster, precision: PrecisionPolicy) -> ParallelPlan:
    """Resolve a recipe's parallel section: what is shared out, and whether activations are computed again.

    `memory` is the estimate for a rank in bytes. `options` of the plan hold the resolved `shard` and `shard_size`.

    Raises:
        RecipeError: with every problem of the layout at once.
    """
    options = TorchOptions(**recipe.parallel.options)
    found = [*_refused(recipe), *_batch(recipe, cluster), *_sharding(options, cluster)]
    if found:
        raise RecipeError(found)
    parameters = sum(_counts(shape, recipe))
    trials = [
        _try(shape, recipe, cluster, precision, options, shard, recompute)
        for recompute in _recomputes(recipe)
        for shard in _shards(options, cluster)
    ]
    chosen = next((trial for trial in trials if trial.fits), None)
    chosen = chosen or min(trials, key=lambda trial: trial.memory["total"])
    data = recipe.data
    tokens = _tokens(shape, recipe)
    return ParallelPlan(
        planner="torch",
        world=cluster.world,
        dp=cluster.world,
        stages=(tuple(range(shape.layers)),),
        micro_batch=data.micro_batch,
        micro_batches=data.global_batch // (data.micro_batch * cluster.world),
        recompute="full" if chosen.recompute == "full" else "none",
        parameters=parameters,
        parameters_per_rank=(_held(parameters, chosen.shard, options, cluster),),
        memory=chosen.memory,
        flops_per_step=shape.train_flops(data.global_batch * tokens, tokens),
        reasons=tuple(_reasons(recipe, cluster, options, chosen)),
        options={
            **options.model_dump(),
            "shard": chosen.shard,
            "shard_size": _size(chosen.shard, options, cluster),
        },
        # NCCL goes before all else, or ranks would wait for each other behind a CUDA graph that leaves no room.
        env={"TORCH_NCCL_HIGH_PRIORITY": "1"},
    )


# ------------------------------------------------------------------------------------------------ what is refused
def _refused(recipe: Recipe) -> Iterator[str]:
    section = recipe.parallel
    for degree in DEGREES:
        value = getattr(section, degree)
        if value not in (1, "auto"):
            yield (
                f"parallel.{degree} = {value}: the torch planner keeps every layer whole on every rank; allowed here "
                f"1; remove parallel.{degree}, or set parallel.planner to one that cuts layers"
            )
    for name, wanted in (("etp", (None, 1)), ("vpp", (None, 1)), ("layout", (None,)), ("sp", (False, "auto"))):
        value = getattr(section, name)
        if value not in wanted:
            yield (
                f"parallel.{name} = {value}: the torch planner has no tensor parallelism and no pipeline stages; "
                f"allowed here {'false' if name == 'sp' else 'null'}; remove parallel.{name}"
            )
    if section.components:
        names = ", ".join(sorted(section.components))
        yield (
            f"parallel.components = {names}: the torch planner lays out one model as a whole; allowed here {{}}; "
            "remove parallel.components"
        )
    if section.recompute == "selective":
        yield (
            "parallel.recompute = selective: the torch planner computes whole units again, or nothing; allowed here "
            "none, full, auto; choose one of them"
        )


def _batch(recipe: Recipe, cluster: Cluster) -> Iterator[str]:
    rows, micro = recipe.data.global_batch, recipe.data.micro_batch
    unit = micro * cluster.world
    if rows % unit:
        yield (
            f"data.global_batch = {rows} is not divisible by data.micro_batch x ranks = {micro} x {cluster.world} = "
            f"{unit}: allowed here multiples of {unit}, such as {neighbours(rows, unit)}; change data.global_batch or "
            "data.micro_batch"
        )


def _sharding(options: TorchOptions, cluster: Cluster) -> Iterator[str]:
    size = options.shard_size
    if size is not None and cluster.world > 1 and cluster.world % size:
        yield (
            f"parallel.options.shard_size = {size} does not divide {cluster.world} ranks: allowed here "
            f"{words(divisors_of(cluster.world))}; change it"
        )
    if options.export == "ema" and options.ema is None:
        yield (
            "parallel.options.export = ema: there is no moving average; allowed here weights; set parallel.options.ema "
            "to a decay such as 0.999, or remove parallel.options.export"
        )


# ---------------------------------------------------------------------------------------------------------- choices
def _shards(options: TorchOptions, cluster: Cluster) -> list[Shard]:
    """From least to most sharding. On one rank there is nobody to share with."""
    if cluster.world == 1:
        return ["none"]
    if options.shard != "auto":
        return [options.shard]
    groups: list[Shard] = ["hybrid"] if 1 < _size("hybrid", options, cluster) < cluster.world else []
    # Sharding the optimizer's state costs nothing: reducing and gathering send less than all-reducing in float32.
    return ["optimizer", *groups, "full"]


def _recomputes(recipe: Recipe) -> list[str]:
    wanted = recipe.parallel.recompute
    return ["none", "full"] if wanted == "auto" else [wanted]


def _size(shard: str, options: TorchOptions, cluster: Cluster) -> int:
    """Ranks that share one copy of parameters and gradients."""
    if shard == "hybrid":
        return options.shard_size or cluster.devices_per_node
    return cluster.world if shard == "full" else 1


def _held(parameters: int, shard: str, options: TorchOptions, cluster: Cluster) -> int:
    return -(-parameters // _size(shard, options, cluster))


def _tokens(shape: ModelShape, recipe: Recipe) -> int:
    return int(shape.fields.get(SAMPLE_TOKENS, recipe.data.seq_len))


def _try(
    shape: ModelShape,
    recipe: Recipe,
    cluster: Cluster,
    precision: PrecisionPolicy,
    options: TorchOptions,
    shard: Shard,
    recompute: str,
) -> _Trial:
    memory = estimate(shape, recipe, precision, options, shard, _size(shard, options, cluster), cluster.world)
    memory["activations"] = _activations(shape, recipe, precision, recompute)
    memory["total"] = sum(memory.values())
    budget = cluster.memory * USABLE if cluster.memory else float("inf")
    return _Trial(shard, recompute, memory, memory["total"] <= budget)


def estimate(
    shape: ModelShape,
    recipe: Recipe,
    precision: PrecisionPolicy,
    options: TorchOptions,
    shard: Shard,
    size: int,
    world: int,
) -> dict[str, int]:
    """Bytes on a rank, by use, without activations. `size` ranks share a copy of the model.

    Whole parameters have gradients in float32 beside them; AdamW's moments and the remainders of master weights lie
    on all ranks (none) or one (optimizer). Sharded ones are masters themselves, with their gradients; beside them there
    is room for the two largest units (the one that is computed and the next one) and for one unit's gradients. Source:
    the stages of Rajbhandari et al. 2020 (arXiv 1910.02054).
    """
    trained, frozen = _counts(shape, recipe)
    small, wide = dtype_bytes(precision.parameters), dtype_bytes(precision.master)
    state = 2 * dtype_bytes(precision.optimizer_state)
    average = 4 if options.ema is not None else 0
    if shard in ("none", "optimizer"):
        part = trained if shard == "none" else -(-trained // world)
        return {
            "parameters": (trained + frozen) * small,
            "gradients": trained * dtype_bytes(precision.gradients),
            "master": part * max(0, wide - small),
            "optimizer": part * state,
            **({"ema": part * average} if average else {}),
        }
    unit = _largest_unit(shape)
    part = -(-trained // size)
    return {
        "parameters": -(-frozen // size) * small + 2 * unit * small,
        "gradients": part * wide + unit * dtype_bytes(precision.gradients),
        "master": part * wide,
        "optimizer": part * state,
        **({"ema": part * average} if average else {}),
    }


def _counts(shape: ModelShape, recipe: Recipe) -> tuple[int, int]:
    """Elements that are trained, and that are not."""
    trained = frozen = 0
    for spec in shape.parameters:
        if spec.frozen or any(fnmatchcase(spec.role, pattern) for pattern in recipe.model.freeze):
            frozen += spec.size
        else:
            trained += spec.size
    return trained, frozen


def _largest_unit(shape: ModelShape) -> int:
    """Elements of the largest layer, or of what lies outside layers: that stays whole through a pass."""
    units: Counter[int] = Counter()
    for spec in shape.parameters:
        units[-1 if spec.layer is None else spec.layer] += spec.size
    return max(units.values(), default=0)


def _activations(shape: ModelShape, recipe: Recipe, precision: PrecisionPolicy, recompute: str) -> int:
    """Bytes kept of one micro-batch: of every layer what its backward needs, or its input and one layer in full; and
    the logits of models with a vocabulary that predict words."""
    tokens = recipe.data.micro_batch * _tokens(shape, recipe)
    layer = shape.activation_sharded + shape.activation_replicated
    elements = shape.layers * layer if recompute == "none" else shape.layers * shape.hidden + layer
    return int(tokens * elements * dtype_bytes(precision.activations))


# ---------------------------------------------------------------------------------------------------------- reasons
def _reasons(recipe: Recipe, cluster: Cluster, options: TorchOptions, chosen: _Trial) -> Iterator[str]:
    total, budget = gib(chosen.memory["total"]), f"{USABLE:.0%} of {gib(cluster.memory)}"
    fitting = f"the least sharding whose estimate, {total}, fits {budget}"
    if not cluster.memory:
        fitting = "the memory of a device is unknown"
    elif not chosen.fits:
        fitting = f"nothing fits {budget}; this needs least"
    if cluster.world == 1:
        if options.shard not in ("auto", "none"):
            yield f"warning: parallel.options.shard = {options.shard} has no effect on one device: none"
    elif options.shard == "auto":
        yield f"parallel.options.shard = {chosen.shard}: {fitting}"
    if options.shard_size is not None and chosen.shard != "hybrid":
        yield f"warning: parallel.options.shard_size = {options.shard_size} has no effect with shard = {chosen.shard}"
    if recipe.parallel.recompute == "auto":
        yield f"parallel.recompute = {chosen.recompute}: {fitting}"
    if cluster.memory and not chosen.fits:
        yield (
            f"warning: the memory estimate of {total} is more than {budget}; lower data.micro_batch, set "
            "parallel.recompute to full, or use more devices"
        )
    if cluster.backend == "cpu":
        for name in ("compile", "cuda_graph"):
            if getattr(options, name):
                yield f"warning: parallel.options.{name} = true has no effect on the cpu backend"
    if chosen.shard in ("full", "hybrid"):
        for name in ("ahead",) if cluster.backend == "cpu" else ("cuda_graph", "ahead"):
            if getattr(options, name):
                yield (
                    f"warning: parallel.options.{name} = true has no effect with shard = {chosen.shard}: parameters "
                    "are gathered anew in every pass"
                )
