"""Releases one package: raises its version, turns its change fragments into a changelog section, checks tags.

python tools/release.py loong-llm minor      # edits files; review, commit, merge, then tag
python tools/release.py check loong-llm-v0.2.0
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECTION = re.compile(r"^## (\d+\.\d+\.\d+) \(\d{4}-\d{2}-\d{2}\)$", re.MULTILINE)
FRAGMENT = re.compile(r"^(\d+|\+[\w-]+)\.(breaking|feature|fix|perf|docs)\.md$")


def folder(package: str, root: Path = ROOT) -> Path:
    """Folder of `package`; exits with the allowed names when there is none."""
    path = root / "packages" / package
    if not (path / "pyproject.toml").is_file():
        names = ", ".join(sorted(found.parent.name for found in root.glob("packages/*/pyproject.toml")))
        raise SystemExit(f"no package named '{package}'; there are: {names}")
    return path


def version(package: str, root: Path = ROOT) -> str:
    """The version in the package's `__about__.py`."""
    (about,) = folder(package, root).glob("src/*/__about__.py")
    found = re.search(r'^__version__ = "(.+)"$', about.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, about
    return found[1]


def fragments(package: str, root: Path = ROOT) -> list[Path]:
    """Change fragments waiting for the next release; exits where a name has the wrong form."""
    found = sorted((folder(package, root) / "changes").glob("[!.]*"))
    for path in found:
        if not FRAGMENT.match(path.name):
            raise SystemExit(
                f"{path.relative_to(root)}: a fragment is called <number>.<type>.md or +<word>.<type>.md, "
                "type being one of breaking, feature, fix, perf, docs"
            )
    return found


def check_tag(tag: str, root: Path = ROOT) -> str:
    """The package whose version `tag` (`<package>-v<version>`) says; exits where tag, version or changelog differ."""
    package, separator, number = tag.rpartition("-v")
    if not separator:
        raise SystemExit(f"'{tag}' is no release tag; one looks like loong-llm-v0.2.0")
    if (declared := version(package, root)) != number:
        raise SystemExit(f"tag {tag} says {number}, but {package} declares {declared} in __about__.py")
    sections = SECTION.findall((folder(package, root) / "CHANGELOG.md").read_text(encoding="utf-8"))
    if sections[:1] != [number]:
        newest = sections[0] if sections else "no release"
        raise SystemExit(f"the newest section of {package}'s CHANGELOG.md is {newest}, not {number}")
    return package


def bump(package: str, part: str, root: Path = ROOT) -> str:
    """Raise `part` of the version (`current`: none) and write the changelog section; returns the version."""
    if part not in ("major", "minor", "patch", "current"):
        raise SystemExit(f"'{part}' is no part of a version; allowed: major, minor, patch, and current for the first")
    where = folder(package, root)
    if not fragments(package, root):
        raise SystemExit(f"packages/{package}/changes holds no fragment: there is nothing to tell users")
    tools = [sys.executable, "-m"]
    if part != "current":
        subprocess.run([*tools, "hatchling", "version", part], cwd=where, check=True)
    number = version(package, root)
    subprocess.run([*tools, "towncrier", "build", "--yes", "--version", number], cwd=where, check=True)
    check_tag(f"{package}-v{number}", root)
    return number


def main(words: list[str]) -> None:
    """Entry point: `check <tag>` or `<package> <part>`."""
    if len(words) != 2:
        raise SystemExit(__doc__)
    if words[0] == "check":
        print(f"{words[1]} is {check_tag(words[1])}")
        return
    number = bump(*words)
    print(f"git commit -a -m 'release {words[0]} v{number}'; after the merge: git tag {words[0]}-v{number}")


if __name__ == "__main__":
    main(sys.argv[1:])
