"""Fills in the extras of the meta dist: siblings by path inside a checkout, by version range everywhere else.

A package index does not accept requirements by path, and a checkout must not take its own packages from an index, so
one static table cannot serve both. Hatchling calls `update` while it builds the metadata of `loong-train`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class ExtrasHook(MetadataHookInterface):
    """Reads `[tool.loong.extras]`, where a requirement that names a sibling carries its version range."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set `optional-dependencies`, each sibling replaced by its folder where that folder exists."""
        metadata["optional-dependencies"] = {
            extra: [line for requirement in requirements for line in self._locate(requirement)]
            for extra, requirements in self.config["extras"].items()
        }

    def _locate(self, requirement: str) -> list[str]:
        bare, _, wanted = re.split(r"[<>=]", requirement)[0].strip().partition("[")
        folder = Path(self.root, "packages", bare)
        if not (folder / "pyproject.toml").is_file():
            return [requirement]
        # pip connects `name[extra]` of a sibling with a folder only if the folder was also asked for without extras.
        names = [bare, f"{bare}[{wanted}"] if wanted else [bare]
        return [f"{name} @ {folder.as_uri()}" for name in names]
