"""Every task that a person or CI runs; `nox -l` lists them, each takes words after `--`.

Sessions keep their environment between runs. They use uv where it is installed, otherwise virtualenv and pip.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests"]

ROOT = Path(__file__).parent
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
META = "loong-train"
CONSTRAINTS = ("-c", "constraints/tested.txt", "-c", "constraints/dev.txt")
PACKAGE_TESTS = [f"packages/{package}/tests" for package in PACKAGES]
COMMON_TESTS = ["tests/contracts", "tests/e2e"]
PROMPT = 'def read_lines(path):\n    """'
CONTRACT_TOOLS = ("build", "hatchling", "import-linter", "ruff", "towncrier", "uv")
# Tests mean the same on every machine: no GPU, one thread a process (ranks share the cores), no network for weights.
CPU_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def workspace(session: nox.Session, *tools: str) -> None:
    """Install every package editable, with the extras that tests use, beside `tools`."""
    extras = {"loong-core": "[data,megatron,testing]"}
    editable = [word for name in PACKAGES for word in ("-e", f"packages/{name}{extras.get(name, '')}")]
    session.install(*CONSTRAINTS, *editable, *tools)


def pytest(session: nox.Session, paths: list[str], environment: dict[str, str]) -> None:
    """Run pytest on the words after `--` if they name paths, on `paths` otherwise."""
    session.run("python", "-m", "pytest", *([] if _named(session) else paths), *session.posargs, env=environment)


def _named(session: nox.Session) -> list[str]:
    """Those of the words after `--` that name paths."""
    return [word for word in session.posargs if Path(word.split("::")[0]).exists()]


@nox.session
def quickstart(session: nox.Session) -> None:
    """The main job: install loong, train a small Qwen3 on the CPU, write a report, export it, let it write."""
    session.install("-c", "constraints/tested.txt", ".[llm]")
    given = next((word for word in session.posargs if word.startswith("run.name=")), "")
    name = given.removeprefix("run.name=") or _free_name("quickstart")
    words = [*session.posargs, *([] if given else [f"run.name={name}"]), "run.dir=runs"]
    session.run("loong", "train", "quickstart", *words, env={"TOKENIZERS_PARALLELISM": "false"})
    session.run("loong", "generate", f"runs/{name}", PROMPT, "--max-new-tokens", "80", "--temperature", "0.7")


def _free_name(stem: str) -> str:
    """`stem`, or `stem` with the first number that no run folder has."""
    return next(
        name for n in range(1, 1000) if not (ROOT / "runs" / (name := f"{stem}-{n}" if n > 1 else stem)).exists()
    )


@nox.session
def tests(session: nox.Session) -> None:
    """Everything that needs no GPU: the packages' own tests beside those of all together."""
    workspace(session, *CONTRACT_TOOLS)
    if _named(session):
        pytest(session, [], CPU_ENVIRONMENT)
        return
    words = [*session.posargs, "--", *PACKAGE_TESTS, "--", *COMMON_TESTS]
    session.run("python", "tools/run_tests.py", *words, env=CPU_ENVIRONMENT)


@nox.session
def contracts(session: nox.Session) -> None:
    """What the packages promise each other and outsiders: docs, command line, budgets, imports, third parties."""
    workspace(session, *CONTRACT_TOOLS)
    pytest(session, ["tests/contracts"], CPU_ENVIRONMENT)


@nox.session
def e2e(session: nox.Session) -> None:
    """`loong train` from the command line to the export, on the CPU."""
    workspace(session)
    pytest(session, ["tests/e2e"], CPU_ENVIRONMENT)


@nox.session
def parity(session: nox.Session) -> None:
    """Policies and robot data against LeRobot, in an interpreter of its own: LOONG_LEROBOT_PYTHON, or one made here."""
    workspace(session)
    peer = os.environ.get("LOONG_LEROBOT_PYTHON") or str(_lerobot(session))
    paths = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("packages/loong-vla/tests/test_*parity.py"))
    pytest(session, paths, {**CPU_ENVIRONMENT, "LOONG_LEROBOT_PYTHON": peer})


def _lerobot(session: nox.Session) -> Path:
    """The interpreter of an environment with LeRobot beside the session's own; made once."""
    folder = Path(session.virtualenv.location).parent / "lerobot"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        session.run("python", "-m", "venv", "--clear", str(folder))
        session.run(str(python), "-m", "pip", "install", "--quiet", "-r", "constraints/lerobot.txt", external=True)
        (folder / "complete").touch()
    return python


@nox.session
def gpu(session: nox.Session) -> None:
    """Tests marked `gpu`, on a machine with a CUDA device; the nvidia extra brings Transformer Engine."""
    workspace(session)
    session.install(*CONSTRAINTS, ".[nvidia]")
    pytest(session, [*PACKAGE_TESTS, *COMMON_TESTS, "-m", "gpu"], {})


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, the import contracts of the architecture page, and its size budgets."""
    workspace(session, "import-linter", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")
    session.run("python", "tools/budgets.py")


@nox.session
def types(session: nox.Session) -> None:
    """mypy: strict for the contract modules, its defaults for the rest."""
    workspace(session, "mypy", "types-pyyaml")
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Write the generated pages and build the site, strictly; `-- --check` fails where a page is out of date."""
    workspace(session, "mkdocs-material")
    session.run("python", "tools/pages.py", *session.posargs)
    session.run("mkdocs", "build", "--strict", "--quiet")


@nox.session
@nox.parametrize("package", [*PACKAGES, META], ids=[*PACKAGES, META])
def build(session: nox.Session, package: str) -> None:
    """Source dist and wheel of one package in dist/, installed once and its version read back."""
    session.install(*CONSTRAINTS, "build", "hatchling", "pip")
    with tempfile.TemporaryDirectory() as scratch:
        folder = ROOT / "packages" / package if package != META else _released_meta(Path(scratch))
        session.run("python", "-m", "build", str(folder), "--outdir", "dist")
    stem = package.replace("-", "_")
    wheel = max((ROOT / "dist").glob(f"{stem}-*.whl"), key=lambda path: path.stat().st_mtime)
    session.run("python", "-m", "pip", "install", "--no-deps", "--force-reinstall", "--quiet", str(wheel))
    session.run("python", "-c", f"from importlib.metadata import version; print({package!r}, version({package!r}))")


def _released_meta(folder: Path) -> Path:
    """The meta dist outside the checkout, where its extras are version ranges."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "tools/extras.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@nox.session
def release(session: nox.Session) -> None:
    """`-- loong-llm minor`: raise the version, write the changelog section. `-- check TAG`: a tag says its version."""
    if len(session.posargs) != 2 or (session.posargs[0] != "check" and session.posargs[0] not in PACKAGES):
        session.error(f"usage: nox -s release -- <{'|'.join(PACKAGES)}> <major|minor|patch|current>, or -- check <tag>")
    session.install(*CONSTRAINTS, "hatchling", "towncrier")
    session.run("python", "tools/release.py", *session.posargs)
