"""Makes batches of robot episodes: each a function of the seed and its step, in whichever process or thread it is made.

Frames are decoded and resized in threads, into the memory that goes to the device. A frame that does not decode is
replaced by another sample, counted and named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from loong_core.errors import DataError
from loong_vla.flops import Seen
from loong_vla.images import DRAWS
from loong_vla.lerobot.video import FrameError, FrameReader
from loong_vla.sequence import Draws, Order, Samples

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.train.engine import Batch
    from loong_vla.lerobot.layout import Dataset, Episode
    from loong_vla.options import RobotOptions
    from loong_vla.processing import Processing

TRIES = 32
"""Samples in a row that may fail to decode before there is nothing to train on."""


class Skipped(NamedTuple):
    """A sample that was replaced: its place, and why; or the last of `TRIES`, which nothing replaced."""

    episode: int
    frame: int
    reason: str
    last: bool = False


@dataclass(frozen=True, kw_only=True)
class Part:
    """Training data or held-out data: dataset, samples, their order, random numbers, and an open reader of frames.

    `once` marks held-out data, of which a sample counts once and nothing is augmented.
    """

    dataset: Dataset
    samples: Samples
    order: Order
    draws: Draws
    reader: FrameReader
    once: bool = False


class Cut(NamedTuple):
    """How a global batch is cut: replicas, micro-batches of each, samples of a micro-batch."""

    dp: int
    micro_batches: int
    micro_batch: int

    @property
    def samples(self) -> int:
        """Samples of a global batch."""
        return self.dp * self.micro_batches * self.micro_batch


class Made(NamedTuple):
    """A replica's share of a step: its micro-batches, what was replaced in them, and what their samples show."""

    batches: list[Batch]
    skipped: list[Skipped]
    seen: Seen


class Maker:
    """Makes the micro-batches of one data-parallel replica.

    Micro-batch `m` of replica `r` holds positions `(m * dp + r) * micro_batch` to `... + micro_batch - 1` of a global
    batch. `pinned` puts them where a GPU can fetch them by itself; `pack` adds what the model computes of a batch on
    the CPU.
    """

    def __init__(
        self,
        processing: Processing,
        cut: Cut,
        replica: int,
        *,
        settings: RobotOptions,
        threads: int = 1,
        pinned: bool = False,
        fields: Mapping[str, Any] | None = None,
        pack: Callable[[Batch], dict[str, Tensor]] | None = None,
    ) -> None:
        self.processing, self.cut, self.fields = processing, cut, dict(fields or {})
        self._replica, self._settings, self._pinned, self._pack = replica, settings, pinned, pack
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def make(self, part: Part, step: int) -> Made:
        """The share of a step of `part`; what was replaced is in the order of positions."""
        cut, begin = self.cut, step * self.cut.samples
        made: list[tuple[dict[str, Any], list[Future[tuple[dict[str, np.ndarray], list[Skipped]]]]]] = []
        for number in range(cut.micro_batches):
            first = begin + (number * cut.dp + self._replica) * cut.micro_batch
            images = self._empty((cut.micro_batch, len(self.processing.cameras), *self.processing.size, 3))
            pixels = images.numpy()
            jobs = [
                self._decoders.submit(self._sample, part, first + row, pixels[row]) for row in range(cut.micro_batch)
            ]
            made.append(({"images": images}, jobs))
        batches, skipped = [], []
        for batch, jobs in made:
            done = [job.result() for job in jobs]
            batch |= self._together([sample for sample, _ in done])
            batch |= self._pack(batch) if self._pack is not None else {}
            batches.append({name: self._ready(tensor) for name, tensor in batch.items()})
            skipped += [item for _, items in done for item in items]
        return Made(batches, skipped, seen_in(batches, self.fields))

    def close(self) -> None:
        """Stop the threads, after what they are doing."""
        self._decoders.shutdown(wait=True, cancel_futures=True)

    def _sample(self, part: Part, position: int, pixels: np.ndarray) -> tuple[dict[str, np.ndarray], list[Skipped]]:
        """The sample of a position, its images written to `pixels` [c,y,x,3]; and those it stands for."""
        skipped: list[Skipped] = []
        number = part.order.sample(position)
        for attempt in range(TRIES):
            episode, frame = part.samples.place(number)
            try:
                return self._made(part, position, episode, frame, pixels), skipped
            except FrameError as error:
                skipped.append(Skipped(episode, frame, str(error), attempt + 1 == TRIES))
            number = int(part.draws.uniform(position, 1, f"again {attempt}")[0] * len(part.samples))
        # Raising here would leave the other ranks waiting: the step is done with a sample that counts nothing.
        pixels[:] = 0
        sample = self._made(part, position, episode, frame, None)
        sample["action_mask"] = np.zeros_like(sample["action_mask"])
        return sample, skipped

    def _made(
        self, part: Part, position: int, number: int, frame: int, pixels: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """The sample that begins at a frame, with the random numbers of `position`; its images where `pixels` is."""
        use, settings, draws = self.processing, self._settings, part.draws
        episode = part.dataset.episode(number)
        where = draws.uniform(position, 4, "place")
        crop = (float(where[0]), float(where[1])) if use.random_crop and not part.once else None
        if pixels is not None:
            self._look(part, episode, frame, crop, pixels)
        names = [settings.state, settings.action]
        state = part.dataset.columns(episode, names[:1], frame, frame + 1)[names[0]].reshape(-1)
        stop = min(frame + use.steps, episode.length)
        actions = part.dataset.columns(episode, names[1:], frame, stop)[names[1]].reshape(stop - frame, -1)
        blind = not part.once and where[2] < use.state_dropout
        sample = use.observe(state, part.dataset.task(episode, frame), drop_state=bool(blind))
        sample |= use.chunk(actions, state)
        if part.once and position >= len(part.samples):
            sample["action_mask"] = np.zeros_like(sample["action_mask"])
        shape = sample["actions"].shape
        sample["noise"] = draws.normal(position, shape[0] * shape[1], "noise").reshape(shape)
        sample["time"] = np.array(use.time(float(draws.uniform(position, 1, "time")[0])), np.float32)
        if settings.augment == "openpi" and not part.once:
            drawn = draws.uniform(position, len(use.cameras) * (DRAWS - 1), "augmentation")
            wrist = np.array([[float(camera.wrist)] for camera in use.cameras])
            changes = np.concatenate([drawn.reshape(len(use.cameras), -1), wrist], axis=1)
            sample["augmentation"] = changes.astype(np.float32)
        return sample

    def _look(
        self, part: Part, episode: Episode, frame: int, crop: tuple[float, float] | None, pixels: np.ndarray
    ) -> None:
        """Write what the cameras see to `pixels` [c,y,x,3]; raises `FrameError`."""
        for row, camera in enumerate(self.processing.cameras):
            if camera.feature is None:
                pixels[row] = 0
            else:
                image = part.reader.frames(episode, camera.feature, [frame])[0]
                pixels[row] = self.processing.image(image, camera.feature, crop)

    def _together(self, samples: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        """Samples as tensors with a batch axis; prompts of different length are padded by the longest's."""
        longest = max(len(sample["tokens"]) for sample in samples)
        for sample in samples:
            if (short := longest - len(sample["tokens"])) > 0:
                sample["tokens"] = np.pad(sample["tokens"], (0, short))
                sample["token_mask"] = np.pad(sample["token_mask"], (0, short))
        batch = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
        known = self.fields.get("vocabulary")
        if known and (most := int(batch["tokens"].max())) >= known:
            raise DataError(
                f"The tokenizer gives token {most}, but the model has {known} tokens. It is not the one of "
                "this model: name the folder of its tokenizer in data.tokenizer."
            )
        return batch

    def _ready(self, tensor: Tensor) -> Tensor:
        """Where the device can fetch it by itself."""
        return tensor.pin_memory() if self._pinned and not tensor.is_pinned() else tensor

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)


def seen_in(batches: Sequence[Batch], fields: Mapping[str, Any]) -> Seen:
    """What the samples of some batches show on average: images of cameras that are there, tokens of text."""
    samples = sum(len(batch["tokens"]) for batch in batches)
    images = sum(int(batch["camera_mask"].sum()) for batch in batches) / samples
    tokens = sum(int(batch["token_mask"].sum()) for batch in batches) / samples
    # GR00T's prompt has the tokens of images in it.
    return Seen(images, tokens - images * fields["image_tokens"] if "tower" in fields else tokens)
