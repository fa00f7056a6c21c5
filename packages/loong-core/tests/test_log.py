"""Where messages go: all into the rank's file, few to the console."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from loong_core import log


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    log.stop()
    logging.getLogger().setLevel(level)


def test_everything_is_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = log.start(tmp_path, 0)
    assert path == tmp_path / "logs" / "rank-0000.log"
    log.logger.info("quiet fact")
    log.logger.warning("look here \u2192")
    logging.getLogger("library").error("their trouble")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("a python warning", UserWarning, stacklevel=1)
    log.stop()
    text = path.read_text(encoding="utf-8")
    for part in ("quiet fact", "look here \u2192", "their trouble", "a python warning"):
        assert part in text
    assert capsys.readouterr().err == "WARNING: look here \u2192\n"


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = log.start(tmp_path, 13)
    log.logger.warning("only in the file")
    assert path.name == "rank-0013.log" and "only in the file" in path.read_text()
    assert capsys.readouterr().err == ""


def test_plugins_reach_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.start(tmp_path, 0)
    logging.getLogger("loong_acme.model").warning("from a plugin")
    logging.getLogger("loongish").warning("not ours")
    assert capsys.readouterr().err == "WARNING: from a plugin\n"


def test_a_second_start_replaces_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = list(logging.getLogger().handlers)
    log.start(tmp_path / "one", 0)
    path = log.start(tmp_path / "two", 0)
    log.logger.warning("said")
    assert path.read_text().count("said") == 1
    assert "said" not in (tmp_path / "one" / "logs" / "rank-0000.log").read_text()
    assert capsys.readouterr().err.count("said") == 1
    log.stop()
    assert logging.getLogger().handlers == before


def test_appends_when_a_run_continues(tmp_path: Path) -> None:
    for word in ("first", "second"):
        log.start(tmp_path, 0)
        log.logger.info(word)
    log.stop()
    assert "first" in (text := (tmp_path / "logs" / "rank-0000.log").read_text()) and "second" in text


def test_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.start(tmp_path, 0)
    assert [log.once("fallback"), log.once("fallback"), log.once("other")] == [True, False, True]
    assert capsys.readouterr().err == "WARNING: fallback\nWARNING: other\n"
    log.start(tmp_path, 0)
    assert log.once("fallback"), "a new run says it again"


def test_failure_writes_the_traceback_to_the_file_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = log.start(tmp_path, 0)
    try:
        raise ValueError("broken row")
    except ValueError as error:
        log.failure(error)
    text = path.read_text()
    assert "ValueError: broken row" in text and "test_failure_writes" in text
    assert capsys.readouterr().err == ""
