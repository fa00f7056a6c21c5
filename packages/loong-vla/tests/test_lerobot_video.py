"""Frames by their time: the same whatever was read before, in threads, with distant key frames and with damage."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from loong_core.errors import DataError
from loong_vla.lerobot.generate import CAMERAS, generate
from loong_vla.lerobot.layout import Dataset, open_dataset
from loong_vla.lerobot.video import Decoder, FrameError, FrameReader

FRONT = "observation.images.front"


def _write(file: Path, count: int, rate: int = 20, **options: str) -> list[np.ndarray]:
    """A video of `count` frames that all differ much, and what a plain decoder makes of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream(options.pop("codec", "libx264"), rate=Fraction(rate), options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(count):
            image = np.zeros((48, 64, 3), np.uint8)
            image[:, : 2 + number % 60] = (number * 37 % 256, number * 91 % 256, number * 11 % 256)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize(
    "options",
    [
        {"g": "1"},
        {"g": "2"},
        {"g": "250", "bf": "0"},
        {"g": "40", "bf": "3"},
        {"g": "20", "bf": "3", "flags": "-cgop", "x264-params": "open-gop=1"},
        {"codec": "libx265", "x265-params": "log-level=none:keyint=20:min-keyint=20:bframes=4:open-gop=1"},
    ],
    ids=["all_key", "as_lerobot", "one_key", "b_frames", "open_groups", "open_groups_of_hevc"],
)
def test_any_order(tmp_path: Path, options: dict[str, str]) -> None:
    frames = _write(tmp_path / "video.mp4", 120, **options)
    assert len(frames) == 120
    random = np.random.default_rng(0)
    orders = [
        list(range(120)),
        list(range(119, -1, -1)),
        random.permutation(120).tolist(),
        [5, 5, 6, 119, 0, 119, 60, 61, 75, 74],
    ]
    decoder = Decoder(tmp_path / "video.mp4")
    for order in orders:
        for number in order:
            np.testing.assert_array_equal(decoder.at([number / 20], 1e-4)[0], frames[number], err_msg=str(number))
    chosen = random.integers(0, 120, 30).tolist()
    np.testing.assert_array_equal(decoder.at([number / 20 for number in chosen], 1e-4), [frames[n] for n in chosen])
    np.testing.assert_allclose(decoder.packet_times(), np.arange(120) / 20, atol=1e-9)
    np.testing.assert_array_equal(decoder.at([3.0], 1e-4)[0], frames[60])
    decoder.close()


def test_sequential_reading_does_not_seek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "video.mp4", 100, g="50", bf="0")
    seeks: list[float] = []
    seek = Decoder._seek
    monkeypatch.setattr(Decoder, "_seek", lambda self, time, *rest: (seeks.append(time), seek(self, time, *rest))[1])
    decoder = Decoder(tmp_path / "video.mp4")
    for number in range(0, 100, 3):
        decoder.at([number / 20], 1e-4)
    assert seeks == [0.0]
    decoder.at([1.0], 1e-4)
    decoder.at([4.5], 1e-4)  # further than key frames were apart
    assert seeks == [0.0, 1.0, 4.5]


def test_times_without_a_frame(tmp_path: Path) -> None:
    frames = _write(tmp_path / "video.mp4", 10)
    decoder = Decoder(tmp_path / "video.mp4")
    with pytest.raises(FrameError, match=r"no frame at 0\.520000 s: the video ends before"):
        decoder.at([0.1, 0.52], 1e-4)
    with pytest.raises(FrameError, match=r"no frame at 0\.225000 s: the next one is shown at 0\.250000 s"):
        decoder.at([0.225], 1e-4)
    np.testing.assert_array_equal(decoder.at([0.225], 0.03)[0], frames[4])
    np.testing.assert_array_equal(decoder.at([0.45 + 9e-5, 0.05 - 9e-5], 1e-4), [frames[9], frames[1]])


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return generate(tmp_path / "data", frames=[12, 7, 20], fps=5, keyframes=6)


def test_frames_by_number_and_by_time(dataset: Dataset) -> None:
    with FrameReader(dataset) as reader:
        by_number = reader.frames(1, FRONT, [0, 6, 3])
        assert by_number.shape == (3, 64, 64, 3) and by_number.dtype == np.uint8
        np.testing.assert_array_equal(reader.frames(1, FRONT, [0.0, 1.2, 0.6]), by_number)
        np.testing.assert_array_equal(reader.frames(dataset.episodes[1], FRONT, np.array([0, 6, 3])), by_number)
        other = reader.frames(2, FRONT, [0])
        assert (other[0] != by_number[0]).any()


def test_the_square_stands_where_the_joints_are(dataset: Dataset) -> None:
    """A frame belongs to its row: the generator draws the first two joints."""
    with FrameReader(dataset) as reader:
        for episode in dataset.episodes:
            state = dataset.columns(episode, ["observation.state"])["observation.state"]
            frames = reader.frames(episode, FRONT, range(episode.length)).astype(int)
            wall = np.median(frames, axis=0)
            for row, image in enumerate(frames):
                ys, xs = np.nonzero(np.abs(image - wall).max(axis=2) > 60)
                expected = (np.clip((state[row, :2] + 1) / 2, 0, 1) * 52).astype(int) + 5.5
                if len(ys) > 50:
                    np.testing.assert_allclose([ys.mean(), xs.mean()], expected, atol=6)


def test_threads_share_a_reader(dataset: Dataset) -> None:
    with FrameReader(dataset, decoders=3) as reader:
        expected = {
            (episode.index, camera): reader.frames(episode, camera, range(episode.length))
            for episode in dataset.episodes
            for camera in CAMERAS
        }
        random = np.random.default_rng(0)
        jobs = [(int(random.integers(3)), list(CAMERAS)[int(random.integers(2))]) for _ in range(150)]

        def look(job: tuple[int, str]) -> bool:
            rows = np.random.default_rng(hash(job) % 99).integers(0, dataset.episode(job[0]).length, 3)
            return bool((reader.frames(*job, rows) == expected[job][rows]).all())

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(look, jobs))
        assert len(reader._idle) <= 3


def test_closing_while_a_file_is_read(dataset: Dataset) -> None:
    reader = FrameReader(dataset)
    reader.frames(0, FRONT, [0])
    reader.close()
    assert reader.frames(0, FRONT, [1]).shape == (1, 64, 64, 3)
    assert not reader._idle


def test_missing_and_damaged_videos_are_named(dataset: Dataset) -> None:
    file = dataset.root / dataset.episodes[1].clips[FRONT].file
    content = file.read_bytes()
    for damage, message in ((b"", "cannot be opened"), (content[:-400], "cannot be opened"), (b"junk" * 99, "opened")):
        file.write_bytes(damage)
        with pytest.raises(FrameError, match=message) as raised:
            FrameReader(dataset).frames(1, FRONT, [2])
        assert str(file) in str(raised.value) and "episode 1, camera `observation.images.front`" in str(raised.value)
        assert (raised.value.file, raised.value.episode, raised.value.camera) == (file, 1, FRONT)
    file.unlink()
    with pytest.raises(FrameError, match="is missing"):
        FrameReader(dataset).frames(1, FRONT, [2])


def test_a_damaged_frame_hurts_its_group_only(dataset: Dataset) -> None:
    """Whole frames come out right and damaged ones are refused, in whatever order they are asked for."""
    file = dataset.root / dataset.episodes[0].clips[FRONT].file
    with FrameReader(dataset) as reader:
        whole = reader.frames(2, FRONT, range(20))
    with av.open(str(file)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
        broken = next(number for number in keys if number > 24)
        after = next((number for number in keys if number > broken), 39)
        at, size = packets[broken].pos, packets[broken].size
    content = bytearray(file.read_bytes())
    for place in range(at + 12, at + size):
        content[place] ^= 0x5A
    file.write_bytes(content)
    for order in (range(20), range(19, -1, -1), np.random.default_rng(1).permutation(20)):
        bad = set()
        with FrameReader(dataset) as reader:
            for number in order:
                try:
                    np.testing.assert_array_equal(reader.frames(2, FRONT, [number])[0], whole[number])
                except FrameError:
                    bad.add(int(number))
        assert bad == set(range(broken - 19, after - 19))


def test_images_in_tables(tmp_path: Path) -> None:
    """PNGs keep every bit, so images are exactly what the generator drew; broken ones are named."""
    cameras = {"observation.images.top": (17, 23)}
    dataset = generate(tmp_path / "data", frames=[3, 4], cameras=cameras, images=True, tasks=["lift"])
    with FrameReader(dataset) as reader:
        images = reader.frames(1, "observation.images.top", [0, 3, 0])
        assert images.shape == (3, 17, 23, 3)
        np.testing.assert_array_equal(images[0], images[2])
        np.testing.assert_array_equal(reader.frames(1, "observation.images.top", [0.3])[0], images[1])
        assert {tuple(pixel) for pixel in images[0].reshape(-1, 3)} >= {(220, 60, 40)}
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = dataset.root / dataset.episodes[0].data
    table = pq.read_table(file)
    at = table.schema.names.index("observation.images.top")
    cells = table.column(at).to_pylist()
    cells[4]["bytes"], cells[5] = b"\x89PNG no", None
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(cells, table.schema.field(at).type)), file)
    with FrameReader(open_dataset(dataset.root)) as reader:
        with pytest.raises(FrameError, match="episode 1, camera `observation.images.top`.*not a readable image"):
            reader.frames(1, "observation.images.top", [1])
        with pytest.raises(DataError, match="holds no image"):
            reader.frames(1, "observation.images.top", [2])
        np.testing.assert_array_equal(reader.frames(1, "observation.images.top", [3])[0], images[1])
