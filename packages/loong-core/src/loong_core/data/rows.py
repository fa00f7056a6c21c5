"""What a row of training text may look like: the shapes are named here once, for sources, tasks and `loong data`.

Free of numpy and tensor libraries, so that files can be checked before any worker starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from loong_core.types import Row

if TYPE_CHECKING:
    import numpy as np

Sample = Mapping[str, "np.ndarray"]
"""One training example: equally long integer arrays by column name."""

KINDS: dict[str, str] = {
    "input_ids": "`input_ids`, a list of token ids, and optionally `labels` of the same length",
    "messages": "`messages`, a list of {role, content}",
    "conversations": "`conversations`, a list of {from, value}",
    "instruction": "`instruction` and `output`, and optionally `input`, `system`, `history`",
    "text": "`text`, a string",
}
"""Row kinds by the key that tells them, the most specific first, with the shape in words."""

CHAT_KINDS = frozenset({"messages", "conversations", "instruction"})
"""Row kinds that are conversations."""


class BadRow(NamedTuple):
    """A record that cannot be used. A reader yields it in place of a `Row`; `line` counts from 1, 0 = whole file."""

    reason: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}" if self.line else f"{self.file}: {self.reason}"


class RowError(ValueError):
    """Raised by an encoder for a row it cannot use; the message is the reason, without the place."""


class Encoder(Protocol):
    """What `Task.encoder(recipe)` returns. A plain function is enough; the attributes below are optional.

    `batch(rows) -> list of (samples or RowError)`, one entry per row, lets a tokenizer work on many rows at once.
    `fingerprint` is text that changes when the result of encoding the same row would change (files of a tokenizer).
    `counters` is a mapping of names to counts, reported after preparation (`truncated`).
    `explain(row) -> list of (text, counted)` shows what is learned of a row.
    """

    def __call__(self, row: Row) -> Sequence[Sample]: ...


def kind_of(fields: Mapping[str, Any]) -> str | None:
    """The row kind of a record, None where no key of `KINDS` is present."""
    return next((kind for kind in KINDS if fields.get(kind) is not None), None)


def unknown_shape(keys: Sequence[str]) -> str:
    """The sentence for a record whose keys are those of no kind."""
    allowed = "; or ".join(KINDS.values())
    found = ", ".join(f"`{key}`" for key in keys) or "none"
    return f"no known row shape: the keys are {found}. A row has {allowed}. Columns of other names: data.options.rename"


def texts(fields: Mapping[str, Any]) -> Iterator[str]:
    """Every text of a row of any kind, to train a tokenizer on. Malformed parts are passed over."""
    kind = kind_of(fields)
    if kind == "text":
        if isinstance(fields["text"], str):
            yield fields["text"]
    elif kind == "instruction":
        yield from (fields[key] for key in ("system", "instruction", "input", "output") if _is_text(fields.get(key)))
        for turn in fields.get("history") or ():
            yield from (part for part in turn if _is_text(part))
    elif kind in ("messages", "conversations") and isinstance(fields[kind], list):
        for message in fields[kind]:
            if isinstance(message, Mapping):
                yield from (message[key] for key in ("content", "value") if _is_text(message.get(key)))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""
