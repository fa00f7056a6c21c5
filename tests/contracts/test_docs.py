"""The docs name every hook with its arguments, every recipe key and every command, and repeat the code exactly."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pages
import pytest

from loong_core import hookspecs

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
MARKDOWN = sorted(
    [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("packages/*/README.md")]
)
HOOKS = [name for name in vars(hookspecs) if name.startswith("loong_")]


def _read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", list(pages.pages()), ids=lambda path: path.name)
def test_generated_pages_are_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == pages.pages()[path], "run: nox -s docs"


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_documented_with_its_arguments(name: str) -> None:
    section = re.search(rf"^## {name}\n(.*?)(?=^#)", _read("hooks.md") + "#", re.MULTILINE | re.DOTALL)
    assert section is not None, name
    signature = re.search(rf"def {name}\((.*)\) ->", section[1])
    assert signature is not None
    documented = [part.split(":")[0].strip() for part in signature[1].split(",") if part.strip()]
    arguments = list(inspect.signature(getattr(hookspecs, name)).parameters)
    assert [word for word in documented if word in arguments] == arguments
    assert getattr(hookspecs, name).__doc__.strip() in section[1]


def test_every_recipe_key_is_documented_and_explained() -> None:
    from loong_core.recipe import Recipe

    rows = list(pages.recipe_rows(Recipe))
    text = _read("recipes.md")
    assert len(rows) > 50
    for key, kind, _, meaning in rows:
        assert f"| `{key}` |" in text
        assert kind and meaning, f"{key} has no type or no docstring in recipe.py"


def test_every_command_is_documented() -> None:
    text = _read("commands.md")
    for words, command in pages.commands(pages.command_tree()):
        if not hasattr(command, "commands"):
            assert f"## {' '.join(words)}\n" in text
            assert command.help, f"{words} has no help"


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        assert str(page.relative_to(DOCS)) in navigation


def test_metrics_of_the_docs_are_those_of_the_code() -> None:
    from loong_core.train.metrics import FIELDS

    table = _read("run-folder.md").split("## metrics.jsonl")[1]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == tuple(FIELDS)


def test_commands_in_the_docs_exist() -> None:
    tree = {words[1] for words, _ in pages.commands(pages.command_tree()) if len(words) > 1}
    for path in MARKDOWN:
        for block in re.findall(
            r"^```(?:bash|console)\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            for name in re.findall(r"^(?:\.venv/bin/)?loong ([a-z]+)\b", block, re.MULTILINE):
                assert name in tree, f"{path.name} shows `loong {name}`"
