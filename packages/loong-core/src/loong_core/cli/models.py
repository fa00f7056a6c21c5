"""`loong models`: the installed model families with the architectures they claim and their presets."""

from __future__ import annotations

from typing import Annotated

import typer

from loong_core.cli import output


def models(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List model families and their presets.

    A family claims architectures of Hugging Face config.json files.
    A preset is a model.config for random weights: loong plan recipe.yaml model.family=qwen3 model.config=<preset>.

    \b
    Example:
      loong models
    """
    from loong_core.registry import open_registry
    from loong_core.validate_model import presets_of

    registry = open_registry()
    rows = [
        {
            "name": family.name,
            "architectures": list(family.hf_architectures),
            "task": family.task,
            "presets": sorted(presets_of(family)),
            "plugin": registry.owner("model_families", family.name),
            "summary": family.summary,
        }
        for family in registry.table("model_families").values()
    ]
    if json:
        output.as_json(rows)
        return
    output.table(
        ("family", "architectures", "presets"),
        [(str(row["name"]), ", ".join(row["architectures"]), ", ".join(row["presets"])) for row in rows],
    )
    if failures := registry.plugins.failures():
        output.say(failures)
