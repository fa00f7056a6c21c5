"""Rows of text data to samples of tokens and shifted targets; every refusal says what is wrong with the row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from loong_core.data.rows import CHAT_KINDS, KINDS, RowError, Sample, kind_of, unknown_shape
from loong_core.errors import DataError
from loong_core.types import Row
from loong_llm import tokenizer as tokenizers
from loong_llm.conversation import Conversation, read
from loong_llm.tasks import ChatOptions, MidtrainOptions, TextOptions

if TYPE_CHECKING:
    from loong_core.recipe import Recipe

IGNORED = -100
_TABLES = frozenset({"jsonl", "parquet"})
_VERSION = 1


class Labelled(NamedTuple):
    """A row as token ids and, aligned with them, labels (-100: not counted); int64 [tokens]."""

    tokens: np.ndarray
    labels: np.ndarray


class TextEncoder:
    """Encodes rows of the kinds `kinds`. The tokenizer is loaded when the first row needs it.

    Calling it gives the samples of a row: dicts of `tokens` and `targets` (targets[t] is the label of t + 1, the last
    one -100), at most `data.seq_len` long. Raises RowError for a row that cannot be used, DataError
    for data that cannot.
    """

    def __init__(self, recipe: Recipe, options: TextOptions | ChatOptions, kinds: frozenset[str], remedy: str) -> None:
        self.options, self.kinds, self.remedy = options, kinds, remedy
        self.seq_len = recipe.data.seq_len
        self.vocabulary = vocabulary_of(recipe)
        self.tokenizer_folder = tokenizers.folder_of(recipe)
        self.assistant_only = isinstance(options, ChatOptions)
        self.counters: Counter[str] = Counter()
        self.long_rows: str = options.long_rows
        if self.long_rows == "auto":
            self.long_rows = "error" if recipe.data.source in _TABLES or isinstance(options, ChatOptions) else "split"
        self._kinds: dict[str, str] = {}

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer. Raises DataError where the recipe has none."""
        if self.tokenizer_folder is None:
            raise DataError(
                "The data is text, and there is no tokenizer. Set data.tokenizer to a tokenizer folder, or to "
                "{train: 4096} to train one on the data; a model.weights folder with a tokenizer brings its own."
            )
        return tokenizers.load(self.tokenizer_folder)

    @cached_property
    def chat(self) -> Any:
        """The renderer of conversations."""
        from loong_llm.chat import Chat

        assert isinstance(self.options, (ChatOptions, MidtrainOptions))
        last = isinstance(self.options, ChatOptions) and self.options.turns == "last"
        return Chat(self.tokenizer, self.options.chat_template, self.options.template_options, last_turn_only=last)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the same row would give other samples."""
        template = getattr(self.options, "chat_template", None)
        text = template.read_text(encoding="utf-8") if template is not None and template.is_file() else ""
        return json.dumps([_VERSION, tokenizers.fingerprint(self.tokenizer_folder), self.vocabulary, text])

    def __call__(self, row: Row) -> list[Sample]:
        result = self.batch([row])[0]
        if isinstance(result, RowError):
            raise result
        return result

    def batch(self, rows: Sequence[Row]) -> list[list[Sample] | RowError]:
        """The samples of each row, or why it cannot be used; tokenises all of them together."""
        return [_try(self._samples, item) for item in self.label(rows)]

    def label(self, rows: Sequence[Row]) -> list[Labelled | RowError]:
        """Each row as tokens and labels, of any length."""
        results: list[Any] = [_try(self._plain, row) for row in rows]
        texts = [at for at, item in enumerate(results) if isinstance(item, str)]
        for at, labelled in zip(texts, self._tokenize([results[at] for at in texts]), strict=True):
            results[at] = labelled
        talks = [at for at, item in enumerate(results) if isinstance(item, Conversation)]
        if talks:
            for at, item in zip(talks, self._render([results[at] for at in talks]), strict=True):
                results[at] = item
        return [_try(self._in_vocabulary, item) for item in results]

    def explain(self, row: Row) -> list[tuple[str, bool]]:
        """The row as stretches of text, and whether each is counted in the loss."""
        labelled = self.label([row])[0]
        if isinstance(labelled, RowError):
            raise labelled
        counted = labelled.labels != IGNORED
        counted[0] = False
        edges = [0, *(np.flatnonzero(counted[1:] != counted[:-1]) + 1).tolist(), len(counted)]
        pairs = zip(edges, edges[1:], strict=False)
        return [(self._decode(labelled.tokens[begin:end]), bool(counted[begin])) for begin, end in pairs]

    def _decode(self, tokens: np.ndarray) -> str:
        if self.tokenizer_folder is None:
            return " ".join(map(str, tokens.tolist())) + " "
        return str(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=False))

    def _kind(self, row: Row) -> str:
        """The kind of the row's file, told by its first row of a known kind."""
        kind = self._kinds.get(row.file) or kind_of(row.fields)
        if kind is None:
            raise RowError(unknown_shape(list(row.fields)))
        if kind not in self.kinds:
            raise DataError(
                f"{row.file}:{row.line}: the rows are of kind `{kind}`, which this task does not take. "
                f"It takes {', '.join(f'`{name}`' for name in KINDS if name in self.kinds)}. {self.remedy}"
            )
        self._kinds[row.file] = kind
        if row.fields.get(kind) is None:
            keys = ", ".join(f"`{key}`" for key in row.fields) or "none"
            raise RowError(f"`{kind}` is missing; the keys are {keys}")
        return kind

    def _plain(self, row: Row) -> Any:
        """Token ids labelled; a text or a conversation as it is, to be tokenised together with others."""
        kind = self._kind(row)
        if kind == "input_ids":
            return _labelled(row.fields)
        if kind in CHAT_KINDS:
            return read(kind, row.fields)
        text = row.fields["text"]
        if not isinstance(text, str):
            raise RowError(f"`text` is of type {type(text).__name__}, not a string")
        if not text.strip():
            raise RowError("`text` is empty")
        return text

    def _tokenize(self, texts: list[Any]) -> list[Labelled]:
        if not texts:
            return []
        lists = self.tokenizer(texts, verbose=False, return_attention_mask=False)["input_ids"]
        end = self.tokenizer.eos_token_id if getattr(self.options, "end_of_text", False) else None
        results = []
        for tokens in lists:
            if end is not None and tokens[-1:] != [end]:
                tokens.append(end)
            array = np.array(tokens, dtype=np.int64)
            results.append(Labelled(array, array))
        return results

    def _render(self, talks: list[Any]) -> list[Labelled | RowError]:
        results: list[Labelled | RowError] = []
        for item in self.chat.encode(talks):
            if not isinstance(item, RowError):
                tokens, mask = item
                item = Labelled(tokens, np.where(mask, tokens, IGNORED) if self.assistant_only else tokens)
            results.append(item)
        return results

    def _in_vocabulary(self, item: Labelled) -> Labelled:
        for name, values in (("token id", item.tokens), ("label", item.labels[item.labels != IGNORED])):
            if len(values) == 0:
                continue
            low, high = int(values.min()), int(values.max())
            wrong = low if low < 0 else high
            if low < 0 or (self.vocabulary is not None and high >= self.vocabulary):
                allowed = f"0 to {self.vocabulary - 1}" if self.vocabulary is not None else "0 and above"
                extra = " or -100" if name == "label" else ""
                raise RowError(f"{name} {wrong} is outside the model's vocabulary; allowed: {allowed}{extra}")
        return item

    def _samples(self, item: Labelled) -> list[Sample]:
        tokens, limit = item.tokens, self.seq_len
        targets = np.append(item.labels[1:], IGNORED)
        if len(tokens) > limit:
            if self.long_rows == "error":
                raise RowError(
                    f"is {len(tokens):,} tokens, longer than data.seq_len = {limit:,}; "
                    "task.options.long_rows says what else may be done with such rows"
                )
            if self.long_rows == "truncate":
                self.counters["truncated"] += 1
                tokens, targets = tokens[:limit], np.append(targets[: limit - 1], IGNORED)
            else:
                self.counters["split"] += 1
        if not (targets != IGNORED).any():
            raise RowError("has no token that counts in the loss" if len(tokens) > 1 else "is a single token")
        pieces = range(0, len(tokens), limit)
        samples = [{"tokens": tokens[at : at + limit], "targets": targets[at : at + limit]} for at in pieces]
        return [
            {name: values.astype(np.int32) for name, values in sample.items()}
            for sample in samples
            if (sample["targets"] != IGNORED).any()
        ]


def _try(function: Any, item: Any) -> Any:
    if isinstance(item, RowError):
        return item
    try:
        return function(item)
    except RowError as error:
        return error


def _labelled(fields: Mapping[str, Any]) -> Labelled:
    """A row of token ids. Padding that an `attention_mask` hides at its ends is cut off, and so never learned."""
    tokens = _integers("input_ids", fields["input_ids"])
    labels = tokens if fields.get("labels") is None else _aligned("labels", fields, tokens)
    if fields.get("attention_mask") is None:
        return Labelled(tokens, labels)
    real = np.flatnonzero(_aligned("attention_mask", fields, tokens))
    if len(real) == 0 or real[-1] - real[0] + 1 != len(real):
        raise RowError("`attention_mask` hides tokens inside the row; only padding at its ends may be hidden")
    kept = slice(real[0], real[-1] + 1)
    return Labelled(tokens[kept], labels[kept])


def _aligned(name: str, fields: Mapping[str, Any], tokens: np.ndarray) -> np.ndarray:
    values = _integers(name, fields[name])
    if len(values) != len(tokens):
        raise RowError(f"`{name}` has {len(values):,} entries, `input_ids` has {len(tokens):,}; they must be aligned")
    return values


def _integers(name: str, values: Any) -> np.ndarray:
    if not isinstance(values, (list, tuple, np.ndarray)):
        raise RowError(f"`{name}` is of type {type(values).__name__}, not a list of whole numbers")
    if len(values) == 0:
        raise RowError(f"`{name}` is empty")
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise RowError(f"`{name}` is not a list of whole numbers: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu" or any(isinstance(value, bool) for value in values):
        raise RowError(f"`{name}` is not a list of whole numbers")
    if array.dtype.kind == "u" or int(np.abs(array).max()) >= 2**31:
        raise RowError(f"`{name}` holds a number that is no token id: {int(array.max())}")
    return array.astype(np.int64)


def vocabulary_of(recipe: Recipe) -> int | None:
    """Number of token ids of the recipe's model as its config.json says; None where that is not known here."""
    config: dict[str, Any] = {}
    given = recipe.model.config
    file = None
    if isinstance(given, str):
        file = Path(given) / "config.json" if Path(given).is_dir() else Path(given)
    elif recipe.model.weights is not None:
        file = recipe.model.weights / "config.json"
    if file is not None and file.is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"`{file}` is not valid JSON: {error}.") from error
    elif isinstance(given, str):
        config = _preset(recipe.model.family, given)
    if isinstance(given, Mapping):
        config = {**config, **given}
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def _preset(family: str | None, name: str) -> dict[str, Any]:
    from loong_core.registry import open_registry, resolve

    for row in open_registry().table("model_families").values():
        if row.presets is not None and family in (None, row.name):
            presets = resolve(row.presets)
            presets = presets() if callable(presets) else presets
            if name in presets:
                return dict(presets[name])
    return {}


def pretrain(recipe: Recipe) -> TextEncoder:
    """The encoder of task `pretrain`."""
    remedy = "For conversations set task.name: sft (only the assistant counts) or midtrain (every token counts)."
    options = TextOptions.model_validate(recipe.task.options)
    return TextEncoder(recipe, options, frozenset({"input_ids", "text"}), remedy)


def midtrain(recipe: Recipe) -> TextEncoder:
    """The encoder of task `midtrain`."""
    return TextEncoder(recipe, MidtrainOptions.model_validate(recipe.task.options), frozenset(KINDS), "")


def sft(recipe: Recipe) -> TextEncoder:
    """The encoder of task `sft`."""
    remedy = "For plain text set task.name: pretrain."
    return TextEncoder(recipe, ChatOptions.model_validate(recipe.task.options), CHAT_KINDS | {"input_ids"}, remedy)
