"""What lies beside the weights of an exported GR00T: the files that LeRobot and the base model's own code look for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loong_core.train.run import Run

OWN_KEYS = ("embodiments", "padding_as_keys")
"""Keys of config.json that only loong knows; LeRobot refuses a policy's configuration that has any."""

COMPANIONS = ("processor_config.json", "statistics.json", "embodiment_id.json")
"""Files of a base model that say how its inputs and outputs are scaled."""

PIPELINES = ("policy_preprocessor", "policy_postprocessor")
"""Beginnings of the names of LeRobot's processors and of their statistics."""

SMALL = 64_000_000


def sidecars(run: Run, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of an export that are not weights: those given, those of the folder the run started from, and a
    configuration without loong's own keys where LeRobot will read it."""
    found = {**(beside(run.recipe.model.weights) if run.recipe.model.weights is not None else {}), **files}
    config: dict[str, Any] = json.loads(found["config.json"])
    if config.get("type") == "groot" and any(key in config for key in OWN_KEYS):
        kept = {key: value for key, value in config.items() if key not in OWN_KEYS}
        found["config.json"] = (json.dumps(kept, indent=2, sort_keys=True) + "\n").encode()
    return found


def beside(folder: Path) -> dict[str, bytes]:
    """Statistics and processors of a policy's folder, by name."""
    if not folder.is_dir():
        return {}
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if (path.name in COMPANIONS or path.name.startswith(PIPELINES))
        and path.suffix in (".json", ".safetensors")
        and path.is_file()
        and path.stat().st_size <= SMALL
    }
