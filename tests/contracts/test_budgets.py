"""The size budgets hold, the check of them bites, and the command line starts without a tensor library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import budgets
import pytest

HEAVY = {"torch", "numpy", "megatron", "transformers", "tokenizers", "safetensors", "pyarrow", "triton"}
MODULES = 320


def test_budgets_are_kept() -> None:
    assert list(budgets.excesses()) == []


def test_excesses_are_seen(tmp_path: Path) -> None:
    package = tmp_path / "packages/loong-x/src/loong_x"
    (package / "models").mkdir(parents=True)
    (package / "long.py").write_text("\n" * (budgets.FILE_LINES + 1))
    body = "".join(f"    x{i} = {i}\n" for i in range(budgets.FUNCTION_LINES))
    (package / "wide.py").write_text(f"def wide() -> None:\n{body}")
    (package / "models/family.py").write_text("\n" * (budgets.FAMILY_LINES + 1))
    for number in range(budgets.MEGATRON_FILES + 1):
        (package / f"user{number}.py").write_text("def f() -> None:\n    import megatron.core\n")
    core = tmp_path / "packages/loong-core/src/loong_core"
    core.mkdir(parents=True)
    hooks = "".join(f"@hookspec\ndef loong_{i}() -> None: ...\n" for i in range(budgets.HOOKS + 1))
    (core / "hookspecs.py").write_text(hooks)
    found = "\n".join(budgets.excesses(tmp_path))
    for part in (
        "long.py: 401",
        "wide.py:1: wide has 61",
        "family.py: 151",
        "21 hooks",
        f"{budgets.MEGATRON_FILES + 1} files import megatron",
    ):
        assert part in found


RECIPE = """
run: {name: unused}
model: {family: qwen3, config: qwen3-0.6b}
data: {source: python_library, tokenizer: {train: 512}, seq_len: 64}
precision: fp32
backend: cpu
"""


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["plan", "recipe.yaml"], ["plugins"], ["models"]])
def test_the_parent_process_imports_no_tensor_library(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    program = (
        "import json, sys\n"
        "from loong_core.cli import main\n"
        f"sys.argv = ['loong', *{words!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    modules = json.loads(done.stdout.splitlines()[-1])
    assert HEAVY.isdisjoint(name.split(".")[0] for name in modules)
    if words == ["--help"]:
        assert len(modules) <= MODULES, f"`loong --help` imports {len(modules)} modules"
