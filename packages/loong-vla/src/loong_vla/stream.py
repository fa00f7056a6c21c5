"""Robot episodes as batches: every sample is a function of the seed and its position in an endless sequence, whichever
rank or thread makes it, whatever was asked for before.

Frames are decoded and resized in threads, into the memory that goes to the device. A frame that does not decode is
replaced by another sample, counted and named; past a quota the run is asked to stop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from loong_core.errors import DataError
from loong_vla.flops import Seen, repeated, training
from loong_vla.images import DRAWS
from loong_vla.lerobot.video import FrameError, FrameReader
from loong_vla.sequence import Draws, Order, Samples

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.train.engine import Batch
    from loong_core.train.run import Run
    from loong_vla.lerobot.layout import Dataset, Episode
    from loong_vla.options import RobotOptions
    from loong_vla.processing import Processing

logger = logging.getLogger(__name__)

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


class RobotStream:
    """The `loong_core.train.batches.Batches` of one data-parallel replica.

    Micro-batch `m` of replica `r` holds positions `(m * dp + r) * micro_batch` to `... + micro_batch - 1` of a global
    batch. `processing` turns observations into inputs and outputs into actions; an evaluation may use it.
    """

    def __init__(
        self,
        processing: Processing,
        train: Part,
        held_out: Part | None,
        cut: Cut,
        replica: int,
        *,
        settings: RobotOptions,
        threads: int = 1,
        eval_batches: int = 0,
        recompute: bool = False,
        pinned: bool = False,
        fields: Mapping[str, Any] | None = None,
        pack: Callable[[Batch], dict[str, Tensor]] | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.processing, self.train, self.held_out = processing, train, held_out
        self._cut, self._replica, self._settings, self._pinned = cut, replica, settings, pinned
        self._fields, self._identity, self._step = dict(fields or {}), dict(identity or {}), 0
        self._seen: dict[int, Seen] = {}
        self._recompute = recompute
        self._pack = pack
        self.eval_count = 0
        if held_out is not None:
            self.eval_count = min(eval_batches, -(-len(held_out.samples) // cut.samples))
        self.skipped: list[Skipped] = []
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._makers = ThreadPoolExecutor(settings.ahead, thread_name_prefix="data")
        self._ahead: dict[int, Future[tuple[list[Batch], list[Skipped]]]] = {}

    # ----------------------------------------------------------------------------------------------------- batches
    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a 0-based step. The steps after it are prepared in the background."""
        future = self._ahead.pop(step, None)
        wanted = range(step + 1, step + 1 + self._settings.ahead)
        for old in [number for number in self._ahead if number not in wanted]:
            self._ahead.pop(old).cancel()
        made, skipped = future.result() if future is not None else self._make(self.train, step)
        for number in wanted:
            if number not in self._ahead:
                self._ahead[number] = self._makers.submit(self._make, self.train, number)
        self._step = step + 1
        self._seen = {step: seen_in(made, self._fields)} if self._fields else {}
        self._report(skipped)
        return made

    def eval_batches(self, index: int) -> list[Batch]:
        """This rank's micro-batches of held-out global batch `index`, the same every time it is asked for; samples that
        fill up the last one do not count. Indices from `eval_count` on begin again."""
        assert self.held_out is not None, "the recipe has no data.eval"
        made, skipped = self._make(self.held_out, index % self.eval_count)
        self._report(skipped)
        return made

    def problem(self) -> str | None:
        """Too many samples were replaced, or none was found to replace one."""
        if found := next((item for item in self.skipped if item.last), None):
            return (
                f"{TRIES} samples in a row could not be decoded; the last was frame {found.frame} of {found.reason} "
                "`loong data check` says what is wrong with the dataset."
            )
        if len(self.skipped) <= self._settings.skip_quota:
            return None
        last, quota = self.skipped[-1], self._settings.skip_quota
        return (
            f"{len(self.skipped)} samples could not be decoded, more than data.options.skip_quota: {quota} allows; the "
            f"last was frame {last.frame} of {last.reason} `loong data check` finds them all; leave their episodes out "
            "in data.options.episodes."
        )

    def _report(self, skipped: Sequence[Skipped]) -> None:
        for item in skipped:
            self.skipped.append(item)
            place = "Nothing takes its place" if item.last else "Another sample takes its place"
            logger.warning("frame %d of %s %s (%d so far).", item.frame, item.reason, place, len(self.skipped))

    # ------------------------------------------------------------------------------------------------------ counts
    def samples(self, step: int) -> int:
        """Samples in a step's global batch, over all ranks."""
        return self._cut.samples

    def tokens(self, step: int) -> int:
        """Elements of action chunks that the loss counts in a step's global batch."""
        begin = step * self._cut.samples
        numbers = [self.train.order.sample(position) for position in range(begin, begin + self._cut.samples)]
        return int(self.processing.counted(self.train.samples.remaining(numbers)).sum())

    def flops(self, step: int) -> float | None:
        """Model FLOPs of the step last asked for, by formula; this replica's samples stand for those of all."""
        seen = self._seen.get(step)
        return None if seen is None else training(self._fields, seen) * self._cut.samples

    def recomputed(self, step: int) -> float:
        """FLOPs of the step last asked for that `parallel.recompute` does a second time, by the same formula."""
        seen = self._seen.get(step)
        return 0.0 if seen is None or not self._recompute else repeated(self._fields, seen) * self._cut.samples

    # ------------------------------------------------------------------------------------------------------- state
    def state(self) -> dict[str, Any]:
        """What a later process needs to continue after the last step asked for: its number, and what must not
        change."""
        return {**self._identity, "step": self._step}

    def load_state(self, state: Mapping[str, Any]) -> int:
        """Continue where `state` was taken; returns the next 0-based step.

        Raises:
            DataError: the data, or a setting that decides what a step trains on, is not what it was.
        """
        changed = [
            f"  {name.replace('_', ' ')}: was {state.get(name)!r}, is {value!r}"
            for name, value in self._identity.items()
            if state.get(name) != value
        ]
        if changed:
            text = "The run cannot continue on this data: samples would be repeated or left out. What differs:"
            remedy = (
                "Restore it, or start a new run from the checkpoint's weights (model.weights) under another run.name."
            )
            raise DataError("\n".join([text, *changed, remedy]))
        self._step = int(state["step"])
        return self._step

    def close(self) -> None:
        """Stop threads, close files."""
        for pool in (self._makers, self._decoders):
            pool.shutdown(wait=True, cancel_futures=True)
        for part in (self.train, self.held_out):
            if part is not None:
                part.reader.close()

    # ------------------------------------------------------------------------------------------------------ making
    def _make(self, part: Part, step: int) -> tuple[list[Batch], list[Skipped]]:
        """The micro-batches of a step, and what was replaced in them, in the order of positions."""
        cut, begin = self._cut, step * self._cut.samples
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
        return batches, skipped

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
        known = self._fields.get("vocabulary")
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


def stream(run: Run, replica: int) -> RobotStream:
    """The batches of a run's replica: the function behind `DataSource.stream`."""
    from loong_vla.open_stream import open_stream

    return open_stream(run, replica)
