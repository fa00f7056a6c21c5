"""The import contracts of the architecture page, run by import-linter; and that they bite."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = Path(sys.executable).with_name("lint-imports")


def _lint(config: Path) -> subprocess.CompletedProcess[str]:
    words = [str(LINT), "--config", str(config), "--no-cache"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def test_contracts_are_kept() -> None:
    done = _lint(ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("contract", "broken_by"),
    [
        ('type = "layers"\nlayers = ["loong_core", "loong_llm | loong_ckpt"]', "loong_llm"),
        ('type = "forbidden"\nsource_modules = ["loong_core.train.worker"]\nforbidden_modules = ["torch"]', "torch"),
        ('type = "forbidden"\nsource_modules = ["loong_llm.decoder"]\nforbidden_modules = ["megatron"]', "megatron"),
    ],
    ids=["layers", "imports inside functions", "packages outside"],
)
def test_a_broken_contract_is_seen(tmp_path: Path, contract: str, broken_by: str) -> None:
    config = tmp_path / "pyproject.toml"
    config.write_text(
        '[tool.importlinter]\nroot_packages = ["loong_core", "loong_llm", "loong_ckpt"]\n'
        "include_external_packages = true\nexclude_type_checking_imports = true\n"
        f'[[tool.importlinter.contracts]]\nid = "x"\nname = "x"\n{contract}\n'
    )
    done = _lint(config)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout and broken_by in done.stdout


def test_the_line_covers_every_module_of_the_parent_process() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = {contract["id"]: contract for contract in settings["tool"]["importlinter"]["contracts"]}
    wanted = {"hookspecs", "types", "plugins", "registry", "recipe", "recipe_load", "validate", "errors", "cli"}
    wanted |= {"launch", "cluster", "run_folder"}
    assert {f"loong_core.{name}" for name in wanted} <= set(contracts["line"]["source_modules"])


def test_every_package_is_below_the_architecture() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {path.name for path in ROOT.glob("packages/*/src/*") if path.is_dir()}
    assert packages == set(settings["tool"]["importlinter"]["root_packages"])
