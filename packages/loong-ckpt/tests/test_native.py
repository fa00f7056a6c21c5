"""A kill, a full disk or a flipped bit at any moment leaves a checkpoint that is whole, and says what is not."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ckpt_helpers import MemoryEngine, assert_same_tensors, engine_for, make_plan, make_run, read_all, save_tiny

from loong_ckpt import files, hf, native, native_folder
from loong_core.errors import CheckpointError
from loong_core.testing.ranks import run_ranks

CALLS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    return save_tiny("qwen3", tmp_path / "in", num_hidden_layers=1)


@pytest.fixture
def run(tmp_path: Path, config: dict[str, Any]) -> Any:
    return make_run("qwen3", config, tmp_path / "run", checkpoint={"keep": 2})


def filled(engine: MemoryEngine, value: float) -> MemoryEngine:
    for _, tensor, *_ in engine.held:
        tensor.fill_(value)
    return engine


def save(run: Any, step: int, value: float | None = None) -> Path:
    return native.save_checkpoint(run, filled(engine_for(run), step if value is None else value), {"row": step}, step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(run: Any) -> None:
    path = save(run, 5)
    assert path == run.folder / "checkpoints" / "step-00000005"
    assert (path.parent / "latest").read_text() == "step-00000005\n"
    assert names(path) == [
        "config.json", "engine", "layout.json", "manifest.json", "recipe.yaml", "state.json",
    ]  # fmt: skip
    engine = engine_for(run)
    state = native.load_checkpoint(run, engine, path)
    assert (state["step"], state["seed"], state["data"]) == (5, 0, {"row": 5})
    assert all((tensor == 5).all() for _, tensor, *_ in engine.held)
    assert native.claims(path) and not hf.claims(path) and not native.check(path)


def test_retention_keeps_the_newest(run: Any) -> None:
    for step in (10, 20, 30, 40):
        save(run, step)
    folder = run.folder / "checkpoints"
    assert names(folder) == ["latest", "step-00000030", "step-00000040"]
    assert native.find_latest(folder) == folder / "step-00000040"


def test_after_going_back_the_later_save_is_the_newest(run: Any) -> None:
    for step in (10, 20, 15):
        save(run, step)
    folder = run.folder / "checkpoints"
    assert names(folder) == ["latest", "step-00000015", "step-00000020"]
    assert native.find_latest(folder) == folder / "step-00000015"


def test_the_same_step_can_be_saved_again(run: Any) -> None:
    save(run, 10)
    path = save(run, 10, value=3.0)
    engine = engine_for(run)
    native.load_checkpoint(run, engine, path)
    assert all((tensor == 3).all() for _, tensor, *_ in engine.held)
    assert names(path.parent) == ["latest", "step-00000010"]


# ------------------------------------------------------------------------------------------------- kills
def killed_at(count: int, action: Callable[[], object]) -> bool:
    """Run `action` in a forked process that dies before its `count`-th call that changes the disk's names or flushes.

    Returns whether it died; False if it finished with fewer calls.
    """
    with warnings.catch_warnings():
        # Other tests may have started threads of torch; the child uses none of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        left = [count]
        lock = threading.Lock()
        for name in CALLS:
            original = getattr(os, name)

            def deadly(*args: Any, original: Any = original, **options: Any) -> Any:
                with lock:
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **options)

            setattr(os, name, deadly)
        try:
            action()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed instead of being killed"
    return False


@pytest.mark.parametrize("step", [30, 20], ids=["new step", "same step again"])
@pytest.mark.parametrize("async_", [False, True])
def test_killed_anywhere_a_whole_checkpoint_remains(run: Any, tmp_path: Path, step: int, async_: bool) -> None:
    for done in (10, 20):
        save(run, done)
    folder, before = run.folder / "checkpoints", tmp_path / "before"
    shutil.copytree(folder, before)
    engine = filled(engine_for(run), 99.0)

    def action() -> None:
        writer = native.CheckpointWriter(run, engine, keep=2, async_=async_)
        writer.save({"row": 99}, step)
        writer.close()

    seen = set()
    for count in range(1, 500):
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        died = killed_at(count, action)
        found = native.find_latest(folder)
        assert found is not None
        again = engine_for(run)
        state = native.load_checkpoint(run, again, found)
        assert (state["step"], state["data"]["row"]) in {(20, 20), (step, 99)}
        assert all((tensor == state["data"]["row"]).all() for _, tensor, *_ in again.held)
        assert not [name for name in names(folder) if name.startswith(".")]
        assert not [path for path in native_folder.complete(folder) if native.manifest.problems(path)]
        seen.add(state["data"]["row"])
        if not died:
            break
    assert seen == {20, 99}
    assert count > 20
    assert names(folder) == (["latest", "step-00000020", "step-00000030"] if step == 30 else
                             ["latest", "step-00000010", "step-00000020"])  # fmt: skip


def test_an_interrupted_save_does_not_disturb_the_next(run: Any) -> None:
    save(run, 10)
    temporary = files.staging(run.folder / "checkpoints" / "step-00000020")
    (temporary / "engine").mkdir(parents=True)
    (temporary / "engine" / "half").write_text("half")
    path = save(run, 20)
    assert not (path / "engine" / "half").exists()
    assert not native.manifest.extra_files(path)


# ------------------------------------------------------------------------------------------------- damage
def damage(path: Path, how: str, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    elif how == "truncate":
        del content[generator.randrange(len(content)) :]
    elif how == "append":
        content += b"\0"
    path.write_bytes(content)
    if how == "remove":
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "truncate", "append", "remove"])
def test_damage_is_found_and_the_one_before_is_taken(run: Any, tmp_path: Path, how: str) -> None:
    first, second = save(run, 10), save(run, 20)
    shutil.copytree(second, tmp_path / "whole")
    generator = random.Random(how)
    for name in [path.relative_to(second) for path in second.rglob("*") if path.is_file()] * 3:
        shutil.rmtree(second)
        shutil.copytree(tmp_path / "whole", second)
        damage(second / name, how, generator)
        reports: list[str] = []
        if name == Path("manifest.json") and not native.manifest.problems(second):
            continue  # white space of the manifest carries nothing
        assert native.find_latest(first.parent, reports.append) == first, name
        assert len(reports) == 1 and str(second) in reports[0]
        assert native.find_latest_together(run) == first
        engine = engine_for(run)
        with pytest.raises(CheckpointError):
            native.load_checkpoint(run, engine, second)
        assert all((tensor == 7).all() for _, tensor, *_ in engine.held), "bytes were used before they were verified"


def test_no_checkpoint_is_none_and_a_wrong_folder_an_error(run: Any, tmp_path: Path) -> None:
    assert native.find_latest(tmp_path / "absent") is None
    assert native.find_latest_together(run) is None
    with pytest.raises(CheckpointError, match="no native checkpoint"):
        native.load_checkpoint(run, engine_for(run), tmp_path / "in")


def test_a_manifest_cannot_point_outside(run: Any) -> None:
    path = save(run, 10)
    content = json.loads((path / "manifest.json").read_text())
    content["files"]["../../x"] = {"size": 0, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(content))
    assert "outside" in native.check(path)[0]


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "make room"), (errno.EACCES, "writable")])
@pytest.mark.parametrize("async_", [False, True])
def test_a_failing_disk_keeps_what_was_there(
    run: Any, monkeypatch: pytest.MonkeyPatch, number: int, words: str, async_: bool
) -> None:
    first = save(run, 10)
    writer = native.CheckpointWriter(run, filled(engine_for(run), 1.0), keep=1, async_=async_)

    def broken(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(CheckpointError, match=f"step-00000020.*intact.*{words}"):
            writer.save({}, 20)
            writer.close()
    assert native.find_latest(first.parent) == first
    assert writer.save({}, 20).is_dir() or async_
    writer.close()
    assert native.find_latest(first.parent) == first.parent / "step-00000020"


def test_an_engine_that_cannot_write_is_explained(run: Any) -> None:
    engine = engine_for(run)

    def broken(folder: Path) -> None:
        raise RuntimeError("writer process died")

    engine.save_state = broken  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"writer process died.*GB are free"):
        native.save_checkpoint(run, engine, {}, 10)


# ------------------------------------------------------------------------------------------- background
def test_in_the_background_one_at_a_time(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    active, most = [0], [0]
    seal = native._seal

    def slow(final: Path) -> None:
        active[0] += 1
        most[0] = max(most[0], active[0])
        time.sleep(0.05)
        seal(final)
        active[0] -= 1

    monkeypatch.setattr(native, "_seal", slow)
    writer = native.CheckpointWriter(run, engine_for(run), keep=None, async_=True)
    first = writer.save({}, 1)
    assert not first.exists() and writer.committed() == []
    for step in (2, 3):
        writer.save({}, step)
    writer.close()
    assert most[0] == 1
    assert [path.name for path in writer.committed()] == ["step-00000001", "step-00000002", "step-00000003"]
    assert writer.committed() == []


def test_the_state_is_that_of_the_moment_of_saving(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, seal = threading.Event(), native._seal

    def late(final: Path) -> None:
        ready.wait(10)
        seal(final)

    monkeypatch.setattr(native, "_seal", late)
    engine = filled(engine_for(run), 1.0)
    writer = native.CheckpointWriter(run, engine, async_=True)
    path = writer.save({}, 1)
    filled(engine, 2.0)
    ready.set()
    writer.close()
    native.load_checkpoint(run, engine, path)
    assert all((tensor == 1).all() for _, tensor, *_ in engine.held)


# ------------------------------------------------------------------------------------------------- ranks
def test_two_ranks_save_find_and_load(tmp_path: Path, config: dict[str, Any]) -> None:
    def rank_main(rank: int) -> list[Any]:
        run = make_run("qwen3", config, tmp_path / "run", make_plan(2, tp=2), rank)
        engine = filled(engine_for(run), 10.0 + rank)
        writer = native.CheckpointWriter(run, engine, keep=2, async_=True)
        writer.save({"row": 1}, 1)
        newest = writer.save({"row": 2}, 2)
        writer.close()
        count = len(writer.committed())
        if rank == 1:
            damage(newest / "engine" / "rank-0.safetensors", "flip", random.Random(0))
        torch.distributed.barrier()
        found = native.find_latest_together(run)
        assert found is not None
        engine.forget()
        state = native.load_checkpoint(run, engine, found, verify=False)
        assert all((tensor == 10 + rank).all() for _, tensor, *_ in engine.held)
        try:
            native.load_checkpoint(run, engine, newest)
        except CheckpointError as error:
            return [state["step"], count, str(error)]
        return []

    first, second = run_ranks(2, rank_main, init=True)
    assert first[:2] == [1, 2] and second[:2] == [1, 0]
    assert "SHA-256" in first[2] and "SHA-256" in second[2]


def test_a_disk_that_fails_on_rank_zero_stops_both(tmp_path: Path, config: dict[str, Any]) -> None:
    def rank_main(rank: int) -> str:
        run = make_run("qwen3", config, tmp_path / "run", make_plan(2), rank)
        writer = native.CheckpointWriter(run, engine_for(run), async_=True)
        if rank == 0:
            native._seal = lambda final: os.mkdir(final.parent / "no" / "such" / "folder")
        writer.save({}, 1)
        try:
            writer.close()
        except CheckpointError as error:
            return str(error)
        return ""

    texts = run_ranks(2, rank_main, init=True)
    assert all("step-00000001" in text and "intact" in text for text in texts)
    assert "rank 0" in texts[1]


# ------------------------------------------------------------------------------------- as first weights
def test_export_from_a_native_checkpoint_needs_nothing_else(tmp_path: Path) -> None:
    config = save_tiny("qwen3", tmp_path / "in", torch.bfloat16)
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    run = make_run("qwen3", config, tmp_path / "run", model={"weights": tmp_path / "in"})
    engine = engine_for(run)
    hf.load(tmp_path / "in", run, engine)
    path = native.save_checkpoint(run, engine, {}, 1)
    tensors, config_text = read_all(tmp_path / "in"), (tmp_path / "in" / "config.json").read_bytes()
    shutil.rmtree(tmp_path / "in")

    other = make_run("qwen3", config, tmp_path / "other", model={"weights": path})
    fresh = engine_for(other)
    native.load(path, other, fresh)
    hf.save(tmp_path / "out", other, fresh)
    assert_same_tensors(tensors, read_all(tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").read_bytes() == config_text
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_saving_at_a_named_path(run: Any, tmp_path: Path) -> None:
    native.save(tmp_path / "mine", run, filled(engine_for(run), 4.0))
    engine = engine_for(run)
    native.load(tmp_path / "mine", run, engine)
    assert all((tensor == 4).all() for _, tensor, *_ in engine.held)
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="left alone"):
        native.save(tmp_path / "other", run, engine)


def test_outside_view_needs_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, loong_ckpt.native_folder, loong_ckpt.plugin; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert native_folder.step_name(123456789) == "step-123456789"
