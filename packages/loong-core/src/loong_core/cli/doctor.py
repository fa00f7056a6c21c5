"""`loong doctor`: what this machine has, what loong would use of it, and what is broken."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loong_core.cli import output

if TYPE_CHECKING:
    from loong_core.registry import Registry


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what this machine has, and what is wrong.

    Hardware, backends, libraries, plugins. The exit code is 1 when something is wrong.

    \b
    Example:
      loong doctor --json
    """
    from loong_core.registry import open_registry

    found = examine(open_registry())
    if json:
        output.as_json(found)
    else:
        _print(found)
    raise typer.Exit(1 if found["problems"] else 0)


def examine(registry: Registry) -> dict[str, Any]:
    """Facts of this machine as plain values. `problems` is empty when all is well."""
    from loong_core import run_folder, validate
    from loong_core.cli.plugins import collect_all
    from loong_core.errors import LoongError

    problems = collect_all(registry)
    backends = {}
    automatic = None
    try:
        for backend in registry.table("backends").values():
            probe = validate.probe_of(backend)
            backends[backend.name] = {
                **probe._asdict(),
                "capabilities": sorted(backend.capabilities),
                "collective": backend.collective,
            }
        automatic = validate.choose_backend("auto", registry).backend.name
    except LoongError as error:
        problems.append(str(error))
    libraries = {name: run_folder.library_version(name) or None for name in run_folder.LIBRARIES}
    if libraries["torch"] is None:
        problems.append("torch is not installed: nothing can be trained. Install loong-train[llm].")
    problems += [f"plugin {name}: {info.reason()}" for name, info in registry.plugins.infos.items() if info.error]
    disk = shutil.disk_usage(Path.cwd())
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "disk_free_bytes": disk.free,
        "backends": backends,
        "backend_auto": automatic,
        "libraries": libraries,
        "plugins": [
            {"name": info.name, "dist": info.dist, "version": info.version} for info in registry.plugins.working
        ],
        "problems": problems,
    }


def _print(found: dict[str, Any]) -> None:
    output.pairs(
        [
            ("python", f"{found['python']} on {found['platform']}"),
            ("processors", str(found["processors"])),
            ("free disk here", output.memory(found["disk_free_bytes"])),
        ]
    )
    output.say()
    rows = []
    for name, backend in found["backends"].items():
        chosen = " (auto)" if name == found["backend_auto"] else ""
        size = output.memory(backend["memory"]) if backend["memory"] else ""
        what = f"{backend['device_name']} {size}".strip() if backend["devices"] else backend["reason"]
        rows.append((f"{name}{chosen}", str(backend["devices"]), what))
    output.table(("backend", "devices", "what it found"), rows)
    output.say()
    output.table(("library", "version"), [(name, text or "not installed") for name, text in found["libraries"].items()])
    output.say()
    output.table(
        ("plugin", "distribution"), [(item["name"], f"{item['dist']} {item['version']}") for item in found["plugins"]]
    )
    output.say()
    output.say("problems" if found["problems"] else "no problems found")
    for problem in found["problems"]:
        output.say(f"  {problem}")
