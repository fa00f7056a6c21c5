"""Everything `loong train` does before a worker starts, on a laptop and without a tensor library: choose, check, plan.

All problems of a recipe are reported together. `loong plan` stops here; workers repeat it on the resolved recipe, so
that parent and workers see the same facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from loong_core import cluster as clusters
from loong_core import ops, run_folder
from loong_core.errors import LoongError, NotFound, Unsupported, UserError
from loong_core.findings import Findings
from loong_core.ops import OpChoice
from loong_core.recipe import Recipe
from loong_core.recipe_load import LoadedRecipe, check_options
from loong_core.registry import Registry, resolve
from loong_core.types import (
    Backend,
    Cluster,
    ModelFamily,
    ModelShape,
    OpRequest,
    ParallelPlan,
    ParallelPlanner,
    PrecisionPolicy,
    Probe,
    Task,
)
from loong_core.validate_data import check_fit, check_match, check_source, unused_keys
from loong_core.validate_model import Model, find_model
from loong_core.validate_resume import check_resume

Purpose = Literal["train", "plan", "worker"]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is known of a run before it starts. `recipe` is resolved: no base, no auto, absolute paths. `notes` are
    choices and their reasons, for people."""

    recipe: Recipe
    cluster: Cluster
    backend: Backend
    precision: PrecisionPolicy
    family: ModelFamily
    config: dict[str, Any]
    shape: ModelShape
    task: Task
    planner: ParallelPlanner
    plan: ParallelPlan
    op_request: OpRequest
    ops: Mapping[str, OpChoice]
    notes: tuple[str, ...] = ()


class _Chosen(NamedTuple):
    """A backend with what it found, and why it was taken."""

    backend: Backend
    probe: Probe
    note: str


def prepare(loaded: LoadedRecipe, registry: Registry, worker: bool = False, purpose: Purpose = "train") -> Prepared:
    """Resolve and check a recipe.

    `purpose`: `plan` needs neither devices nor data, and leaves the run folder alone; `worker` (or `worker=True`)
    repeats the choices without looking at data, weights and folder again.

    Raises UserError with every problem found.
    """
    purpose = "worker" if worker else purpose
    recipe, findings = loaded.recipe, Findings(loaded)
    chosen = findings.attempt("backend", lambda: choose_backend(recipe.backend, registry, purpose))
    policy = findings.attempt("precision", lambda: registry.get("precision_policies", recipe.precision))
    if policy is not None and chosen is not None:
        findings.absorb("precision", _capability_problems(policy, chosen.backend))
    source = check_source(recipe, registry, findings, purpose)
    model = find_model(recipe, registry, findings, purpose)
    if model is not None and purpose == "train":
        check_resume(recipe, model, registry, findings)
    task = _find_task(recipe, model, registry, findings)
    if source is not None and task is not None and purpose == "train":
        check_match(source, task, findings)
    _check_names(recipe, registry, findings)
    if purpose == "train" and (problem := run_folder.name_problem(recipe.run.name)):
        findings.add("run.name", problem)
    # A wrong name must not hide the problems of the layout: checking goes on with another one.
    chosen = chosen or findings.attempt("backend", lambda: choose_backend("auto", registry, "plan"))
    policy = policy or next(iter(registry.table("precision_policies").values()), None)
    cluster = chosen and findings.attempt("launch", lambda: _cluster(chosen, recipe, policy, purpose))
    cluster = cluster or (chosen and findings.attempt("launch", lambda: _cluster(chosen, recipe, policy, "plan")))
    if chosen is None or cluster is None or policy is None:
        findings.raise_all()
    recipe = _with(recipe, backend=chosen.backend.name)
    if model is not None:
        recipe = _with(recipe, model={"family": model.family.name})
    if task is not None:
        recipe = _with(recipe, task={"name": task.name})
    findings.absorb("", findings.attempt("", lambda: registry.validate(recipe, cluster)) or [])
    notes = unused_keys(recipe, source) if source is not None else []
    if source is not None and model is not None and purpose == "train":
        check_fit(recipe, source, model, findings)
    recipe, note = _familys_planner(recipe, model)
    notes += [note] if note else []
    planner = _find_planner(recipe, cluster, registry, findings)
    if purpose == "train":
        findings.absorb("run.name", run_folder.problems(absolute_paths(recipe), model is not None and task is not None))
    if model is None or planner is None:
        findings.raise_all()
    recipe = _with(recipe, parallel={"planner": planner.name})
    notes = [chosen.note, *model.notes, *notes]
    return _plan(recipe, findings, registry, chosen.backend, cluster, policy, model, task, planner, notes)


def _plan(
    recipe: Recipe,
    findings: Findings,
    registry: Registry,
    backend: Backend,
    cluster: Cluster,
    policy: PrecisionPolicy,
    model: Model,
    task: Task | None,
    planner: ParallelPlanner,
    notes: Sequence[str],
) -> Prepared:
    """The last part of `prepare`: lay out the model, choose ops, resolve."""
    make = findings.attempt("parallel", lambda: resolve(planner.plan, f"planner {planner.name}"))
    doubtful = findings.suspect("parallel", "data", "model", "launch")
    plan = make and findings.attempt("parallel", lambda: make(model.shape, recipe, cluster, policy), doubtful)
    if plan is None:
        findings.raise_all()
    request = op_request(backend, policy, plan, model.shape, recipe)
    known = _known(recipe, registry)
    choices = findings.attempt("ops", lambda: ops.choose(registry.ops(), request, known, backend.capabilities))
    findings.raise_any()
    if task is None or choices is None:
        findings.raise_all()
    return Prepared(
        recipe=resolve_recipe(recipe, plan, cluster, choices),
        cluster=cluster,
        backend=backend,
        precision=policy,
        family=model.family,
        config=model.config,
        shape=model.shape,
        task=task,
        planner=planner,
        plan=plan,
        op_request=request,
        ops=choices,
        notes=(*notes, *plan.reasons),
    )


def choose_backend(name: str, registry: Registry, purpose: Purpose = "train") -> _Chosen:
    """The named backend, or the one of the highest priority whose probe finds devices.

    Raises NotFound for a name nobody provides, Unsupported with the probe's reason where it finds no device.
    """
    table = registry.table("backends")
    if name != "auto":
        backend = cast(Backend, registry.get("backends", name))
        probe = probe_of(backend)
        if probe.devices < 1 and purpose != "plan":
            able = [other.name for other in table.values() if other.name != name and probe_of(other).devices > 0]
            raise Unsupported(
                f"the backend {name!r} finds no device: {probe.reason or 'no reason given'}. Available here: "
                f"{', '.join(able) or 'none'}. Set backend to one of them, or see `loong doctor`."
            )
        note = f"backend: {name} (named in the recipe)"
        return _Chosen(backend, probe, note if probe.devices else f"{note}; no device here: {probe.reason}")
    passed: list[str] = []
    for backend in sorted(table.values(), key=lambda item: (-item.priority, item.name)):
        probe = probe_of(backend)
        if probe.devices > 0:
            because = f"; {'; '.join(passed)}" if passed else ""
            return _Chosen(backend, probe, f"backend: {backend.name} (auto: {_found(probe)}{because})")
        passed.append(f"{backend.name}: {probe.reason or 'no device'}")
    reasons = "; ".join(passed) or "none is installed"
    raise Unsupported(f"no backend finds a device ({reasons}). {registry.plugins.failures()}".rstrip())


def probe_of(backend: Backend) -> Probe:
    """What a backend finds; a probe that raises, which none may, finds nothing and says why."""
    try:
        return cast(Probe, resolve(backend.probe, f"backend {backend.name}")())
    except Exception as error:
        text = str(error) if isinstance(error, LoongError) else f"{type(error).__name__}: {error}"
        return Probe(devices=0, reason=f"its probe failed: {text}")


def op_request(
    backend: Backend, policy: PrecisionPolicy, plan: ParallelPlan, shape: ModelShape, recipe: Recipe
) -> OpRequest:
    """What op implementations are asked to serve in this run."""
    degrees = {name: int(getattr(plan, name)) for name in ("tp", "sp", "pp", "vpp", "cp", "ep", "etp", "dp")}
    fields = {**shape.fields, "dropout": recipe.model.dropout}
    return OpRequest(backend=backend.name, dtype=policy.activations, degrees=degrees, fields=fields)


def resolve_recipe(recipe: Recipe, plan: ParallelPlan, cluster: Cluster, choices: Mapping[str, OpChoice]) -> Recipe:
    """The recipe without `auto` and with absolute paths: runnable again, from anywhere, with the same choices."""
    degrees = {name: getattr(plan, name) for name in ("tp", "sp", "pp", "cp", "ep", "recompute")}
    return _with(
        absolute_paths(recipe),
        parallel=degrees,
        launch={"devices": cluster.devices_per_node, "nodes": cluster.nodes},
        ops={op: choice.name for op, choice in choices.items()},
    )


def absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with every path absolute, so that it means the same wherever it is run again."""
    model, data, resume = recipe.model, recipe.data, recipe.checkpoint.resume
    config = model.config
    if isinstance(config, str) and Path(config).exists():
        config = str(Path(config).absolute())
    resolved = _with(
        recipe,
        run={"dir": recipe.run.dir.absolute()},
        model={"weights": _absolute(model.weights), "config": config},
        data={"path": _absolute(data.path), "tokenizer": _absolute(data.tokenizer), "cache": _absolute(data.cache)},
        checkpoint={"resume": _absolute(resume)},
    )
    if data.eval is not None:
        held_out = data.eval.model_copy(update={"path": _absolute(data.eval.path)})
        resolved = _with(resolved, data={"eval": held_out})
    return resolved


def _found(probe: Probe) -> str:
    return f"{probe.devices} x {probe.device_name}" if probe.device_name else f"{probe.devices} found"


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    return value.absolute() if isinstance(value, Path) else value


def _with(recipe: Recipe, **changes: Any) -> Recipe:
    """A copy with keys of sections replaced."""
    update: dict[str, Any] = {}
    for name, value in changes.items():
        section = getattr(recipe, name)
        update[name] = section.model_copy(update=value) if hasattr(section, "model_copy") else value
    return recipe.model_copy(update=update)


def _capability_problems(policy: PrecisionPolicy, backend: Backend) -> list[str]:
    missing = sorted(policy.needs - backend.capabilities)
    if not missing:
        return []
    return [
        f"the policy {policy.name!r} needs {', '.join(missing)}, which the backend {backend.name!r} lacks (it has "
        f"{', '.join(sorted(backend.capabilities)) or 'nothing special'}). Choose another precision or backend."
    ]


def _find_task(recipe: Recipe, model: Model | None, registry: Registry, findings: Findings) -> Task | None:
    """The named task, or the family's own; its options are checked."""
    name = recipe.task.name or (model.family.task if model is not None else None)
    if name is None:
        return None
    task = findings.attempt("task.name", lambda: cast(Task, registry.get("tasks", name)))
    if task is not None:
        owner = f"the task {task.name!r}"
        _, wrong = check_options(findings.loaded.document, ("task", "options"), task.options, owner)
        findings.messages.extend(str(problem) for problem in wrong)
    return task


def _familys_planner(recipe: Recipe, model: Model | None) -> tuple[Recipe, str]:
    """The recipe with the planner that the model's family asks for, where the recipe leaves it open."""
    if model is None or model.family.planner is None or recipe.parallel.planner != "auto":
        return recipe, ""
    name = model.family.planner
    return _with(recipe, parallel={"planner": name}), f"parallel.planner: {name} (what {model.family.name} asks for)"


def _find_planner(recipe: Recipe, cluster: Cluster, registry: Registry, findings: Findings) -> ParallelPlanner | None:
    """The named planner, or the one the plugins choose; None where its options are wrong, because it needs them."""

    def find() -> ParallelPlanner:
        name = recipe.parallel.planner
        if name == "auto":
            answer = registry.choose_planner(recipe, cluster)
            if answer is None:
                raise NotFound(f"no plugin chooses a planner for this recipe. {registry.plugins.failures()}".rstrip())
            name = answer
        return cast(ParallelPlanner, registry.get("parallel_planners", name))

    planner = cast("ParallelPlanner | None", findings.attempt("parallel.planner", find))
    if planner is None and recipe.parallel.planner != "auto":
        return _find_planner(_with(recipe, parallel={"planner": "auto"}), cluster, registry, findings)
    if planner is not None:
        owner = f"the planner {planner.name!r}"
        _, wrong = check_options(findings.loaded.document, ("parallel", "options"), planner.options, owner)
        findings.messages.extend(str(problem) for problem in wrong)
        planner = None if wrong else planner
    return planner


def _known(recipe: Recipe, registry: Registry) -> dict[str, str]:
    """The op choices of the recipe that exist; the others are reported already."""
    rows = {(row.op, row.name) for row in registry.ops()}
    return {op: name for op, name in recipe.ops.items() if (op, name) in rows}


def _check_names(recipe: Recipe, registry: Registry, findings: Findings) -> None:
    """Sinks and profile of the log, and op names, which are known before any layout is."""
    from loong_core.train.metrics import sink_problems

    findings.absorb("log.to", sink_problems(recipe.log.to))
    if recipe.log.profile is not None and recipe.log.profile > recipe.run.steps:
        findings.add("log.profile", f"the run ends with step {recipe.run.steps} (run.steps); name a step up to that.")
    for op, name in recipe.ops.items():
        known = sorted(row.name for row in registry.ops() if row.op == op)
        if op not in ops.DECLARATIONS:
            from loong_core.recipe_check import unknown_key

            findings.add(f"ops.{op}", unknown_key(op, ops.DECLARATIONS))
        elif name not in known:
            from loong_core.suggest import did_you_mean

            text = f"there is no implementation {name!r} of {op}.{did_you_mean(name, known)}"
            text += f" Installed: {', '.join(known)}. {registry.plugins.failures()}"
            findings.add(f"ops.{op}", text.rstrip())


def _cluster(chosen: _Chosen, recipe: Recipe, policy: PrecisionPolicy | None, purpose: Purpose) -> Cluster:
    """The machines. A plan may be made for machines that are not here: then the recipe's own numbers count."""
    probe = chosen.probe
    if purpose == "plan":
        wanted = recipe.launch.devices
        devices = max(probe.devices, wanted if isinstance(wanted, int) else 1)
        probe = probe._replace(devices=devices)
        if recipe.launch.nodes > 1 and recipe.launch.rendezvous is None:
            recipe = _with(recipe, launch={"rendezvous": "localhost:29500"})
    return clusters.detect(chosen.backend, probe, recipe, policy)


def check_only(loaded: LoadedRecipe, registry: Registry) -> list[str]:
    """The problems of a recipe as text; empty when it would start."""
    try:
        prepare(loaded, registry)
    except UserError as error:
        return error.problems
    return []
