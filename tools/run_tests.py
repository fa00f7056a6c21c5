"""Run pytest in several processes at once, each over paths of its own, and end with one line that counts all of it.

    python tools/run_tests.py [WORD ...] -- PATH ... -- PATH ...

The words go to every process; its paths follow, behind a `--` for each. Tests fork the ranks of their worlds from the
process that runs them, so it must have no threads: those that share tests out among workers (pytest-xdist) do.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

CLOSING = re.compile(r"^=* ?(no tests ran|\d+ [a-z]+(?:, \d+ [a-z]+)*) in [\d.]+s")
COUNT = re.compile(r"(\d+) ([a-z]+)")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
NOTHING_RAN = 5
"""pytest's exit code where the words select none of a process's tests."""


def split(words: list[str]) -> tuple[list[str], list[list[str]]]:
    """What goes to every process, and the paths of each; without any, one process has pytest's own."""
    groups: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            groups.append([])
        else:
            groups[-1].append(word)
    return groups[0], groups[1:] or [[]]


def run(words: list[str]) -> tuple[int, Counter[str]]:
    """One process, its lines shown as they come: its exit code, and what its closing line counts. One that ends without
    has had an error."""
    command = [sys.executable, "-m", "pytest", *words]
    found = Counter({"error": 1})
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if closing := CLOSING.match(COLOUR.sub("", line)):
                found = Counter({kind: int(number) for number, kind in COUNT.findall(closing[1])})
    return process.returncode, found


def main(words: list[str]) -> int:
    """Run them all; 0 where every process passed or had nothing to run, and one of them ran a test."""
    common, groups = split(words)
    begin = time.monotonic()
    with ThreadPoolExecutor(len(groups)) as pool:
        results = list(pool.map(lambda paths: run([*common, *paths]), groups))
    total = sum((found for _, found in results), Counter[str]())
    counted = ", ".join(f"{total[kind]} {kind}" for kind in sorted(total, key=lambda kind: (kind == "skipped", kind)))
    print(f"{counted or 'no tests ran'} in {time.monotonic() - begin:.2f}s")
    codes = [code for code, _ in results if code != NOTHING_RAN] or [NOTHING_RAN]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
