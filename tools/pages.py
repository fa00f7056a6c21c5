"""Writes the parts of the docs that repeat the code: hooks, descriptors, recipe keys, commands.

    python tools/pages.py            # write
    python tools/pages.py --check    # exit with 1 where a page on disk differs

Hooks and descriptors are read from the source text, so that defaults and comments are shown as they were written.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "packages/loong-core/src/loong_core"
NOTE = "<!-- Written by tools/pages.py from the source; `nox -s docs` renews it. -->\n"


def _text(docstring: str | None) -> str:
    return inspect.cleandoc(docstring or "").replace("`None`", "None")


def hooks_page() -> str:
    """docs/hooks.md: every hook with its signature, and every descriptor that crosses the plugin boundary."""
    specs = ast.parse((CORE / "hookspecs.py").read_text(encoding="utf-8"))
    module = _text(ast.get_docstring(specs)).split("\n", 1)[1].strip()
    lines = ["# Hooks\n", NOTE, module + "\n"]
    for node in specs.body:
        if not isinstance(node, ast.FunctionDef) or not node.decorator_list:
            continue
        first = "firstresult" in ast.unparse(node.decorator_list[0])
        returns = ast.unparse(node.returns) if node.returns else "None"
        lines += [
            f"## {node.name}\n",
            f"```python\ndef {node.name}({ast.unparse(node.args)}) -> {returns}\n```\n",
            _text(ast.get_docstring(node)) + (" *(first result wins)*" if first else "") + "\n",
        ]
    lines += ["# Descriptors\n", "What provider hooks return, and what is handed to the code behind a reference.\n"]
    types = ast.parse((CORE / "types.py").read_text(encoding="utf-8"))
    for node in types.body:
        if isinstance(node, ast.ClassDef):
            fields = [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]
            body = "\n".join(f"    {field}" for field in fields)
            lines += [f"## {node.name}\n", f"```python\n{body}\n```\n", _text(ast.get_docstring(node)) + "\n"]
    return "\n".join(lines).rstrip() + "\n"


def type_name(annotation: Any) -> str:
    """A type as a user reads it: `auto`, `true/false`, a list of allowed words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{word}`" for word in arguments)
    if origin in (typing.Union, UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is tuple:
        return f"{len(arguments)} numbers"
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    plain = {NoneType: "null", bool: "true/false", int: "integer", float: "number", str: "text", Path: "path"}
    return plain.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, tuple | list | dict) else str(value)


def recipe_rows(section: Any, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key below `section`, in the order of the source."""
    from pydantic import BaseModel

    for name, field in section.model_fields.items():
        key = prefix + (field.alias or name)
        nested = [
            kind
            for kind in (field.annotation, *typing.get_args(field.annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if not (nested and field.annotation is nested[0]):
            plain = [type_name(kind) for kind in (typing.get_args(field.annotation) or ()) if kind not in nested]
            shown = " or ".join(["mapping", *plain]) if nested else type_name(field.rebuild_annotation())
            yield key, shown, _default(field), (field.description or "").replace("\n", " ")
        for kind in nested:
            yield from recipe_rows(kind, f"{key}.")


def recipe_table() -> str:
    """The key tables of docs/recipes.md, one per section."""
    from loong_core.recipe import Recipe

    sections: dict[str, list[str]] = {}
    for key, kind, default, meaning in recipe_rows(Recipe):
        head = key.split(".")[0] if "." in key else ""
        row = f"| `{key}` | {kind} | `{default}` | {meaning.replace('|', chr(92) + '|')} |"
        sections.setdefault(head, []).append(row)
    head = "| key | type | default | meaning |\n|---|---|---|---|\n"
    parts = [head + "\n".join(sections.pop("")) + "\n"]
    parts += [f"### {name}\n\n{head}" + "\n".join(rows) + "\n" for name, rows in sections.items()]
    return "\n".join(parts)


def commands(command: Any, words: tuple[str, ...] = ("loong",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command of a click command tree, groups included, with the words that call it."""
    yield words, command
    for name in sorted(getattr(command, "commands", {})):
        yield from commands(command.commands[name], (*words, name))


def command_tree() -> Any:
    """loong's own command line as a click command, third-party plugins left out; `loong generate` with its variants."""
    import typer.main

    from loong_core import plugins
    from loong_core.cli import build, generate
    from loong_core.registry import Registry

    registry = Registry(plugins.load(environ={"LOONG_PLUGINS": "llm,vla,ckpt,ops"}))
    tree = typer.main.get_command(build(registry))
    variants = {f"generate ({names})": command for names, command in generate.variants(registry).items()}
    tree.commands |= variants  # type: ignore[attr-defined]
    return tree


def commands_page() -> str:
    """docs/commands.md: every command with its arguments and options."""
    lines = ["# Commands\n", NOTE]
    lines.append("Exit codes: 0 ok, 1 the run failed, 2 the input is wrong. Every command has `--help`.\n")
    for words, command in commands(command_tree()):
        if hasattr(command, "commands"):
            continue
        called = [word.split(" (")[0] for word in words]
        arguments = [_metavar(item) for item in command.params if item.param_type_name == "argument"]
        lines += [f"## {' '.join(words)}\n", f"```console\n{' '.join([*called, '[OPTIONS]', *arguments])}\n```\n"]
        lines.append(_help(command.help) + "\n")
        options = [item for item in command.params if item.param_type_name == "option" and not item.hidden]
        if options:
            lines.append("| option | meaning |\n|---|---|")
            for item in options:
                names = ", ".join(f"`{name}`" for name in (*item.opts, *item.secondary_opts))
                meaning = _help(item.help).replace("|", "\\|")
                lines.append(f"| {names} | {meaning} |")
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _metavar(argument: Any) -> str:
    shown = argument.name.upper() + ("..." if argument.nargs != 1 else "")
    return shown if argument.required else f"[{shown}]"


def _help(text: str | None) -> str:
    """A command's help as markdown: what is indented becomes a block of code."""
    plain = inspect.cleandoc(text or "").replace("\b\n", "").replace("\f", "").strip()
    escaped = re.sub(r"^(?!  ).*$", lambda line: line[0].replace("<", "&lt;"), plain, flags=re.MULTILINE)
    return re.sub(r"(?:^  .*\n?)+", _code, escaped, flags=re.MULTILINE).strip()


def _code(indented: re.Match[str]) -> str:
    return f"\n```console\n{inspect.cleandoc(indented[0])}\n```\n"


def _filled(text: str, name: str, content: str) -> str:
    """`text` with what stands between the two markers of `name` replaced."""
    begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}{NOTE}\n{content}\n{end}{after}"


def _with_files(text: str, root: Path) -> str:
    """`text` with the files named by `<!-- begin: file PATH -->` markers shown between them as they are on disk."""
    languages = {".toml": "toml", ".yaml": "yaml", ".py": "python"}
    for name in re.findall(r"<!-- begin: file (\S+) -->", text):
        content = (root / name).read_text(encoding="utf-8").rstrip()
        block = f"`{name}`:\n\n```{languages.get(Path(name).suffix, 'text')}\n{content}\n```\n"
        text = _filled(text, f"file {name}", block)
    return text


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Path and right content of every page that is generated, in whole or in part."""
    docs = root / "docs"
    recipes = (docs / "recipes.md").read_text(encoding="utf-8")
    shown = {path: path.read_text(encoding="utf-8") for path in sorted(docs.glob("write-a-*.md"))}
    return {
        docs / "hooks.md": hooks_page(),
        docs / "commands.md": commands_page(),
        docs / "recipes.md": _filled(recipes, "keys", recipe_table()),
        **{path: _with_files(text, root) for path, text in shown.items()},
    }


def main(words: list[str]) -> int:
    """Write the pages, or with `--check` compare them; the exit code."""
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in words:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date; run: python tools/pages.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages()[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
