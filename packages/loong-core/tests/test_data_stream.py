"""What a step trains on is the same however it is cut, wherever it is resumed, packed or not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loong_core.data.cache import Cache, build
from loong_core.data.layout import Layout
from loong_core.data.prepare import PreparedData
from loong_core.data.stream import Stream
from loong_core.errors import DataError
from loong_core.recipe import Recipe
from loong_core.types import ParallelPlan, Row

SEQ_LEN = 16


def encode(row: Row) -> list[dict[str, np.ndarray]]:
    """A sample whose tokens all name it: number * 100 + position."""
    number, length = row.fields["number"], row.fields["length"]
    tokens = number * 100 + np.arange(length, dtype=np.int32)
    return [{"tokens": tokens, "targets": np.append(tokens[1:], -100).astype(np.int32)}]


def make_cache(folder: Path, lengths: list[int]) -> Cache:
    rows = [Row({"number": at + 1, "length": length}, "x", at + 1) for at, length in enumerate(lengths)]
    return build(folder, rows, encode, skip_bad=False, seq_len=SEQ_LEN)


def make_stream(cache: Cache, *, dp: int = 1, rank: int = 0, micro: int = 1, number: int = 1, **data: Any) -> Stream:
    recipe = Recipe.model_validate(
        {
            "run": {"seed": data.pop("seed", 3)},
            "data": {"seq_len": SEQ_LEN, "global_batch": dp * micro * number, "micro_batch": micro, **data},
        }
    )
    plan = ParallelPlan(planner="test", world=dp, dp=dp, micro_batch=micro, micro_batches=number)
    return Stream(recipe, PreparedData(train=cache), plan, rank)


def rows_of(streams: list[Stream], step: int) -> list[dict[str, list[int]]]:
    """The rows of a global batch in order, put together from all ranks."""
    ranks = [stream.batches(step) for stream in streams]
    rows = []
    for micro in zip(*ranks, strict=True):
        for batch in micro:
            count = len(batch["tokens"])
            rows += [{name: values[row].tolist() for name, values in batch.items()} for row in range(count)]
    return rows


def close(*streams: Stream) -> None:
    for stream in streams:
        stream.close()


LENGTHS = st.lists(st.integers(2, SEQ_LEN), min_size=1, max_size=25)
CUTS = st.sampled_from([(1, 1, 8), (1, 8, 1), (2, 1, 4), (2, 2, 2), (4, 2, 1), (8, 1, 1), (4, 1, 2)])
RELAXED = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])


@given(lengths=LENGTHS, cut=CUTS, pack=st.booleans(), shuffle=st.booleans())
@RELAXED
def test_every_cut_sees_the_same_rows_in_the_same_order(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], cut: tuple[int, int, int], pack: bool, shuffle: bool
) -> None:
    cache = make_cache(tmp_path_factory.mktemp("data") / "it", lengths)
    dp, micro, number = cut
    whole = make_stream(cache, micro=8, pack=pack, shuffle=shuffle)
    parts = [
        make_stream(cache, dp=dp, rank=rank, micro=micro, number=number, pack=pack, shuffle=shuffle)
        for rank in range(dp)
    ]
    for step in range(4):
        assert rows_of(parts, step) == rows_of([whole], step)
        assert {part.content(step) for part in parts} == {whole.content(step)}
    close(whole, *parts)


@given(lengths=LENGTHS, pack=st.booleans(), shuffle=st.booleans(), balance=st.booleans(), batch=st.integers(1, 5))
@RELAXED
def test_an_epoch_holds_every_sample_once_with_its_own_targets(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], pack: bool, shuffle: bool, balance: bool, batch: int
) -> None:
    cache = make_cache(tmp_path_factory.mktemp("data") / "it", lengths)
    stream = make_stream(cache, micro=batch, pack=pack, shuffle=shuffle, balance=balance)
    seen: list[int] = []
    step = samples = tokens = squares = 0
    while len(seen) < 3 * len(lengths):
        for row in rows_of([stream], step):
            segments = row.get("segments", [0] * SEQ_LEN)
            for number in range(max(segments) + 1):
                inside = [at for at in range(SEQ_LEN) if segments[at] == number]
                values = [row["tokens"][at] for at in inside]
                name = values[0] // 100
                assert values == [name * 100 + at for at in range(lengths[name - 1])]
                assert [row["targets"][at] for at in inside] == [*values[1:], -100]
                assert [row["positions"][at] for at in inside] == list(range(len(values)))
                seen.append(name)
            padding = [at for at in range(SEQ_LEN) if segments[at] == -1]
            assert all(row["targets"][at] == -100 and row["tokens"][at] == 0 for at in padding)
        samples, tokens = samples + stream.samples(step), tokens + stream.tokens(step)
        squares, step = squares + stream.content(step).squares, step + 1
    assert samples == len(seen)
    assert tokens == sum(lengths[name - 1] for name in seen)
    assert squares == sum(lengths[name - 1] ** 2 for name in seen)
    counts = [seen.count(name) for name in range(1, len(lengths) + 1)]
    assert max(counts) - min(counts) <= 1
    for epoch in range(0 if balance else 3):  # balanced, a step over the end of an epoch mixes samples of both
        part = seen[epoch * len(lengths) : (epoch + 1) * len(lengths)]
        assert sorted(part) == list(range(1, len(lengths) + 1))
        if not shuffle:
            assert part == sorted(part)
    close(stream)


@given(lengths=LENGTHS, pack=st.booleans(), at=st.integers(0, 9), batch=st.integers(1, 7))
@RELAXED
def test_a_resumed_stream_continues_exactly(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], pack: bool, at: int, batch: int
) -> None:
    cache = make_cache(tmp_path_factory.mktemp("data") / "it", lengths)
    first = make_stream(cache, micro=batch, pack=pack)
    for step in range(at):
        first.batches(step)
    state = first.state()
    expected = [rows_of([first], step) for step in range(at, at + 4)]
    second = make_stream(cache, dp=1, micro=1, number=batch, pack=pack)
    assert second.load_state(state) == at
    assert [rows_of([second], step) for step in range(at, at + 4)] == expected
    assert second.state() == first.state()
    assert rows_of([second], 0) == rows_of([make_stream(cache, micro=batch, pack=pack)], 0)
    close(first, second)


def test_packed_and_unpacked_rows_hold_the_same_samples_and_targets(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "it", [3, 9, 4, 16, 2, 5])
    found = []
    for pack in (True, False):
        stream = make_stream(cache, micro=3 if pack else 6, pack=pack)
        pairs = set()
        for row in rows_of([stream], 0):
            pairs |= {pair for pair in zip(row["tokens"], row["targets"], strict=True) if pair != (0, -100)}
        found.append(pairs)
        close(stream)
    assert found[0] == found[1]
    assert len(found[0]) == 39


def test_segments_are_absent_only_where_every_sample_fills_a_row(tmp_path: Path) -> None:
    full = make_stream(make_cache(tmp_path / "full", [SEQ_LEN] * 3), micro=2)
    mixed = make_stream(make_cache(tmp_path / "mixed", [SEQ_LEN, 5]), micro=2)
    assert set(full.batches(0)[0]) == {"tokens", "targets", "positions"}
    batch = mixed.batches(0)[0]
    assert set(batch) == {"tokens", "targets", "positions", "segments"}
    assert all(values.dtype == torch.int64 and values.shape == (2, SEQ_LEN) for values in batch.values())
    close(full, mixed)


def test_order_follows_seed_and_epoch(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "it", [SEQ_LEN] * 12)
    orders = []
    for seed in (1, 2):
        stream = make_stream(cache, micro=12, seed=seed)
        orders += [[row["tokens"][0] for row in rows_of([stream], step)] for step in range(2)]
        close(stream)
    assert len({tuple(order) for order in orders}) == 4
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_resuming_on_other_data_or_settings_says_what_differs(tmp_path: Path) -> None:
    stream = make_stream(make_cache(tmp_path / "a", [4, 5, 6]), micro=2)
    other = make_stream(make_cache(tmp_path / "b", [4, 5, 7]), micro=2, seed=4)
    with pytest.raises(DataError) as caught:
        other.load_state(stream.state())
    assert "contents of the data" in str(caught.value)
    assert "run.seed: was 3, is 4" in str(caught.value)
    assert "data.pack" not in str(caught.value)
    close(stream, other)


def test_the_background_thread_changes_nothing(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "it", [3, 9, 4, 16, 2, 5])
    forward, jumping = make_stream(cache, micro=2), make_stream(cache, micro=2)
    expected = {step: rows_of([forward], step) for step in range(6)}
    for step in (4, 1, 5, 0, 2, 2, 3):
        assert rows_of([jumping], step) == expected[step]
    close(forward, jumping)


@given(
    lengths=st.lists(st.integers(2, SEQ_LEN), min_size=2, max_size=30),
    pack=st.booleans(),
    cut=st.sampled_from([(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1)]),
)
@RELAXED
def test_held_out_tokens_are_counted_once_and_never_trained_on(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], pack: bool, cut: tuple[int, int, int]
) -> None:
    cache = make_cache(tmp_path_factory.mktemp("data") / "it", lengths)
    section = {"fraction": 0.3, "batches": 50}
    dp, micro, number = cut
    streams = [
        make_stream(cache, dp=dp, rank=rank, micro=micro, number=number, pack=pack, eval=section) for rank in range(dp)
    ]
    counted: list[int] = []
    for index in range(streams[0].eval_count):
        for stream in streams:
            for batch in stream.eval_batches(index):
                counted += batch["targets"][batch["targets"] != -100].tolist()
    trained = {token for step in range(40) for row in rows_of(streams, step) for token in row["tokens"] if token}
    assert len(counted) == len(set(counted))
    assert not set(counted) & trained
    held = {token // 100 for token in counted}
    assert {token // 100 for token in trained} | held == set(range(1, len(lengths) + 1))
    assert sorted(counted) == sorted(name * 100 + at for name in held for at in range(1, lengths[name - 1]))
    close(*streams)


def test_held_out_batches_are_limited_and_a_path_of_its_own_takes_nothing_away(tmp_path: Path) -> None:
    train, held = make_cache(tmp_path / "a", [4] * 5), make_cache(tmp_path / "b", [SEQ_LEN] * 9)
    recipe = Recipe.model_validate(
        {"data": {"seq_len": SEQ_LEN, "global_batch": 2, "eval": {"path": "x", "batches": 3}}}
    )
    plan = ParallelPlan(planner="test", world=1, micro_batch=2)
    stream = Stream(recipe, PreparedData(train=train, held_out=held), plan, 0)
    assert stream.eval_count == 3
    assert len(stream.layout.subset) == 5
    with pytest.raises(DataError, match=r"data\.eval: one sample.*data\.eval\.path"):
        make_stream(make_cache(tmp_path / "c", [4]), eval={"fraction": 0.5})
    close(stream)


@given(lengths=LENGTHS, cut=CUTS, shuffle=st.booleans())
@RELAXED
def test_a_step_holds_the_same_samples_and_every_cut_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], cut: tuple[int, int, int], shuffle: bool
) -> None:
    cache = make_cache(tmp_path_factory.mktemp("data") / "it", lengths)
    dp, micro, number = cut
    plain = make_stream(cache, micro=8, shuffle=shuffle, balance=False)
    whole = make_stream(cache, micro=8, shuffle=shuffle)
    parts = [make_stream(cache, dp=dp, rank=rank, micro=micro, number=number, shuffle=shuffle) for rank in range(dp)]
    for step in range(4):
        rows = rows_of(parts, step)
        assert rows == rows_of([whole], step)
        assert whole.arrays(step)["tokens"].tolist() == [row["tokens"] for row in rows]
        assert samples_of(rows) == samples_of(rows_of([plain], step))
        assert {part.content(step) for part in parts} == {plain.content(step)}
        assert max(works_of(rows)) <= max(works_of(rows_of([plain], step)))
    close(plain, whole, *parts)


def samples_of(rows: list[dict[str, list[int]]]) -> list[int]:
    """The name of every sample of some rows (see `test_data_stream.encode`), sorted."""
    return sorted(token // 100 for row in rows for token in row["tokens"] if token and token % 100 == 0)


def works_of(rows: list[dict[str, list[int]]]) -> list[int]:
    """Attention work of each row, by its segments."""
    found = []
    for row in rows:
        segments = row.get("segments", [0] * SEQ_LEN)
        found.append(sum(segments.count(number) ** 2 for number in set(segments) - {-1}))
    return found


def test_a_stream_is_even_and_continues_exactly(tmp_path: Path) -> None:
    lengths = np.random.default_rng(2).integers(1, 7, 400).clip(2).tolist() + [14] * 20
    cache = make_cache(tmp_path / "it", lengths)
    plain, first = make_stream(cache, micro=4, balance=False), make_stream(cache, micro=4)
    pairs = [
        (max(works_of(rows_of([plain], step))), max(works_of(rows_of([first], step))), first.content(step).squares / 4)
        for step in range(6)
    ]
    assert sum(pair[1] for pair in pairs) < sum(pair[0] for pair in pairs)
    state = first.state()
    expected = [rows_of([first], step) for step in range(6, 10)]
    second = [make_stream(cache, dp=2, rank=rank, micro=1, number=2) for rank in range(2)]
    assert [stream.load_state(state) for stream in second] == [6, 6]
    assert [rows_of(second, step) for step in range(6, 10)] == expected
    close(plain, first, *second)


def test_held_out_batches_are_the_same_with_and_without(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "it", np.random.default_rng(0).integers(2, SEQ_LEN, 90).tolist())
    section = {"fraction": 0.4, "batches": 50}
    plain, even = (make_stream(cache, micro=4, eval=section, balance=balanced) for balanced in (False, True))
    assert plain.eval_count == even.eval_count > 1
    for index in range(plain.eval_count):
        for one, other in zip(plain.eval_batches(index), even.eval_batches(index), strict=True):
            assert all(one[name].equal(other[name]) for name in one)
    close(plain, even)


def test_a_run_does_not_continue_on_rows_that_were_put_together_otherwise(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "it", [3, 9, 4, 16, 2, 5])
    plain, even = make_stream(cache, micro=2, balance=False), make_stream(cache, micro=2)
    with pytest.raises(DataError, match=r"data\.balance.*: was False, is True"):
        even.load_state(plain.state())
    with pytest.raises(DataError, match=r"data\.balance.*: was True, is False"):
        plain.load_state(even.state())
    old = {name: value for name, value in plain.state().items() if name != "balance"}
    assert plain.load_state(old) == 0
    with pytest.raises(DataError, match=r"data\.balance.*: was False, is True"):
        even.load_state(old)
    close(plain, even)


@pytest.mark.parametrize(
    ("lengths", "rows", "data"),
    [([3, 9, 4], 2, {"pack": False}), ([SEQ_LEN] * 3, 2, {}), ([3, 9, 4], 1, {})],
    ids=["one sample per row", "samples that fill rows", "one row"],
)
def test_where_nothing_can_move_an_older_checkpoint_continues(
    tmp_path: Path, lengths: list[int], rows: int, data: dict[str, bool]
) -> None:
    stream = make_stream(make_cache(tmp_path / "it", lengths), micro=rows, **data)
    old = {name: value for name, value in stream.state().items() if name != "balance"}
    assert stream.load_state(old) == 0
    close(stream)


def test_a_million_samples_are_packed_in_seconds_and_found_again_at_once(tmp_path: Path) -> None:
    """The time is reported, not judged: what is judged is that resuming does not pack earlier epochs."""
    count = 1_000_000
    lengths = np.random.default_rng(0).integers(1, SEQ_LEN + 1, count)

    class Fake:
        def __init__(self) -> None:
            self.lengths = lengths

    layout = Layout(Fake(), np.arange(count), seq_len=SEQ_LEN, pack=True, shuffle=True, seed=0)  # type: ignore[arg-type]
    began = time.perf_counter()
    rows = len(layout.epoch(0)[1])
    print(f"packed {count:,} samples into {rows:,} rows in {time.perf_counter() - began:.1f} s")  # noqa: T201
    anchor = layout.anchor(rows - 1)
    assert anchor == {"epoch": 0, "first_row": 0}
    fresh = Layout(Fake(), np.arange(count), seq_len=SEQ_LEN, pack=True, shuffle=True, seed=0)  # type: ignore[arg-type]
    fresh.set_anchor({"epoch": 700, "first_row": 10**9})
    assert fresh.locate(10**9 + 5) == (700, 5)
    assert list(fresh._epochs) == [700]
