"""The bookkeeping around CUDA graphs and compiled units, with stand-ins for what needs a GPU."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from loong_core.backends import cuda
from loong_core.testing import decoder, tiny
from loong_core.testing.ranks import run_ranks


@pytest.fixture(scope="module", autouse=True)
def offered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The decoder as a plugin."""
    path = tmp_path_factory.mktemp("plugin") / "tiny_decoder_for_graphs.py"
    path.write_text(decoder.PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOONG_PLUGIN_FILES", str(path))
        yield


def recipe(**sections: Any) -> dict[str, Any]:
    data = {"global_batch": 6, "micro_batch": 1}
    return tiny.settings("tiny_decoder", decoder.CONFIG, parallel={"planner": "torch"}, data=data, **sections)


class Recorder:
    """Acts as a CUDA graph does: recording computes nothing that stays, replaying computes on the recorded tensors."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.replays, self.fails = engine, 0, False

    def function(self, batch: Any) -> Any:
        self.batch = batch
        self.report = self.engine._backward(batch)
        return self.report

    @contextmanager
    def graph(self, graph: Any, **_: Any) -> Iterator[None]:
        store = self.engine._flat
        kept, start = [bucket.gradients.clone() for bucket in store.buckets], store.filled()
        yield
        for bucket, values in zip(store.buckets, kept, strict=True):
            bucket.gradients.copy_(values)
        if self.fails:
            parameter = store.buckets[0].trained[0]
            parameter.grad = parameter.detach() + 1e6  # a backward pass that was broken off
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        graph.replay = self.replaying(self.batch, self.report, start)

    def replaying(self, batch: Any, report: Any, start: tuple[bool, ...]) -> Any:
        def replay() -> None:
            self.replays += 1
            self.engine._flat.mark_filled(start)
            report.copy_(self.engine._backward(batch))

        return replay


class Event:
    """Recorded while a graph is captured, waited for after its replays."""

    waits = 0
    store: Any = None

    def __init__(self, external: bool) -> None:
        assert external  # others are recorded once, when the graph is captured
        self.recorded = False

    def record(self) -> None:
        assert not Event.store._waiting, "a gradient comes to its buffer after the record"
        self.recorded = True

    def wait(self) -> None:
        assert self.recorded
        Event.waits += 1


def with_graphs(engine: Any, most: int = 8, free: int = 10**6) -> Recorder:
    import torch

    from loong_core.parallel.torch_graph import Graphs

    recorder, Event.store = Recorder(engine), engine._flat
    stand_ins = {"graph_pool_handle": lambda: None, "CUDAGraph": SimpleNamespace, "graph": recorder.graph}
    # Each look at the memory finds 100 bytes more of it without use.
    seen = itertools.count(0, 100)
    stand_ins |= {"memory_reserved": lambda device: 1000 + next(seen), "memory_allocated": lambda device: 900}
    stand_ins |= {"mem_get_info": lambda device: (free - next(seen), 10**9), "synchronize": lambda: None}
    stand_ins |= {"Event": Event}
    for name, value in stand_ins.items():
        mock.patch.object(torch.cuda, name, value, create=True).start()
    engine._graphs = Graphs(recorder.function, "forward and backward", most, "cpu")
    return recorder


def advance(run: Any, engine: Any, steps: int) -> list[list[float]]:
    found = []
    for step in range(steps):
        rows = tiny.batches(run, step)
        rows[1] = {name: tensor[:, :9] for name, tensor in rows[1].items()}  # another combination of shapes
        found.append([engine.forward_backward(rows, step)["loss"], engine.step(1e-3)])
    return found


@pytest.mark.parametrize("most", [8, 1])
def test_graphs_train_as_eager_passes(most: int, tmp_path: Path) -> None:
    """First and later micro-batches of a step have graphs of their own: one fills the buffers, the other adds."""

    def work(rank: int) -> list[Any]:
        run, engine = tiny.start(recipe(), tmp_path)
        exact = advance(run, engine, 5)
        run, engine = tiny.start(recipe(), tmp_path)
        recorder = with_graphs(engine, most)
        found = advance(run, engine, 5)
        return [exact, found, recorder.replays, len(engine._graphs._graphs), engine.idle_bytes()]

    exact, found, replays, graphs, idle = run_ranks(1, work)[0]
    assert found == exact
    # Of six micro-batches in a step one is the first, one is shorter, four are alike.
    assert graphs == min(most, 3) and replays == (18 if most > 1 else 3)
    assert idle == 100 * graphs


@pytest.mark.parametrize(("shard", "overlap"), [("none", True), ("optimizer", True), ("optimizer", False)])
def test_graphs_on_two_ranks(shard: str, overlap: bool, tmp_path: Path) -> None:
    """A step's last replay records when buckets are complete, and they are reduced beside it; on a rank whose batches
    have too many shapes for graphs, beside the pass itself, in the same order."""
    sections = recipe()
    sections["parallel"]["options"] = {"shard": shard, "bucket_size": 2000, "overlap": overlap}

    def work(rank: int) -> list[Any]:
        run, engine = tiny.start(sections, tmp_path)
        exact = advance(run, engine, 5)
        run, engine = tiny.start(sections, tmp_path)
        recorder = with_graphs(engine, most=8 if rank == 0 else 0)
        store, reduced = engine._flat, []
        reduce, finish = store._reduce, store.finish

        def noted(bucket: Any) -> None:
            reduced.append(next(index for index, one in enumerate(store.buckets) if one is bucket))
            reduce(bucket)

        def finishing() -> None:
            reduced.append("then")
            finish()

        store._reduce, store.finish = noted, finishing
        idle = dict(engine._module.named_parameters())["idle"]
        first = next(index for index, one in enumerate(store.buckets) if any(p.parameter is idle for p in one.places))
        sizes = [first, len(store.buckets)]
        return [exact, advance(run, engine, 5), sizes, recorder.replays, reduced, Event.waits]

    (exact, found, (idle, buckets), replays, reduced, waits), other = run_ranks(2, work)
    assert found == exact and other[1] == other[0] and replays > 0 and other[3] == 0
    # No gradient ever reaches the bucket of `idle`: it and those behind it are reduced after the pass.
    beside = idle if overlap else 0
    assert 1 < idle < buckets
    assert reduced == other[4] == [*range(beside), "then", *range(beside, buckets)] * 5
    assert [waits, other[5]] == [beside * 3, 0]  # the first two of five steps run without graphs on either rank


@pytest.mark.gpu
@pytest.mark.skipif(cuda.probe().devices == 0, reason="needs a CUDA device")
def test_whoever_waits_for_a_recorded_event_waits_for_the_latest_replay() -> None:
    """What `FlatStore.reduce_as_recorded` relies on: not for a replay before, whose event is done."""
    import torch

    event = torch.cuda.Event(external=True)
    source, copied = (torch.zeros(1 << 20, device="cuda") for _ in range(2))
    graph, beside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        torch.cuda._sleep(50_000_000)
        copied.copy_(source)
        event.record()
        torch.cuda._sleep(50_000_000)
    for number in range(1, 6):
        source.fill_(number)
        torch.cuda.synchronize()
        graph.replay()
        with torch.cuda.stream(beside):
            event.wait()
            seen = copied.clone()
        torch.cuda.synchronize()
        assert (seen == number).all()


@pytest.mark.parametrize("comes", [None, 4])
def test_a_pass_of_another_shape_that_has_no_room_ends_graphs(comes: int | None, tmp_path: Path) -> None:
    """What graphs hold is of no use to it; without them it has that memory. Shapes that are known need no room."""

    def steps(run: Any, engine: Any) -> list[list[float]]:
        found = advance(run, engine, 4)
        for step in (4, 5):
            rows = tiny.batches(run, step)
            if step == comes:
                rows[2] = {name: tensor[:, :7] for name, tensor in rows[2].items()}
            found.append([engine.forward_backward(rows, step)["loss"], engine.step(1e-3)])
        return found

    def work(rank: int) -> list[Any]:
        run, engine = tiny.start(recipe(), tmp_path)
        exact = steps(run, engine)
        run, engine = tiny.start(recipe(), tmp_path)
        recorder = with_graphs(engine, free=-(10**9))
        held: list[int] = []
        give_up = engine._graphs._give_up

        def noted(reason: str) -> None:
            held.append(engine.idle_bytes())
            give_up(reason)

        engine._graphs._give_up = noted
        return [exact, steps(run, engine), recorder.replays, held, engine._graphs.works, engine.idle_bytes()]

    exact, found, replays, held, works, idle = run_ranks(1, work)[0]
    assert found == exact
    if comes is None:
        assert works and replays == 24 and not held
        return
    assert replays == 14  # two steps by graph, and two micro-batches before the one that has none
    assert len(held) == 1 and held[0] > 0 and not works and idle == 0


def test_a_model_that_cannot_be_captured_trains_without_graphs(tmp_path: Path) -> None:
    def work(rank: int) -> list[Any]:
        import logging

        run, engine = tiny.start(recipe(), tmp_path)
        exact = advance(run, engine, 4)
        run, engine = tiny.start(recipe(), tmp_path)
        with_graphs(engine).fails = True
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("loong").addHandler(handler)
        found = advance(run, engine, 4)
        return [exact, found, lines, engine._graphs.works]

    exact, found, lines, works = run_ranks(1, work)[0]
    assert found == exact and not works
    assert len(lines) == 1 and "cannot be captured" in lines[0] and lines[0].endswith("stream is capturing")


def test_units_are_compiled_one_by_one_inside_of_their_hooks(tmp_path: Path) -> None:
    def work(rank: int) -> list[Any]:
        import torch

        from loong_core.parallel import torch_units
        from loong_core.parallel.torch_options import TorchOptions

        run, engine = tiny.start(recipe(), tmp_path, optimizer=False)
        calls: list[str] = []

        def compiled(function: Any, **settings: Any) -> Any:
            def call(*args: Any) -> Any:
                calls.append("compiled")
                return function(*args)

            return call

        units = engine._module.units()
        for unit in units:
            unit.register_forward_pre_hook(lambda *_: calls.append("hook"))
        options = TorchOptions(compile=True)
        with mock.patch.object(torch, "compile", compiled):
            torch_units.prepare_units(units, run.plan, options, "cuda:0")
        engine.evaluate(tiny.batches(run)[:1])
        names = [name for name, _ in engine._module.named_parameters()]
        return [calls, names]

    calls, names = run_ranks(1, work)[0]
    assert calls == ["hook", "compiled"] * 2
    assert "layers.0.norm" in names  # not renamed, as wrapping a module would


def test_the_engine_needs_no_megatron() -> None:
    modules = ", ".join(f"loong_core.parallel.{name}" for name in ("torch_engine", "torch_sharded"))
    code = f"import sys, {modules}; print([name for name in sys.modules if name.startswith('megatron.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
