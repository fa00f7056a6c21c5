"""What all plugins provide, one table per kind, and typed calls of the hooks that are events.

A provider hook is called once per process, when a name of its kind is first looked up. A plugin whose provider fails
is set aside and named in every "no such name" message; one that returns the wrong type breaks the contract: an error.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from loong_core.errors import LoongError, NotFound, PluginError, RunError, Unsupported
from loong_core.plugins import Plugins, load
from loong_core.suggest import did_you_mean
from loong_core.types import (
    Backend,
    CheckpointFormat,
    Cluster,
    DataSource,
    ModelFamily,
    OpImpl,
    ParallelPlanner,
    PrecisionPolicy,
    RecipeFolder,
    Ref,
    Task,
)

if TYPE_CHECKING:
    import torch

    from loong_core.recipe import Recipe
    from loong_core.train.run import Run

Kind = Literal[
    "model_families",
    "tasks",
    "parallel_planners",
    "precision_policies",
    "backends",
    "ops",
    "data_sources",
    "checkpoint_formats",
    "recipes",
]

KINDS: Mapping[str, tuple[type, str]] = {
    "model_families": (ModelFamily, "model family"),
    "tasks": (Task, "task"),
    "parallel_planners": (ParallelPlanner, "parallel planner"),
    "precision_policies": (PrecisionPolicy, "precision policy"),
    "backends": (Backend, "backend"),
    "ops": (OpImpl, "op implementation"),
    "data_sources": (DataSource, "data source"),
    "checkpoint_formats": (CheckpointFormat, "checkpoint format"),
    "recipes": (RecipeFolder, "recipe folder"),
}
"""Kind -> descriptor type, and what one is called in messages."""


def resolve(ref: Ref, owner: str = "") -> Any:
    """The object behind `"package.module:attribute"`.

    Raises PluginError when the module cannot be imported or lacks the attribute; `owner` says whose reference it is.
    """
    module_name, colon, attribute = ref.partition(":")
    of = f" of {owner}" if owner else ""
    if not (module_name and colon and attribute):
        raise PluginError(f'The reference {ref!r}{of} is malformed; write "package.module:attribute".')
    try:
        value = importlib.import_module(module_name)
        for part in attribute.split("."):
            value = getattr(value, part)
    except LoongError:
        raise
    except AttributeError as error:
        raise PluginError(f"The reference {ref!r}{of} does not resolve: {error}.") from error
    except ImportError as error:
        remedy = f" Install {error.name!r}." if _is_foreign(error, module_name) else ""
        raise PluginError(f"The reference {ref!r}{of} does not import: {error}.{remedy}") from error
    return value


def _is_foreign(error: ImportError, module_name: str) -> bool:
    """Whether the missing module belongs to somebody else than the referenced package."""
    return isinstance(error, ModuleNotFoundError) and bool(error.name) and error.name != module_name.split(".")[0]


class Registry:
    """Tables of descriptors by kind and name, made when first asked for."""

    def __init__(self, plugins: Plugins) -> None:
        self.plugins = plugins
        self.events = Events(plugins)
        self._tables: dict[str, dict[str, Any]] = {}
        self._owners: dict[tuple[str, str], str] = {}

    @overload
    def table(self, kind: Literal["model_families"]) -> Mapping[str, ModelFamily]: ...
    @overload
    def table(self, kind: Literal["tasks"]) -> Mapping[str, Task]: ...
    @overload
    def table(self, kind: Literal["parallel_planners"]) -> Mapping[str, ParallelPlanner]: ...
    @overload
    def table(self, kind: Literal["precision_policies"]) -> Mapping[str, PrecisionPolicy]: ...
    @overload
    def table(self, kind: Literal["backends"]) -> Mapping[str, Backend]: ...
    @overload
    def table(self, kind: Literal["ops"]) -> Mapping[str, OpImpl]: ...
    @overload
    def table(self, kind: Literal["data_sources"]) -> Mapping[str, DataSource]: ...
    @overload
    def table(self, kind: Literal["checkpoint_formats"]) -> Mapping[str, CheckpointFormat]: ...
    @overload
    def table(self, kind: Literal["recipes"]) -> Mapping[str, RecipeFolder]: ...

    def table(self, kind: Kind) -> Mapping[str, Any]:
        """Every descriptor of `kind` by name (ops: by `"op.name"`), in plugin-name order.

        Raises PluginError for a wrong descriptor type, and when two plugins provide the same name.
        """
        if kind not in self._tables:
            self._tables[kind] = self._collect(kind)
        return self._tables[kind]

    def get(self, kind: Kind, name: str) -> Any:
        """The descriptor of that name. Raises NotFound with the nearest name, all names, and broken plugins."""
        table = cast("Mapping[str, Any]", self.table(cast(Any, kind)))
        if name in table:
            return table[name]
        raise NotFound(self.missing(kind, name))

    def missing(self, kind: Kind, name: object) -> str:
        """The text for a name nobody provides."""
        names = sorted(cast("Mapping[str, Any]", self.table(cast(Any, kind))))
        parts = [
            f"There is no {KINDS[kind][1]} named {name!r}.{did_you_mean(str(name), names)}",
            f"Installed: {', '.join(names) or 'none'}.",
            self.plugins.failures(),
        ]
        return " ".join(filter(None, parts))

    def owner(self, kind: Kind, name: str) -> str:
        """The plugin that provides a descriptor: `'llm' (loong-llm 0.1.0)`."""
        self.table(cast(Any, kind))
        return self.plugins.describe(self._owners[kind, name])

    def resolve(self, ref: Ref, owner: str = "") -> Any:
        """As the module's `resolve`."""
        return resolve(ref, owner)

    def ops(self) -> tuple[OpImpl, ...]:
        """All implementations of all ops."""
        return tuple(self.table("ops").values())

    def family_for(self, config: Mapping[str, Any]) -> ModelFamily:
        """The family that claims the architecture of a config.json (see `architecture_of`).

        Raises Unsupported when it names none or nobody claims it, naming what the installed families claim.
        """
        name = architecture_of(config)
        families = self.table("model_families")
        claimed = {name: family for family in families.values() for name in family.hf_architectures}
        if name is None:
            raise Unsupported(
                "config.json names no architecture (key `architectures`), so the family cannot be known. "
                f"Set model.family; installed: {', '.join(sorted(families)) or 'none'}."
            )
        matches = [family for family in families.values() if name in family.hf_architectures]
        if matches:
            return matches[0]
        broken = self.plugins.failures()
        raise Unsupported(
            f"No installed model family claims the architecture {name!r}.{did_you_mean(name, list(claimed))} "
            + f"Installed families: {_claims(families.values()) or 'none'}. "
            + "Install the package that brings this family, or set model.family to one that computes the same."
            + (f" {broken}" if broken else "")
        )

    def choose_planner(self, recipe: Recipe, cluster: Cluster) -> str | None:
        """The planner for `parallel.planner: auto`: the first answer of the plugins."""
        return cast("str | None", self._call("loong_choose_planner", recipe=recipe, cluster=cluster))

    def validate(self, recipe: Recipe, cluster: Cluster) -> list[str]:
        """The problems every plugin sees in a recipe."""
        results = self._call("loong_validate", recipe=recipe, cluster=cluster)
        return [str(problem) for problems in results for problem in (problems or ())]

    def add_commands(self, group: Any) -> None:
        """Let plugins add commands; one that fails is set aside, the command line keeps working."""
        for implementation in self.plugins.hook.loong_cli_commands.get_hookimpls():
            try:
                self.plugins.trace(f"loong_cli_commands(group) -> {implementation.plugin_name}")
                implementation.function(*([group] if implementation.argnames else []))
            except Exception as error:
                self._set_aside(implementation.plugin_name, "loong_cli_commands", error)

    def _call(self, hook: str, **arguments: Any) -> Any:
        return _call(self.plugins, hook, PluginError, arguments)

    def _set_aside(self, plugin: str, hook: str, error: BaseException) -> None:
        text = " ".join(str(error).split())
        self.plugins.infos[plugin].error = PluginError(f"{hook} raised {type(error).__name__}: {text}")

    def _collect(self, kind: Kind) -> dict[str, Any]:
        hook = f"loong_{kind}"
        expected = KINDS[kind][0]
        found: dict[str, Any] = {}
        implementations = getattr(self.plugins.hook, hook).get_hookimpls()
        for implementation in sorted(implementations, key=lambda item: item.plugin_name):
            plugin = implementation.plugin_name
            for item in self._provided(hook, plugin, implementation.function):
                if not isinstance(item, expected):
                    got = f"{type(item).__module__}.{type(item).__qualname__}"
                    raise PluginError(
                        f"Plugin {self.plugins.describe(plugin)}: {hook} must return an iterable of "
                        f"loong_core.types.{expected.__name__}, and returned {got}."
                    )
                name = f"{item.op}.{item.name}" if isinstance(item, OpImpl) else getattr(item, "name", None)
                self._check_name(kind, plugin, name, found)
                found[str(name)] = item
                self._owners[kind, str(name)] = plugin
        return found

    def _provided(self, hook: str, plugin: str, function: Callable[[], Iterable[Any] | None]) -> list[Any]:
        self.plugins.trace(f"{hook}() -> {plugin}")
        try:
            result = function()
            if result is not None and not isinstance(result, Iterable):
                return [result]
            return list(result or ())
        except Exception as error:
            self._set_aside(plugin, hook, error)
            return []

    def _check_name(self, kind: Kind, plugin: str, name: object, found: Mapping[str, Any]) -> None:
        what = KINDS[kind][1]
        if not isinstance(name, str) or not name:
            raise PluginError(
                f"Plugin {self.plugins.describe(plugin)}: a {what} has the name {name!r}; give it a text."
            )
        if name in found:
            first = self._owners[kind, name]
            owners = (
                f"twice by plugin {self.plugins.describe(plugin)}"
                if first == plugin
                else f"by plugin {self.plugins.describe(first)} and by plugin {self.plugins.describe(plugin)}"
            )
            raise PluginError(
                f"The {what} {name!r} is provided {owners}. Uninstall one, or choose with LOONG_PLUGINS "
                f"(now installed: {', '.join(sorted(self.plugins.infos))})."
            )


class Events:
    """The event hooks with types. Whatever a plugin raises in one names the plugin."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins

    def model_built(self, model: list[torch.nn.Module], run: Run) -> None:
        """The weights are loaded, the optimizer is not built yet."""
        self._fire("loong_model_built", model=model, run=run)

    def run_start(self, run: Run) -> None:
        """The first step is about to begin."""
        self._fire("loong_run_start", run=run)

    def step_end(self, run: Run, metrics: dict[str, float]) -> None:
        """An optimizer step is done."""
        self._fire("loong_step_end", run=run, metrics=metrics)

    def checkpoint_saved(self, run: Run, path: Path) -> None:
        """A checkpoint is durable."""
        self._fire("loong_checkpoint_saved", run=run, path=path)

    def run_end(self, run: Run, error: BaseException | None) -> None:
        """The run is over."""
        self._fire("loong_run_end", run=run, error=error)

    def _fire(self, hook: str, **arguments: Any) -> None:
        _call(self._plugins, hook, RunError, arguments)


def _call(plugins: Plugins, hook: str, failure: type[LoongError], arguments: Mapping[str, Any]) -> Any:
    """Call a hook; an exception that is no LoongError becomes a `failure` that names the plugin it came from."""
    try:
        return getattr(plugins.hook, hook)(**arguments)
    except LoongError:
        raise
    except Exception as error:
        codes = set()
        traceback = error.__traceback__
        while traceback is not None:
            codes.add(traceback.tb_frame.f_code)
            traceback = traceback.tb_next
        implementations = getattr(plugins.hook, hook).get_hookimpls()
        guilty = [item.plugin_name for item in implementations if getattr(item.function, "__code__", None) in codes]
        who = ", ".join(plugins.describe(name) for name in guilty) or "unknown"
        raise failure(f"Plugin {who} failed in {hook}: {type(error).__name__}: {error}") from error


def _claims(families: Iterable[ModelFamily]) -> str:
    return ", ".join(f"{family.name} ({', '.join(family.hf_architectures)})" for family in families)


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """`architectures[0]` of a Hugging Face config.json, `type` of a LeRobot policy's; None where neither is there."""
    names = config.get("architectures")
    if isinstance(names, Sequence) and not isinstance(names, str) and names:
        return str(names[0])
    kind = config.get("type")
    return kind if isinstance(kind, str) else None


def open_registry() -> Registry:
    """A registry over the plugins of this environment."""
    return Registry(load())
