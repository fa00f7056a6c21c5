"""Batches made in other processes: the same ones, and nobody waits or stays behind when something ends."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loong_core.backends import cpu_device
from loong_core.errors import DataError, RecipeError, RunError
from loong_vla import children, shared
from loong_vla.children import Children, division
from loong_vla.options import RobotOptions
from loong_vla.shared import Mapped, Pool
from loong_vla.stream import RobotStream

Open = Callable[..., RobotStream]
pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has memory to share so")


def ready(stream: RobotStream) -> RobotStream:
    """The stream, from whose processes everything comes from now on."""
    deadline = time.monotonic() + 120
    assert stream._children is not None
    while not stream._children.ready:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return stream


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def assert_same(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert list(one) == list(other)
        for name, tensor in one.items():
            assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


# ------------------------------------------------------------------------------------------------------- streams
@pytest.mark.parametrize("family", ["pi05", "groot_n17"])
def test_processes_make_the_same_batches(opened: Open, family: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dp": 2, "replica": 1, "micro_batch": 3, "micro_batches": 2, "threads": 2}
    settings |= {"statistics": "compute", "augment": "openpi", "more": {"eval": {"fraction": 0.3}}}
    if family == "pi05":
        settings["config"] = {"use_relative_actions": True}
    alone, ours = opened(family, **settings), opened(family, processes=2, **settings)
    # The first steps come from this process, which does not wait for the others to begin.
    found = [ours.batches(0)]
    ready(ours)
    assert ours.load_state({**ours.state(), "step": 3}) == 3
    steps = [0, *range(3, 13), 1]
    found += [ours.batches(step) for step in steps[1:]]
    for step, batches in zip(steps, found, strict=True):  # memory that somebody looks at is not written again
        assert_same(batches, alone.batches(step))
    assert ours._last is not None and alone._last is not None
    assert ours._last[1].seen == alone._last[1].seen and ours.tokens(1) == alone.tokens(1)
    assert_same(ours.eval_batches(0), alone.eval_batches(0))
    pids = [process.pid for process in ours._children.processes]  # type: ignore[union-attr]
    began = time.monotonic()
    ours.close()
    assert time.monotonic() - began < 3 and all(map(gone, pids))
    assert not list(tmp_path.glob("logs/*")), "logs in which nothing stands"
    ours._children = None


def test_memory_is_used_again(opened: Open) -> None:
    ours = ready(opened(processes=1))
    for step in range(12):
        ours.batches(step)
    (child,) = ours._children._children  # type: ignore[union-attr]
    assert len(child._memory._slots) <= len(ours._ahead) + 2


def test_replaced_samples_are_named_in_order(opened: Open, damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"root": damaged, "micro_batch": 4, "skip_quota": 3}
    alone, ours = opened(**settings), ready(opened(processes=1, **settings))
    said = []
    for one in (alone, ours):
        caplog.clear()
        with caplog.at_level("WARNING"):
            for step in range(4):
                one.batches(step)
        said.append([record.getMessage() for record in caplog.records if "loong_vla" in record.name])
    assert ours.skipped == alone.skipped and len(ours.skipped) > 3
    assert said[0] == said[1] and len(said[0]) == len(ours.skipped)
    assert ours.problem() == alone.problem() is not None


def test_an_error_arrives_as_it_was_raised(opened: Open) -> None:
    errors = []
    for processes in (0, 1):
        one = opened(processes=processes, fields={"vocabulary": 40})
        if processes:
            ready(one)
        with pytest.raises(DataError, match="The tokenizer gives token") as caught:
            one.batches(0)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_a_process_that_dies_is_an_error_and_no_wait(opened: Open, tmp_path: Path) -> None:
    ours = ready(opened(processes=1))
    ours.batches(0)
    assert ours._children is not None
    first = ours._children.processes[0]
    first.send_signal(signal.SIGKILL)
    began = time.monotonic()
    words = rf"Process {first.pid}.*ended by SIGKILL.*memory(.|\n)*data-0000-0.log"
    with pytest.raises(RunError, match=words) as caught:
        for step in range(1, 50):
            ours.batches(step)
    assert time.monotonic() - began < 5 and str(tmp_path / "logs") in str(caught.value)


def test_a_signal_to_all_processes_of_a_run_leaves_those_that_make_batches(opened: Open) -> None:
    """The training process has a step to finish, and ends them then."""
    ours = ready(opened(processes=1))
    ours.batches(0)
    assert ours._children is not None
    (first,) = ours._children.processes
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        first.send_signal(number)
    for step in range(1, 6):
        ours.batches(step)
    assert first.poll() is None


def test_what_a_process_cannot_open_is_an_error(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    from loong_vla import open_stream

    real = open_stream.facts_of
    monkeypatch.setattr(open_stream, "facts_of", lambda *args: {**real(*args), "identity": {}})
    ours = opened(processes=1)
    with pytest.raises(DataError, match="changed while it was opened"):
        ready(ours)


PARENT = """
import sys, time
from pathlib import Path
from loong_vla.children import Children
found = Children(2, Path(sys.argv[1]), "0000")
print(*[process.pid for process in found.processes], flush=True)
time.sleep(600)
"""


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    words = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2 and not any(map(gone, pids))
        parent.kill()
    assert within(10, lambda: all(map(gone, pids)))


def test_closing_does_not_wait_for_imports(tmp_path: Path) -> None:
    began = time.monotonic()
    Children(1, tmp_path, "0000").close()
    assert time.monotonic() - began < 2


# ------------------------------------------------------------------------------------------------------- memory
@pytest.fixture
def memory() -> Any:
    file = os.memfd_create("test")
    yield file
    os.close(file)


def batch(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": torch.randint(0, 256, (rows, 5, 7, 3), dtype=torch.uint8, generator=generator),
        "mask": torch.rand(rows, 3, generator=generator) < 0.5,
        "noise": torch.randn(rows, 4, generator=generator),
        "tokens": torch.randint(0, 99, (rows, 9), generator=generator),
        "turned": torch.randn(4, rows, generator=generator).t(),
        "nothing": torch.zeros(0, rows),
        "offsets": torch.arange(rows + 1, dtype=torch.int32),
    }


def test_a_slot_is_free_when_its_last_tensor_is_gone(memory: int) -> None:
    pool, mapped, freed = Pool(memory), Mapped(memory), list[int]()
    slot, entries = pool.write([batch(3, 1), batch(3, 2)])
    found = mapped.read(slot, entries, freed.append)
    assert_same(found, [batch(3, 1), batch(3, 2)])
    kept = found[1]["noise"][1:]
    del found
    gc.collect()
    assert freed == []
    again, _ = pool.write([batch(3, 3)])
    assert again.number != slot.number and torch.equal(kept, batch(3, 2)["noise"][1:])
    del kept
    gc.collect()
    assert freed == [slot.number]
    pool.free(freed)
    assert pool.write([batch(3, 4)])[0] == slot


def test_a_batch_that_does_not_fit_gets_a_larger_slot(memory: int) -> None:
    pool, mapped = Pool(memory), Mapped(memory)
    small, _ = pool.write([batch(2)])
    pool.free([small.number])
    large, entries = pool.write([batch(2000)])
    assert large.size > small.size and large.begin >= small.begin + small.size
    assert_same(mapped.read(large, entries, print), [batch(2000)])
    assert pool.write([batch(2)])[0] == small


def test_what_cannot_be_pinned_is_copied(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_device.deactivate()  # a command that another test ran here leaves it on, and it pins nothing
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    pool = Pool(memory)
    for pins in (False, True):
        asked, freed = list[str](), list[int]()
        monkeypatch.setattr(shared, "pin", lambda memory, device, pins=pins, asked=asked: asked.append(device) or pins)
        monkeypatch.setattr(shared, "unpin", lambda memory, device: None)
        mapped = Mapped(memory, "cuda:3")
        slot, entries = pool.write([batch(3)])
        found = [mapped.read(slot, entries, freed.append) for _ in range(2)]
        gc.collect()
        assert asked == ["cuda:3"] and freed == ([] if pins else [slot.number] * 2)
        assert_same(found[1], [batch(3)])
        mapped.close()


def test_pinning_fails_where_there_is_no_gpu(memory: int) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    mapped = Mapped(memory)
    slot, entries = Pool(memory).write([batch(1)])
    mapped.read(slot, entries, print)
    assert shared.pin(mapped._slots[0], "cuda:0") is False


# ------------------------------------------------------------------------------------------------------- division
@pytest.mark.parametrize(
    ("options", "device", "ranks", "cores", "expected"),
    [
        ({}, "cpu", 1, 16, (0, 16)),
        ({}, "cuda:0", 1, 16, (4, 3)),
        ({}, "cuda:0", 1, 32, (4, 4)),
        ({}, "cuda:0", 8, 128, (4, 3)),
        ({}, "cuda:0", 1, 2, (1, 1)),
        ({}, "cuda:0", 4, 2, (1, 1)),
        ({"processes": 0}, "cuda:0", 1, 32, (0, 16)),
        ({"processes": 2}, "cpu", 1, 2, (2, 1)),
        ({"threads": 7}, "cuda:0", 1, 16, (4, 7)),
    ],
)
def test_cores_are_shared(options: Any, device: str, ranks: int, cores: int, expected: tuple[int, int]) -> None:
    assert division(RobotOptions(**options), device, ranks, cores) == expected


def test_a_system_without_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(children.os, "memfd_create")
    assert division(RobotOptions(), "cuda:0", 1, 16).processes == 0
    with pytest.raises(RecipeError, match=r"data.options.processes"):
        division(RobotOptions(processes=1), "cuda:0", 1, 16)
