"""`loong plan`: everything `loong train` does before the first worker, printed; it needs neither GPU nor weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from loong_core.cli import output
from loong_core.cli.train import Overrides, RecipeName

if TYPE_CHECKING:
    from loong_core.types import ParallelPlan
    from loong_core.validate import Prepared


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show layout, memory and ops of a recipe.

    Nothing is started. Devices that are not here may be planned for: launch.nodes and launch.devices say how many.

    \b
    Examples:
      loong plan quickstart
      loong plan recipe.yaml launch.nodes=64 launch.devices=8 backend=cuda --json
    """
    from loong_core import recipe_load, registry, run_folder, validate

    plugins = registry.open_registry()
    prepared = validate.prepare(recipe_load.read(recipe, overrides or [], plugins), plugins, purpose="plan")
    if json:
        record = run_folder.plan_record(prepared)
        output.as_json({**record, "notes": prepared.notes, "recipe": recipe_load.to_mapping(prepared.recipe)})
        return
    _print(prepared)


def _print(prepared: Prepared) -> None:
    made, cluster, shape, recipe = prepared.plan, prepared.cluster, prepared.shape, prepared.recipe
    sequence = " with sequence parallelism" if made.sp else ""
    memory = f", {output.memory(cluster.memory)} each" if cluster.memory else ", memory unknown"
    tokens = f"; {recipe.data.seq_len} tokens a row" if prepared.task.counts == "tokens" else ""
    devices = f"{cluster.nodes} x {cluster.devices_per_node} {cluster.backend}"
    output.pairs(
        [
            ("model", f"{prepared.family.name}: {output.count(made.parameters)} parameters ({made.parameters:,})"),
            ("", f"{shape.layers} layers, hidden {shape.hidden}, vocabulary {shape.vocabulary:,}"),
            ("devices", f"{devices}{f' ({cluster.device_name})' if cluster.device_name else ''}{memory}"),
            ("planner", made.planner),
            ("mesh", f"tp {made.tp}{sequence}, pp {made.pp}, vpp {made.vpp}, cp {made.cp}, dp {made.dp}"),
            ("experts", f"ep {made.ep}, etp {made.etp}"),
            ("batch", f"{recipe.data.global_batch} rows = {made.dp} replicas x {made.micro_batches} micro-batches x "
                      f"{made.micro_batch}{tokens}"),
            ("recompute", made.recompute),
            ("FLOPs", f"{output.count(made.flops_per_step)} per step{_step_time(made, cluster.peak_flops)}"),
            ("precision", f"{prepared.precision.name} ({prepared.precision.summary})".replace(" ()", "")),
        ]
    )  # fmt: skip
    output.say()
    _print_stages(made)
    output.say()
    output.table(
        ("memory of the fullest rank", "estimate"), [(name, output.memory(size)) for name, size in made.memory.items()]
    )
    output.say()
    output.table(
        ("op", "implementation", "why"), [(choice.op, choice.name, choice.reason) for choice in prepared.ops.values()]
    )
    output.say()
    output.say("choices")
    for note in prepared.notes:
        output.say(f"  {note}")


def _step_time(made: ParallelPlan, peak: float) -> str:
    if not peak:
        return ""
    return f", {made.flops_per_step / (peak * made.world):.3g} s at the peak of {output.count(peak)} FLOP/s a device"


def _print_stages(made: ParallelPlan) -> None:
    """One line per pipeline stage: its layers (virtual chunks in order) and what each of its ranks holds."""
    rows = []
    for stage in range(made.pp):
        chunks = [made.stages[index] for index in range(stage, len(made.stages), made.pp)]
        parameters = made.parameters_per_rank[stage] if stage < len(made.parameters_per_rank) else 0
        rows.append((str(stage), f"{parameters:,}", " + ".join(_range(chunk) for chunk in chunks)))
    output.table(("stage", "parameters per rank", "layers"), rows)


def _range(layers: tuple[int, ...]) -> str:
    if len(layers) < 2:
        return str(layers[0]) if layers else "none"
    return f"{layers[0]}-{layers[-1]}"
