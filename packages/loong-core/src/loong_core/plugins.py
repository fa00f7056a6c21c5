"""Discover plugins by entry point, keep going when one is broken, and remember which one and why.

Loading a plugin imports its `plugin` module and nothing else: what it provides is asked for later, by the registry.
The core's own names come through the same door (`DEFAULT_PLUGINS`).

Environment: `LOONG_PLUGINS=llm,ckpt` loads only these (the core always loads); `LOONG_PLUGIN_FILES=a.py:b.py` adds
single-file plugins; `LOONG_TRACE_HOOKS=1` prints every hook call to standard error.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from loong_core import hookspecs
from loong_core.errors import PluginError

DEFAULT_PLUGINS: Mapping[str, str] = {"core": "loong_core.plugin"}
"""Plugins that are always there: short name -> module."""

SPECS = frozenset(name for name in vars(hookspecs) if name.startswith(f"{hookspecs.PROJECT}_"))
"""The names of all hooks."""


@dataclass
class PluginInfo:
    """One plugin: its short name, where its code is, who ships it, and what went wrong with it (None: nothing)."""

    name: str
    target: str
    distribution: Distribution | None = None
    hooks: tuple[str, ...] = ()
    error: BaseException | None = None

    @cached_property
    def dist(self) -> str:
        """Name of the distribution, or the file of a single-file plugin."""
        if self.distribution is None:
            return self.target if self.target.endswith(".py") else "loong-core"
        return str(self.distribution.name)

    @cached_property
    def version(self) -> str:
        """Version of the distribution; empty for a single-file plugin."""
        if self.distribution is not None:
            return str(self.distribution.version)
        return "" if self.target.endswith(".py") else core_version()

    def __str__(self) -> str:
        return f"{self.name!r} ({self.dist} {self.version})".replace(" )", ")")

    def reason(self) -> str:
        """The failure in one line; empty when there is none."""
        if self.error is None:
            return ""
        text = " ".join(str(self.error).split())
        return text if isinstance(self.error, PluginError) else f"{type(self.error).__name__}: {text}"


@dataclass
class Plugins:
    """All plugins of this process. `infos` has the broken ones too, by short name."""

    manager: pluggy.PluginManager
    infos: dict[str, PluginInfo] = field(default_factory=dict)
    tracing: bool = False

    @property
    def hook(self) -> Any:
        """pluggy's untyped relay; `Registry` wraps it with types."""
        return self.manager.hook

    @property
    def failed(self) -> dict[str, BaseException]:
        """Broken plugins: short name -> what went wrong."""
        return {name: info.error for name, info in self.infos.items() if info.error is not None}

    @property
    def working(self) -> list[PluginInfo]:
        """Plugins that loaded, in name order."""
        return sorted((info for info in self.infos.values() if info.error is None), key=lambda info: info.name)

    def describe(self, name: str) -> str:
        """`'llm' (loong-llm 0.1.0)`."""
        return str(self.infos[name]) if name in self.infos else repr(name)

    def failures(self) -> str:
        """A sentence that names every broken plugin; empty when there is none."""
        broken = [f"{info.name} ({info.reason()})" for info in self.infos.values() if info.error is not None]
        return f"Plugins that failed: {'; '.join(broken)}." if broken else ""

    def trace(self, text: str) -> None:
        """Print `text` when hook calls are traced."""
        if self.tracing:
            sys.stderr.write(f"loong hook: {text}\n")


def core_version() -> str:
    """Version of loong-core."""
    try:
        return str(importlib.import_module("loong_core.__about__").__version__)
    except ImportError:
        return "unknown"


def load(found: Iterable[EntryPoint] | None = None, environ: Mapping[str, str] | None = None) -> Plugins:
    """Load the core, the installed plugins (`found` instead of the installed entry points, for tests) and plugin files.

    Never raises for a plugin's fault: see `Plugins.failed`.
    """
    environ = os.environ if environ is None else environ
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    plugins = Plugins(manager, tracing=environ.get("LOONG_TRACE_HOOKS", "") not in ("", "0"))
    for name, module in DEFAULT_PLUGINS.items():
        _add(plugins, PluginInfo(name, module), lambda module=module: importlib.import_module(module))
    _add_installed(plugins, entry_points(group=hookspecs.PROJECT) if found is None else found, environ)
    for file in filter(None, environ.get("LOONG_PLUGIN_FILES", "").split(os.pathsep)):
        path = Path(file)
        _add(plugins, PluginInfo(path.stem, file), lambda path=path: _import_file(path))
    if plugins.tracing:
        _trace_events(plugins)
    return plugins


def _add_installed(plugins: Plugins, found: Iterable[EntryPoint], environ: Mapping[str, str]) -> None:
    """Name order, so that nothing depends on the order of installation."""
    only = environ.get("LOONG_PLUGINS")
    wanted = None if only is None else {name.strip() for name in only.split(",") if name.strip()}
    points = sorted(found, key=lambda point: (point.name, point.dist.name if point.dist else ""))
    for point in points:
        if wanted is None or point.name in wanted:
            _add(plugins, PluginInfo(point.name, point.value, point.dist), point.load)
    for name in sorted((wanted or set()) - {point.name for point in points} - set(DEFAULT_PLUGINS)):
        installed = ", ".join(sorted({point.name for point in points})) or "none"
        error = PluginError(f"LOONG_PLUGINS names it, but it is not installed. Installed: {installed}.")
        plugins.infos[name] = PluginInfo(name, "LOONG_PLUGINS", error=error)


def _add(plugins: Plugins, info: PluginInfo, importer: Any) -> None:
    """Register one plugin; on any fault of its own leave nothing of it behind but the record."""
    if (other := plugins.infos.get(info.name)) is not None:
        info.error = PluginError(f"the plugin name {info.name!r} is already taken by {other}; uninstall one of the two")
        info.name = f"{info.name} of {info.dist}"
        plugins.infos[info.name] = info
        return
    plugins.infos[info.name] = info
    try:
        plugin = importer()
        info.hooks = _check_hooks(plugin)
        plugins.manager.register(plugin, name=info.name)
    except (Exception, SystemExit) as error:
        info.error = error
        if plugins.manager.has_plugin(info.name):
            plugins.manager.unregister(name=info.name)


def _check_hooks(plugin: object) -> tuple[str, ...]:
    """Names of the hooks `plugin` implements. A marked function that is no hook is a spelling error, and a function
    with a hook's name but without the mark would silently never be called: both are the plugin's fault."""
    hooks = []
    for name in dir(plugin):
        value = inspect.getattr_static(plugin, name, None)
        value = getattr(value, "__func__", value)
        options = getattr(value, f"{hookspecs.PROJECT}_impl", None)
        hook = (options.get("specname") if isinstance(options, dict) else None) or name
        if isinstance(options, dict):
            if hook not in SPECS:
                import difflib

                close = difflib.get_close_matches(hook, sorted(SPECS), n=1, cutoff=0.5)
                hint = f" Did you mean {close[0]}?" if close else f" Hooks: {', '.join(sorted(SPECS))}."
                raise PluginError(f"it implements {hook}, and there is no such hook.{hint}")
            hooks.append(hook)
        elif name in SPECS and inspect.isfunction(value) and _is_own(plugin, value):
            raise PluginError(f"it defines {name} without @hookimpl, so it would never be called; add the decorator")
    return tuple(sorted(hooks))


def _is_own(plugin: object, function: Any) -> bool:
    return not isinstance(plugin, ModuleType) or function.__module__ == plugin.__name__


def _import_file(path: Path) -> ModuleType:
    """Import a single-file plugin under its stem, so that its own references (`"my_plugin:build"`) resolve."""
    if not path.is_file():
        raise PluginError(f"LOONG_PLUGIN_FILES names {path}, and there is no such file")
    if path.stem in sys.modules and getattr(sys.modules[path.stem], "__file__", None) == str(path.resolve()):
        return sys.modules[path.stem]
    found = importlib.util.find_spec(path.stem)
    # `python -m` puts the working folder on the path, where such a file usually lies: then it is found as itself.
    if found is not None and (found.origin is None or Path(found.origin).resolve() != path.resolve()):
        raise PluginError(f"a module named {path.stem!r} exists already; rename {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if spec is None or spec.loader is None:
        raise PluginError(f"{path} is not a Python source file; a plugin file ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _trace_events(plugins: Plugins) -> None:
    def before(hook: str, implementations: Any, arguments: Mapping[str, Any]) -> None:
        names = ", ".join(implementation.plugin_name for implementation in implementations) or "nobody"
        plugins.trace(f"{hook}({', '.join(arguments)}) -> {names}")

    def after(outcome: Any, hook: str, implementations: Any, arguments: Mapping[str, Any]) -> None:
        if outcome.exception is not None:
            plugins.trace(f"{hook} raised {type(outcome.exception).__name__}: {outcome.exception}")

    plugins.manager.add_hookcall_monitoring(before, after)
