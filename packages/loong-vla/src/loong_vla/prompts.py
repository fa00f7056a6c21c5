"""Instructions and states as tokens: Pi0.5's sentence with the state in 256 bins, GR00T's chat turn with its images.

Sources: OpenPI's `PaligemmaTokenizer` and LeRobot's processors. A tokenizer comes from a folder on disk; one of a few
hundred tokens can be trained for policies that begin from nothing.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from loong_core.errors import CheckpointError, DataError

PAD, START, TURN, END_OF_TURN, SEE, SEEN, IMAGE = (
    *("<pad>", "<bos>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
)
SPECIAL = (PAD, START, TURN, END_OF_TURN, SEE, SEEN, IMAGE)
"""Special tokens of a tokenizer that `train` makes, in the order of their numbers."""
DEFAULT_TASK = "Perform the task."
"""What GR00T is told where a dataset has no instruction, as in LeRobot."""
_PLACE = re.compile(r"<image-(\d+)>")
_EDGES = np.linspace(-1, 1, 256 + 1)[:-1]


def bins(state: np.ndarray) -> list[int]:
    """The state's bins of 256 between -1 and 1: [d] -> numbers -1 (below) to 255 (above and last).

    Bins are looked up at float32 precision, as LeRobot does.
    """
    return (np.digitize(np.asarray(state, np.float32), _EDGES) - 1).tolist()


def cleaned(task: str) -> str:
    """An instruction as Pi0.5 reads it: without blanks around it, underscores and line ends as blanks."""
    return task.strip().replace("_", " ").replace("\n", " ")


def pi05_prompt(task: str, state: np.ndarray | None) -> str:
    """The text of Pi0.5's prompt; `state` [d] is normalised, or None where the policy reads no state."""
    if state is None:
        return f"{cleaned(task)}\n"
    return f"Task: {cleaned(task)}, State: {' '.join(map(str, bins(state)))};\nAction: "


def formal(task: str) -> str:
    """An instruction as GR00T was trained on it: small letters, without punctuation."""
    return "".join(character for character in (task or DEFAULT_TASK).lower() if _kept(character))


def _kept(character: str) -> bool:
    return character.isalnum() or character.isspace() or character == "_"


class Pi05Prompts:
    """Prompts of Pi0.5: [length] tokens, padded at the end, too long ones cut as LeRobot cuts them."""

    def __init__(self, tokenizer: Any, length: int, with_state: bool = True) -> None:
        self._tokenizer, self.length, self.with_state = tokenizer, length, with_state
        self._pad = pad_of(tokenizer)
        self.cut = 0
        """How many prompts were longer than `length` so far."""

    def tokens(self, task: str, state: np.ndarray, cameras: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask, int64 and bool [length]; `state` [d] is normalised and not padded."""
        text = pi05_prompt(task, state if self.with_state else None)
        found = self._tokenizer(text)["input_ids"]
        if len(found) > self.length:
            self.cut += 1
            found = found[: self.length]  # not by the tokenizer, whose settings threads would share
        return _padded(found, self.length, self._pad)


class GrootPrompts:
    """Prompts of GR00T: one turn with the images' tokens before the instruction, [length] tokens, padded at the end.

    `length` grows in steps of `step` to the longest prompt of `tasks` with all `cameras`, so that every batch of a run
    has one shape. LeRobot pads at the front, which changes nothing that counts.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_token: int,
        image_tokens: int,
        cameras: int,
        tasks: Iterable[str],
        *,
        formalise: bool = True,
        step: int = 8,
    ) -> None:
        self._tokenizer, self._image, self._each = tokenizer, image_token, image_tokens
        self._formalise, self._step = formalise, step
        self._pad = pad_of(tokenizer)
        self._encode = lru_cache(4096)(self._encode_new)
        longest = max((len(self._encode(task, cameras)) for task in {*tasks, ""}), default=0)
        self.length = -(-longest // step) * step

    def tokens(self, task: str, state: np.ndarray | None = None, cameras: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask, int64 and bool [length], or longer where an instruction is that no one told of before."""
        found = self._encode(task, cameras)
        return _padded(found, max(self.length, -(-len(found) // self._step) * self._step), self._pad)

    def _encode_new(self, task: str, cameras: int) -> tuple[int, ...]:
        text = self._turn(formal(task) if self._formalise else task or DEFAULT_TASK, cameras)
        result: list[int] = []
        seen = 0
        for token in self._tokenizer(text)["input_ids"]:
            image = token == self._image
            result.extend([token] * (self._each if image else 1))
            seen += image
        if seen != cameras:
            raise DataError(
                f"The tokenizer makes {seen} image tokens (number {self._image}) of a prompt with {cameras} images. It "
                "is not the tokenizer of this model: name its folder in data.tokenizer."
            )
        return tuple(result)

    def _turn(self, text: str, cameras: int) -> str:
        image = self._tokenizer.convert_ids_to_tokens(self._image)
        if getattr(self._tokenizer, "chat_template", None):
            content = [*[{"type": "image"}] * cameras, {"type": "text", "text": text}]
            rendered: str = self._tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            # Eagle's template (GR00T N1.6) leaves numbered places, which its processor fills with marks and a label.
            return _PLACE.sub(lambda found: f"<image {found[1]}><img>{image}</img>", rendered)
        images = f"{SEE}{image}{SEEN}" * cameras
        return f"{TURN}user\n{images}{text}{END_OF_TURN}\n"


def _padded(found: Sequence[int], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full(length, pad, np.int64)
    tokens[: len(found)] = found
    return tokens, np.arange(length) < len(found)


def pad_of(tokenizer: Any) -> int:
    """The number of the tokenizer's padding; 0 where it has none."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, by transformers, from the disk alone.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise CheckpointError(
            f"`{folder}` holds no tokenizer. Name the folder of the policy's tokenizer in data.tokenizer: for Pi0.5 "
            "that of google/paligemma-3b-pt-224, for GR00T N1.7 that of nvidia/Cosmos-Reason2-2B, downloaded."
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers do
        raise CheckpointError(f"the tokenizer in `{folder}` cannot be loaded: {error}") from error


def train(tasks: Iterable[str], vocabulary: int, folder: Path) -> Path:
    """Train a byte-level tokenizer on instructions and write it to `folder`, for policies that begin from nothing.

    It knows the 256 bytes, the tokens of `SPECIAL`, and what is frequent in prompts, at most `vocabulary` in all, and
    begins a text with `START` as PaliGemma's does. A folder that is there is kept; it appears complete or not at all.
    """
    if (folder / "tokenizer.json").is_file():
        return folder
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    numbers = np.arange(-1, 256)
    texts = [text for task in sorted(set(tasks)) for text in (pi05_prompt(task, None), formal(task))]
    tokenizer.train_from_iterator([*texts, f"Task: , State: {' '.join(map(str, numbers))};\nAction: "], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, tokenizer.token_to_id(START))]
    )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=START,
            eos_token=END_OF_TURN,
            pad_token=PAD,
            clean_up_tokenization_spaces=False,
        )
        fast.save_pretrained(temporary)
        temporary.rename(folder)
    except OSError as error:
        if not (folder / "tokenizer.json").is_file():
            raise DataError(f"The trained tokenizer cannot be written to `{folder}`: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
