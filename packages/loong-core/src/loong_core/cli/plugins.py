"""`loong plugins`: who is installed, what each provides, and why a broken one is broken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from loong_core.cli import output

if TYPE_CHECKING:
    from loong_core.registry import Registry


def plugins(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List plugins, and why broken ones are broken.

    LOONG_PLUGINS=llm,ckpt restricts loading; LOONG_TRACE_HOOKS=1 shows every hook call.

    \b
    Example:
      loong plugins --json
    """
    from loong_core.registry import open_registry

    registry = open_registry()
    problems = collect_all(registry)
    found = describe(registry)
    if json:
        output.as_json({"plugins": found, "problems": problems})
        return
    rows = [
        (item["name"], f"{item['dist']} {item['version']}".strip(), "broken" if item["error"] else "ok", _gist(item))
        for item in found
    ]
    output.table(("plugin", "distribution", "state", "provides"), rows)
    for problem in problems:
        output.say(f"problem: {problem}")


def describe(registry: Registry) -> list[dict[str, Any]]:
    """Every plugin, working or not, as plain values."""
    from loong_core.registry import KINDS

    provided: dict[str, dict[str, list[str]]] = {}
    for (kind, name), plugin in registry._owners.items():
        provided.setdefault(plugin, {}).setdefault(kind, []).append(name)
    return [
        {
            "name": info.name,
            "dist": info.dist,
            "version": info.version,
            "target": info.target,
            "hooks": list(info.hooks),
            "provides": {
                kind: provided.get(info.name, {})[kind] for kind in KINDS if kind in provided.get(info.name, {})
            },
            "error": info.reason() or None,
        }
        for info in sorted(registry.plugins.infos.values(), key=lambda info: info.name)
    ]


def collect_all(registry: Registry) -> list[str]:
    """Ask every provider, so that what only breaks when asked shows. Returns faults that concern several plugins."""
    from loong_core.errors import PluginError
    from loong_core.registry import KINDS

    problems = []
    for kind in KINDS:
        try:
            registry.table(cast(Any, kind))
        except PluginError as error:
            problems.append(str(error))
    return problems


def _gist(item: dict[str, Any]) -> str:
    if item["error"]:
        return str(item["error"])
    parts = [f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in item["provides"].items()]
    return "; ".join(parts) or ", ".join(item["hooks"]) or "nothing"
