"""Frames of MP4 files by the time they are shown: decoders stay open where they stopped, so that neighbouring frames
are decoded in one go. Colours are PyAV's conversion to `rgb24`, the one lerobot's `pyav` backend uses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import av
import av.container
import av.error
import numpy as np
from av.video.reformatter import VideoReformatter

from loong_core.errors import DataError
from loong_vla.lerobot.layout import Dataset, Episode

_SEEK_FRAMES = 8
_SEEK_BACK = 1.0


class FrameError(DataError):
    """Frames that cannot be had: the video is missing, damaged, or shows nothing at that time.

    `file`, `episode` and `camera` name them; a stream may skip the sample and count it.
    """

    def __init__(self, message: str, *, file: Path, episode: int = -1, camera: str = "") -> None:
        super().__init__(message)
        self.file, self.episode, self.camera = file, episode, camera


class Decoder:
    """One open video file. Not safe in threads.

    Frames come in the order they are shown. Going on is cheaper than seeking while the wanted frame is no further than
    the next key frame may be, which is learnt from the key frames passed.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.path = path
        try:
            self._container = av.open(str(path))
        except (av.error.FFmpegError, OSError, ValueError) as error:
            missing = "is missing" if not path.exists() else f"cannot be opened: {error}"
            raise FrameError(f"`{path}` {missing}.", file=path) from None
        streams = self._container.streams.video
        if not streams or streams[0].codec_context is None or not streams[0].time_base:
            self._container.close()
            lacks = "no video" if not streams else "a video without a time scale, or of a kind that cannot be decoded"
            raise FrameError(f"`{path}` holds {lacks}.", file=path)
        self._stream = streams[0]
        self._stream.codec_context.thread_count = threads
        self._reformatter = VideoReformatter()
        rate = self._stream.average_rate
        self._period = 1.0 / float(rate) if rate else 1.0 / 30.0
        self._frames: Iterator[Any] | None = None
        self._time: float | None = None
        self._pixels: np.ndarray | None = None
        self._frame: Any = None
        self._key_time: float | None = None
        self._key_distance = 0.0
        self._damaged = False

    @property
    def stream(self) -> Any:
        """The video stream, for what its header says."""
        return self._stream

    def packet_times(self) -> np.ndarray:
        """Seconds at which the frames of the whole file are shown, ascending: read from its packets, nothing decoded.

        Raises:
            FrameError: the packets cannot be read.
        """
        self._frames = None
        try:
            self._container.seek(0, stream=self._stream)
            packets = self._container.demux(self._stream)
            shown = [
                packet.pts for packet in packets if packet.pts is not None and packet.size and not packet.is_discard
            ]
        except (av.error.FFmpegError, ValueError) as error:
            raise FrameError(f"`{self.path}` cannot be read: {error}.", file=self.path) from None
        return np.sort(np.array(shown, np.int64)) * float(self._stream.time_base)

    def at(self, times: Sequence[float], tolerance: float) -> np.ndarray:
        """The frames shown at `times` (seconds of the file), uint8 [n, height, width, 3].

        Raises:
            FrameError: no frame within `tolerance` seconds of one of them, or it cannot be decoded.
        """
        order = np.argsort(np.asarray(times, np.float64), kind="stable")
        result: list[np.ndarray | None] = [None] * len(times)
        for number in order.tolist():
            result[number] = self._at(float(times[number]), tolerance)
        images = [pixels for pixels in result if pixels is not None]
        if len({image.shape for image in images}) > 1:
            raise FrameError(f"`{self.path}` is damaged: its images differ in size.", file=self.path)
        return np.stack(images)

    def _at(self, time: float, tolerance: float) -> np.ndarray:
        """A frame, decoded on from here where that is shorter. What is damaged on the way must not matter, so failures
        are tried again from the key frame before."""
        for ahead in (True, False) if self._ahead(time, tolerance) else (False,):
            try:
                if not ahead:
                    self._seek(time, tolerance)
                return self._show(time, tolerance)
            except FrameError as error:
                failure = error
            except (av.error.FFmpegError, ValueError) as error:
                failure = FrameError(f"`{self.path}` cannot be decoded: {error}.", file=self.path)
            self._frames = None
        raise failure

    def _show(self, time: float, tolerance: float) -> np.ndarray:
        while self._time is not None and self._time <= time - tolerance:
            self._next()
        if self._time is None or self._time >= time + tolerance:
            shown = "the video ends before" if self._time is None else f"the next one is shown at {self._time:.6f} s"
            raise FrameError(f"`{self.path}` has no frame at {time:.6f} s: {shown}.", file=self.path)
        if self._damaged:
            reason = f"the frame at {self._time:.6f} s, or one that it is made of, is not whole"
            raise FrameError(f"`{self.path}` is damaged: {reason}.", file=self.path)
        if self._pixels is None:
            self._pixels = self._reformatter.reformat(self._frame, format="rgb24").to_ndarray()
        return self._pixels

    def _ahead(self, time: float, tolerance: float) -> bool:
        """Whether decoding on from here is the shortest way to `time`."""
        if self._frames is None or self._time is None or time <= self._time - tolerance:
            return False
        return time - self._time <= max(_SEEK_FRAMES * self._period, self._key_distance)

    def _seek(self, time: float, tolerance: float) -> None:
        """Stop at a key frame at or before `time`, or at the first frame of the file."""
        start = 0 if self._stream.start_time is None else self._stream.start_time
        for seconds in (0.0, _SEEK_BACK, None):
            offset = start if seconds is None else max(start, int((time - seconds) / self._stream.time_base) - 1)
            self._container.seek(offset, stream=self._stream, backward=True, any_frame=False)
            self._frames, self._key_time, self._damaged = self._container.decode(self._stream), None, False
            self._next()
            if self._time is not None and self._time < time + tolerance:
                return

    def _next(self) -> None:
        assert self._frames is not None, "nothing was sought"
        frame = next((frame for frame in self._frames if frame.pts is not None), None)
        self._frame, self._pixels = frame, None
        if frame is None:
            self._time = self._frames = None
            return
        self._time = float(frame.pts * self._stream.time_base)
        self._damaged = frame.is_corrupt or (self._damaged and not frame.key_frame)
        if frame.key_frame:
            self._key_time = self._time
        elif self._key_time is not None:
            self._key_distance = max(self._key_distance, self._time - self._key_time)

    def close(self) -> None:
        """Close the file."""
        self._frames = self._frame = None
        self._container.close()


class FrameReader:
    """Frames of a dataset's cameras, from videos or from images in its tables. Safe in threads.

    At most `decoders` video files stay open while nobody reads them. `tolerance` is the most a frame may be off the
    time of its row, in seconds.
    """

    def __init__(self, dataset: Dataset, tolerance: float = 1e-4, decoders: int = 32, threads: int = 1) -> None:
        self._dataset, self._tolerance, self._limit, self._threads = dataset, tolerance, decoders, threads
        self._idle: OrderedDict[int, Decoder] = OrderedDict()
        self._lock = Lock()
        self._closed = False

    def frames(self, episode: Episode | int, camera: str, when: Iterable[int] | Iterable[float]) -> np.ndarray:
        """Frames of one camera, uint8 [n, height, width, 3].

        `when` are frame numbers of the episode, or (floats) seconds from its beginning.

        Raises:
            FrameError: one of them cannot be had; it names file, episode and camera.
            DataError: the rows of the episode cannot be read.
        """
        episode = episode if isinstance(episode, Episode) else self._dataset.episode(episode)
        feature = self._dataset.features[camera]
        values = np.asarray(when if isinstance(when, np.ndarray) else list(when))
        numbers = values.dtype.kind in "iu"
        if feature.dtype == "image":
            rows = values if numbers else np.rint(values * self._dataset.fps).astype(np.int64)
            try:
                return self._dataset.images(episode, camera, rows.tolist())
            except DataError as error:
                file = self._dataset.root / episode.data
                raise FrameError(_place(episode, camera) + str(error), file=file, **_names(episode, camera)) from None
        if numbers:
            begin, stop = int(values.min()), int(values.max()) + 1
            times = self._dataset.columns(episode, ["timestamp"], begin, stop)["timestamp"][values - begin]
        else:
            times = values
        clip = episode.clips[camera]
        path = self._dataset.root / clip.file
        try:
            return self._decode(path, [clip.start + float(time) for time in times])
        except FrameError as error:
            raise FrameError(_place(episode, camera) + str(error), file=path, **_names(episode, camera)) from None

    def _decode(self, path: Path, times: Sequence[float]) -> np.ndarray:
        decoder = self._take(path, times[0] if times else 0.0)
        try:
            return decoder.at(times, self._tolerance)
        finally:
            self._give(decoder)

    def _take(self, path: Path, time: float) -> Decoder:
        """An idle decoder of the file, one that has `time` just before it if there is such a one, or a new one."""
        with self._lock:
            mine = [(number, decoder) for number, decoder in self._idle.items() if decoder.path == path]
            if mine:
                number, decoder = min(mine, key=lambda item: not item[1]._ahead(time, self._tolerance))
                del self._idle[number]
                return decoder
        return Decoder(path, self._threads)

    def _give(self, decoder: Decoder) -> None:
        old: list[Decoder] = []
        with self._lock:
            if self._closed:
                old.append(decoder)
            else:
                self._idle[id(decoder)] = decoder
                while len(self._idle) > self._limit:
                    old.append(self._idle.popitem(last=False)[1])
        for item in old:
            item.close()

    def close(self) -> None:
        """Close every file that nobody reads just now; the others are closed when they come back."""
        with self._lock:
            self._closed = True
            idle, self._idle = list(self._idle.values()), OrderedDict()
        for decoder in idle:
            decoder.close()

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _names(episode: Episode, camera: str) -> dict[str, Any]:
    return {"episode": episode.index, "camera": camera}


def _place(episode: Episode, camera: str) -> str:
    return f"episode {episode.index}, camera `{camera}`: "
