"""Tests in several processes: what all of them print, their counts together, and the exit code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import run_tests

# What the runner is tried on. The skip is one for it to count: nothing of loong is skipped by it.
FILES = {
    "good": "def test_one(): pass\n\n\ndef test_two(): pass\n",
    "skipping": "import pytest\n\n\n@pytest.mark.skip(reason='for the runner to count')\ndef test_three(): pass\n",
    "bad": "def test_four(): assert 1 == 2\n",
    "dying": "import os\n\n\ndef test_five(): os._exit(3)\n",
    "empty": "",
}


@pytest.mark.parametrize(
    ("groups", "words", "code", "closing"),
    [
        (["good", "skipping"], [], 0, "2 passed, 1 skipped"),
        (["good", "bad", "skipping"], [], 1, "1 failed, 2 passed, 1 skipped"),
        (["good", "empty"], [], 0, "2 passed"),
        (["good", "skipping"], ["-k", "two"], 0, "2 deselected, 1 passed"),
        (["good", "dying"], [], 3, "1 error, 2 passed"),
        (["empty"], [], 5, "no tests ran"),
    ],
)
def test_counts_and_code(groups: list[str], words: list[str], code: int, closing: str, tmp_path: Path) -> None:
    paths = []
    for name in groups:
        path = tmp_path / f"test_{name}.py"
        path.write_text(FILES[name])
        paths += ["--", str(path)]
    command = [sys.executable, run_tests.__file__, "-p", "no:cacheprovider", f"--rootdir={tmp_path}", *words, *paths]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(rf"{closing} in [\d.]+s", last), last
    assert ("assert 1 == 2" in done.stdout) == ("bad" in groups)
