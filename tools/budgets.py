"""Sizes the house keeps to (architecture page); a budget is raised here, in a commit that says why.

Run as a program it prints every excess and exits with 1; `tests/contracts/test_budgets.py` calls `excesses`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = 400
KERNEL_FILE_LINES = 600
FUNCTION_LINES = 60
FAMILY_LINES = 150
HOOKSPEC_LINES = 250
HOOKS = 20
MEGATRON_FILES = 14

ROOT = Path(__file__).resolve().parents[1]
_MEGATRON = re.compile(r"^\s*(?:from|import)\s+megatron\.core\b", re.MULTILINE)


def sources(root: Path = ROOT) -> list[Path]:
    """Every Python source file of every package, tests and scaffold templates left out."""
    return sorted(path for path in root.glob("packages/*/src/**/*.py") if "scaffold" not in path.parts)


def file_budget(path: Path) -> int:
    """The most lines the source file `path` may have."""
    if path.name == "hookspecs.py":
        return HOOKSPEC_LINES
    if path.parent.name == "models" and path.name != "__init__.py":
        return FAMILY_LINES
    return KERNEL_FILE_LINES if "loong_ops" in path.parts else FILE_LINES


def hooks(path: Path) -> list[str]:
    """Names of the functions in `path` that carry `@hookspec`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [node.name for node in functions if any("hookspec" in ast.unparse(mark) for mark in node.decorator_list)]


def megatron_files(root: Path = ROOT) -> list[Path]:
    """Source files that import megatron.core, at any depth of the file."""
    return [path for path in sources(root) if _MEGATRON.search(path.read_text(encoding="utf-8"))]


def excesses(root: Path = ROOT) -> Iterator[str]:
    """One sentence per broken budget: what, how much, how much is allowed."""
    for path in sources(root):
        text = path.read_text(encoding="utf-8")
        shown = path.relative_to(root)
        if (lines := text.count("\n")) > (allowed := file_budget(path)):
            yield f"{shown}: {lines} lines, {allowed} allowed"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if (length := node.end_lineno - node.lineno + 1) > FUNCTION_LINES:
                    yield f"{shown}:{node.lineno}: {node.name} has {length} lines, {FUNCTION_LINES} allowed"
    found = hooks(root / "packages/loong-core/src/loong_core/hookspecs.py")
    if len(found) > HOOKS:
        yield f"hookspecs.py: {len(found)} hooks, {HOOKS} allowed"
    users = megatron_files(root)
    if len(users) > MEGATRON_FILES:
        names = ", ".join(path.name for path in users)
        yield f"{len(users)} files import megatron.core, {MEGATRON_FILES} allowed: {names}"


if __name__ == "__main__":
    problems = list(excesses())
    print("\n".join(problems) or "all budgets kept")
    sys.exit(1 if problems else 0)
