"""The contract of a whole plugin: what it hands the core is named, typed, resolvable, and cheap to ask for."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

from loong_core import hookspecs
from loong_core.errors import PluginError
from loong_core.plugins import Plugins, load
from loong_core.registry import KINDS, Registry, resolve
from loong_core.testing.contract import Contract

HEAVY = (
    "cupy",
    "jax",
    "megatron",
    "numpy",
    "pandas",
    "pyarrow",
    "tilelang",
    "torch",
    "transformer_engine",
    "transformers",
    "triton",
)
"""Modules that asking a plugin what it provides must not import: the command line would become slow."""

LOWER_SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")

ASK_EVERYTHING = """
import json, sys
import typer
from loong_core.plugins import load
from loong_core.registry import KINDS, Registry
before = set(sys.modules)
plugins = load()
registry = Registry(plugins)
for kind in KINDS:
    registry.table(kind)
registry.add_commands(typer.Typer())
loaded = sorted(name for name in sys.argv[2:] if name in sys.modules)
print(json.dumps([plugins.infos[sys.argv[1]].reason(), loaded]))
"""


class PluginContract(Contract):
    """Set `plugin` to the entry point's name. `optional_modules` are imports that may fail on a machine without the
    plugin's hardware; references that fail for want of one of them are not followed."""

    required: ClassVar[tuple[str, ...]] = ("plugin",)
    plugin: ClassVar[str]
    optional_modules: ClassVar[frozenset[str]] = frozenset()

    @cached_property
    def plugins(self) -> Plugins:
        """All installed plugins, loaded anew: another test may have set one aside."""
        return load()

    @cached_property
    def descriptors(self) -> list[tuple[str, Any]]:
        """(kind, descriptor) of everything this plugin provides."""
        registry = Registry(self.plugins)
        found = []
        for kind in KINDS:
            for name, item in registry.table(kind).items():  # type: ignore[call-overload]
                if registry.owner(kind, name) == self.plugins.describe(self.plugin):  # type: ignore[arg-type]
                    found.append((kind, item))
        return found

    def test_plugin_loads(self) -> None:
        """It is installed under its name, imports, and implements at least one hook."""
        infos = self.plugins.infos
        assert self.plugin in infos, f"no plugin {self.plugin!r} is installed; there are {sorted(infos)}"
        assert not infos[self.plugin].reason()
        assert infos[self.plugin].hooks, "it implements no hook"

    def test_hooks_match_the_specs(self) -> None:
        """Argument names exist in the spec; annotations, where given, say the same as the spec's."""
        problems = []
        for name, function in self._implementations():
            problems += [f"{name}: {problem}" for problem in signature_problems(getattr(hookspecs, name), function)]
        assert not problems, "\n".join(problems)

    def test_providers_import_no_tensor_library(self) -> None:
        """Asking for everything the plugin provides leaves the slow modules unimported."""
        # Alone, so that no other plugin's imports are blamed on it; a single-file plugin is not on that list.
        alone = "" if self.plugins.infos[self.plugin].target.endswith(".py") else self.plugin
        environ = {**os.environ, "LOONG_PLUGINS": alone, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        result = subprocess.run(
            [sys.executable, "-c", ASK_EVERYTHING, self.plugin, *HEAVY], env=environ, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        reason, loaded = json.loads(result.stdout.splitlines()[-1])
        assert not reason
        assert not loaded, f"imported while the plugin said what it provides: {', '.join(loaded)}"

    def test_names_are_lower_snake(self) -> None:
        """Recipes and command lines are written in one spelling."""
        names = [(kind, name) for kind, item in self.descriptors for name in names_of(item)]
        wrong = [f"{kind}: {name!r}" for kind, name in names if not LOWER_SNAKE.fullmatch(name)]
        assert not wrong, f"not lower_snake: {', '.join(wrong)}"

    def test_references_resolve(self) -> None:
        """Every `"module:attribute"` of every descriptor leads somewhere."""
        from loong_core.testing.ranks import run_ranks

        references = [(f"{kind} {item.name}", ref) for kind, item in self.descriptors for ref in references_of(item)]
        # In a fork with the CPU device active: references lead to code that imports megatron-core.
        problems = run_ranks(1, self._dead_references, references)[0] if references else []
        assert not problems, "\n".join(problems)

    def _dead_references(self, rank: int, references: list[tuple[str, str]]) -> list[str]:
        problems = []
        for owner, ref in references:
            try:
                resolve(ref, owner)
            except PluginError as error:
                cause = error.__cause__
                if not (isinstance(cause, ImportError) and cause.name in self.optional_modules):
                    problems.append(str(error))
        return problems

    def _implementations(self) -> Iterator[tuple[str, Any]]:
        module = self.plugins.manager.get_plugin(self.plugin)
        for name in dir(module):
            function = getattr(module, name)
            options = getattr(function, f"{hookspecs.PROJECT}_impl", None)
            if isinstance(options, dict):
                yield options.get("specname") or name, function


def names_of(item: Any) -> list[str]:
    """The names a descriptor brings into recipes and messages."""
    extra = [item.op] if hasattr(item, "op") else []
    return [item.name, *extra, *sorted(getattr(item, "capabilities", ()))]


def references_of(item: Any) -> list[str]:
    """The values of a descriptor's fields that are declared as `Ref`."""
    fields = [field.name for field in dataclasses.fields(item) if str(field.type).split(" ")[0] == "Ref"]
    return [value for name in fields if (value := getattr(item, name)) is not None]


def signature_problems(spec: Any, implementation: Any) -> list[str]:
    """How the signature of a hook implementation contradicts its spec; a missing annotation contradicts nothing."""
    wanted, given = inspect.signature(spec), inspect.signature(implementation)
    problems = []
    for name, parameter in given.parameters.items():
        if name not in wanted.parameters:
            problems.append(f"the spec has no argument {name!r}, only {', '.join(wanted.parameters) or 'none'}")
        elif not _agree(wanted.parameters[name].annotation, parameter.annotation):
            problems.append(
                f"argument {name!r} is annotated {_plain(parameter.annotation)}, "
                f"the spec says {_plain(wanted.parameters[name].annotation)}"
            )
    if not _agree(wanted.return_annotation, given.return_annotation):
        told, asked = _plain(given.return_annotation), _plain(wanted.return_annotation)
        problems.append(f"it is annotated to return {told}, the spec says {asked}")
    return problems


def _agree(wanted: Any, given: Any) -> bool:
    return given is inspect.Signature.empty or _plain(given) == _plain(wanted)


def _plain(annotation: Any) -> str:
    """An annotation as text without module names; every collection that can be iterated counts as `Iterable`."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\b\w+\.(?=\w)", "", text.replace(" ", "").strip("'\""))
    text = re.sub(r"\b(list|List|tuple|Tuple|Sequence|Collection|Iterator|set|frozenset)\[", "Iterable[", text)
    text = re.sub(r"\bdict\[|\bDict\[", "Mapping[", text)
    return re.sub(r"\bOptional\[(\w+)\]", r"\1|None", text.replace(",...]", "]"))
