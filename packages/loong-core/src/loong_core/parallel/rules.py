"""What a layout must satisfy to run on megatron-core, each rule with the number, what is allowed and the remedy.

megatron-core checks some of these late, some in one class only, and some not at all (a pipeline of virtual chunks
with a rest of micro-batches fails in the first step), so all of them are checked here, before a worker starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import gcd, lcm

from loong_core.parallel.layout import Degrees, Inventory
from loong_core.recipe import Recipe
from loong_core.types import Cluster, ModelShape


def problems(shape: ModelShape, recipe: Recipe, cluster: Cluster, degrees: Degrees, inventory: Inventory) -> list[str]:
    """Everything that is wrong with a layout, in the order in which a user would mend it."""
    return [
        *_world(cluster, degrees),
        *_divisors(shape, degrees, inventory),
        *_experts(recipe, degrees, inventory),
        *_copies(recipe, cluster, degrees, inventory),
        *_pipeline(shape, recipe, degrees),
        *_sequence(recipe, degrees),
        *_batch(recipe, degrees),
        *_components(recipe),
    ]


def divisors_of(number: int, most: int | None = None) -> list[int]:
    """All divisors of `number` up to `most`, ascending."""
    return [value for value in range(1, min(number, most or number) + 1) if number % value == 0]


def words(values: Iterable[int]) -> str:
    """`1, 2, 4`, shortened in the middle when there are many."""
    texts = [str(value) for value in values]
    return ", ".join(texts if len(texts) <= 12 else [*texts[:8], "...", *texts[-2:]])


def neighbours(value: int, unit: int) -> str:
    """The multiples of `unit` around `value`."""
    below = value // unit * unit
    return " or ".join(str(multiple) for multiple in (below, below + unit) if multiple)


def allowed(shape: ModelShape, degree: str, world: int) -> list[int]:
    """Values of a degree that divide everything the model cuts by it, and the number of devices."""
    common = 0
    for divisor in shape.divisors:
        if divisor.degree == degree:
            common = gcd(common, divisor.value)
    return divisors_of(gcd(common, world), world)


def _devices(cluster: Cluster) -> str:
    nodes = f" on {cluster.nodes} nodes" if cluster.nodes > 1 else ""
    return f"{cluster.world} device{'s' if cluster.world > 1 else ''}{nodes}"


def _world(cluster: Cluster, degrees: Degrees) -> Iterator[str]:
    if cluster.world % degrees.model_parallel:
        yield (
            f"parallel.tp x parallel.pp x parallel.cp = {degrees.tp} x {degrees.pp} x {degrees.cp} = "
            f"{degrees.model_parallel} does not divide {_devices(cluster)}: allowed products here are "
            f"{words(divisors_of(cluster.world))}; lower a degree, or set launch.devices to a multiple of "
            f"{degrees.model_parallel}"
        )


def _divisors(shape: ModelShape, degrees: Degrees, inventory: Inventory) -> Iterator[str]:
    reported = set()
    for divisor in shape.divisors:
        value = getattr(degrees, divisor.degree)
        if value and divisor.value % value:
            reported.add(divisor.degree)
            fitting = words(allowed(shape, divisor.degree, degrees.world))
            yield (
                f"parallel.{divisor.degree} = {value} does not divide {divisor.value} {divisor.what}: "
                f"allowed here {fitting}"
            )
    # Families list their rules in the words of their own settings; a parameter that still cannot be cut is named here.
    for group in inventory.groups:
        degree = "etp" if group.expert else "tp"
        if group.axis is None or group.padded or degree in reported:
            continue
        if group.shape[group.axis] % (group.blocks * group.degree(degrees)):
            reported.add(degree)
            yield (
                f"parallel.{degree} = {group.degree(degrees)} cannot cut axis {group.axis} of {group.role}, "
                f"{group.shape[group.axis]} long in {group.blocks} blocks: allowed here "
                f"{words(divisors_of(group.shape[group.axis] // group.blocks, degrees.world))}"
            )
    for number in inventory.experts:
        if number % degrees.ep and "ep" not in reported:
            yield (
                f"parallel.ep = {degrees.ep} does not divide {number} experts: allowed here "
                f"{words(divisors_of(number, degrees.world))}"
            )


def _experts(recipe: Recipe, degrees: Degrees, inventory: Inventory) -> Iterator[str]:
    section = recipe.parallel
    if not inventory.experts:
        if degrees.ep > 1:
            yield f"parallel.ep = {degrees.ep}: this model has no experts; allowed here 1; remove parallel.ep"
        if section.etp is not None and section.etp != degrees.tp:
            yield (
                f"parallel.etp = {section.etp}: this model has no experts; allowed here null (or {degrees.tp}, "
                "as parallel.tp); remove parallel.etp"
            )
        return
    stage = degrees.world // degrees.pp
    if degrees.world % degrees.pp == 0 and stage % (degrees.etp * degrees.ep):
        yield (
            f"parallel.etp x parallel.ep = {degrees.etp} x {degrees.ep} = {degrees.etp * degrees.ep} does not divide "
            f"the {stage} devices of a pipeline stage ({degrees.world} devices / parallel.pp {degrees.pp}): allowed "
            f"products here are {words(divisors_of(stage))}; lower parallel.ep or parallel.etp"
        )
    if (dispatch := section.options.get("dispatch")) in ("gather", "weights") and degrees.etp > 1:
        yield (
            f"parallel.options.dispatch = {dispatch} with parallel.etp = {degrees.etp}: only whole experts meet tokens "
            "that way; allowed here auto, alltoall; set one of them, or parallel.etp to 1"
        )
    if degrees.tp > 1 and not degrees.sp:
        yield (
            f"parallel.sp = false with parallel.tp = {degrees.tp}: megatron-core trains mixture-of-experts layers "
            "under tensor parallelism only with sequence parallelism; allowed here true or auto; set parallel.sp to "
            "true, or parallel.tp to 1"
        )


def _copies(recipe: Recipe, cluster: Cluster, degrees: Degrees, inventory: Inventory) -> Iterator[str]:
    """Where copy engines can carry nothing, as far as it is known before ranks have met."""
    if recipe.parallel.options.get("exchange") != "copies" or not inventory.experts or degrees.ep == 1:
        return
    remedy = "allowed here auto, collectives; set one of them"
    if cluster.backend != "cuda":
        yield f"parallel.options.exchange = copies on the backend {cluster.backend}: only GPUs have engines; {remedy}"
    elif degrees.tp > 1:
        yield (
            f"parallel.options.exchange = copies with parallel.tp = {degrees.tp}: tensor parallelism has one queue for "
            f"all kernels, in which copies would hold up others; {remedy}, or parallel.tp to 1"
        )


def _pipeline(shape: ModelShape, recipe: Recipe, degrees: Degrees) -> Iterator[str]:
    layout = recipe.parallel.layout
    chunks = degrees.pp * degrees.vpp
    product = f"parallel.pp x parallel.vpp = {degrees.pp} x {degrees.vpp} = {chunks}"
    if degrees.vpp > 1 and degrees.pp == 1:
        yield (
            f"parallel.vpp = {degrees.vpp}: virtual chunks need pipeline stages and parallel.pp is 1; allowed here "
            "null; remove parallel.vpp, or set parallel.pp to 2 or more"
        )
        return
    if layout is not None:
        if len(layout) != chunks:
            yield (
                f"parallel.layout has {len(layout)} entries: allowed here {chunks}, one for each chunk ({product}); "
                "add or remove entries"
            )
        if sum(layout) != shape.layers:
            yield (
                f"parallel.layout adds up to {sum(layout)} layers: allowed here {shape.layers}, the layers of the "
                "model; change its entries"
            )
        if any(length < 1 for length in layout):
            yield f"parallel.layout has an entry of {min(layout)} layers: allowed are 1 or more; change that entry"
    elif degrees.vpp > 1 and shape.layers % chunks:
        fitting = [value for value in divisors_of(shape.layers) if value % degrees.pp == 0 and value > degrees.pp]
        values = words(value // degrees.pp for value in fitting) or f"none with parallel.pp = {degrees.pp}"
        yield (
            f"{product} does not divide {shape.layers} layers: parallel.vpp allowed here {values}; change parallel.vpp "
            "or parallel.pp, or give parallel.layout"
        )
    elif chunks > shape.layers:
        yield (
            f"parallel.pp = {degrees.pp} is more than {shape.layers} layers: allowed here 1 to {shape.layers}; lower "
            "parallel.pp"
        )


def _sequence(recipe: Recipe, degrees: Degrees) -> Iterator[str]:
    length = recipe.data.seq_len
    rules = []
    if degrees.cp > 1:
        rules.append((2 * degrees.cp, f"2 x parallel.cp = {2 * degrees.cp} (each rank holds two chunks of a row)"))
    if degrees.sp and degrees.tp > 1:
        unit, name = degrees.cp * degrees.tp, f"parallel.tp = {degrees.tp} (sequence parallelism)"
        if degrees.cp > 1:
            name = f"parallel.cp x parallel.tp = {degrees.cp} x {degrees.tp} = {unit} (sequence parallelism)"
        rules.append((unit, name))
    broken = [name for unit, name in rules if length % unit]
    if broken:
        unit = lcm(*(unit for unit, _ in rules))
        yield (
            f"data.seq_len = {length} is not divisible by {' nor by '.join(broken)}: allowed here multiples of {unit}, "
            f"such as {neighbours(length, unit)}; change data.seq_len, or lower parallel.cp or parallel.tp"
        )


def _batch(recipe: Recipe, degrees: Degrees) -> Iterator[str]:
    if degrees.world % degrees.model_parallel:
        return
    rows, micro = recipe.data.global_batch, recipe.data.micro_batch
    unit = micro * degrees.dp
    product = f"data.micro_batch x data-parallel ranks = {micro} x {degrees.dp} = {unit}"
    interleaved = degrees.vpp > 1 and degrees.pp > 1
    if rows % unit:
        yield (
            f"data.global_batch = {rows} is not divisible by {product}: allowed here multiples of "
            f"{unit * degrees.pp if interleaved else unit}, such as "
            f"{neighbours(rows, unit * degrees.pp if interleaved else unit)}; change data.global_batch or "
            "data.micro_batch, or give parallel.tp, pp or cp a larger share of the devices"
        )
    elif interleaved and rows // unit % degrees.pp:
        yield (
            f"data.global_batch = {rows} makes {rows // unit} micro-batches ({product}), which parallel.pp = "
            f"{degrees.pp} does not divide, as virtual chunks need: allowed here multiples of {unit * degrees.pp}, "
            f"such as {neighbours(rows, unit * degrees.pp)}; change data.global_batch, or remove parallel.vpp"
        )


def _components(recipe: Recipe) -> Iterator[str]:
    if recipe.parallel.components:
        names = ", ".join(sorted(recipe.parallel.components))
        yield (
            f"parallel.components = {names}: the megatron planner lays out one model as a whole; allowed here {{}}; "
            "remove parallel.components"
        )
