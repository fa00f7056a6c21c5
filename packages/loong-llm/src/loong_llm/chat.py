"""Conversations to tokens and the assistant-only mask, for any chat template, also one that does not mark generations.

Without `{% generation %}` the mask is derived from the template's own output: a turn is what the text gains between the
prompt for it and the conversation up to it. Some templates rewrite earlier turns (strip their thinking); there the turn
is found by rendering the whole conversation once more with a marker in its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loong_core.data.rows import RowError
from loong_core.errors import DataError
from loong_llm.conversation import Conversation, Message

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKER = "loongturnmarker"
_SHOWN = 240


class Span(NamedTuple):
    """Characters of the rendered text that the assistant says, with the end of its turn."""

    begin: int
    end: int


class Chat:
    """Renders and tokenises conversations with the tokenizer's chat template, or the one in `template_file`.

    Raises:
        DataError: there is no template, or the tokenizer cannot say which text a token stands for.
    """

    def __init__(
        self, tokenizer: Any, template_file: Path | None, variables: Mapping[str, Any], *, last_turn_only: bool
    ) -> None:
        self.tokenizer, self.variables, self.last_turn_only = tokenizer, dict(variables), last_turn_only
        self.template = _template(tokenizer, template_file)
        self.tagged = self.template is not None and bool(_GENERATION.search(self.template))
        if not tokenizer.is_fast:
            raise DataError(
                f"The tokenizer {type(tokenizer).__name__} gives no character positions; the mask needs them. "
                "Save it with a tokenizer.json (a fast tokenizer of transformers)."
            )
        added = tokenizer.added_tokens_decoder.items()
        self.special = {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}

    def encode(self, conversations: Sequence[Conversation]) -> list[tuple[np.ndarray, np.ndarray] | RowError]:
        """For each conversation its token ids, int64 [tokens], and its mask, bool [tokens]: what the assistant says,
        with the token that ends its turn."""
        results: list[Any] = [self._spans(conversation) for conversation in conversations]
        usable = [at for at, item in enumerate(results) if not isinstance(item, RowError)]
        if not usable:
            return results
        encoded = self.tokenizer(
            [results[at][0] for at in usable],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for at, ids, offsets in zip(usable, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            text, spans = results[at]
            tokens = np.array(ids, dtype=np.int64)
            mask = self._mask(text, spans, tokens, np.array(offsets, dtype=np.int64).reshape(-1, 2))
            results[at] = _problem(text, mask) or (tokens, mask)
        return results

    def render(self, conversation: Conversation, *, prompt: bool = False) -> str:
        """The text of a conversation; `prompt` adds the header of an assistant turn to come."""
        return str(
            self.tokenizer.apply_chat_template(
                conversation.messages,
                tools=conversation.tools,
                chat_template=self.template,
                add_generation_prompt=prompt,
                tokenize=False,
                **self.variables,
            )
        )

    def _spans(self, conversation: Conversation) -> tuple[str, list[Span]] | RowError:
        try:
            if self.tagged:
                return self._tagged_spans(conversation)
            text = self.render(conversation)
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split())
            return RowError(f"the chat template refuses the conversation: {type(error).__name__}: {reason}")
        turns = [at for at, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        spans = []
        for turn in turns[-1:] if self.last_turn_only else turns:
            span = self._between_prefixes(text, conversation, turn) or self._by_marker(text, conversation, turn)
            if span is None:
                return RowError(
                    f"the chat template does not show where message {turn} (assistant) is in the text: add "
                    f"{{% generation %}} to the template (task.options.chat_template). The text: {_short(text)}"
                )
            spans.append(span)
        return text, spans

    def _tagged_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, places = render_jinja_template(
            conversations=[conversation.messages],
            tools=conversation.tools,
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=False,
            **{**self.tokenizer.special_tokens_map, **self.variables},
        )
        spans = [Span(begin, end) for begin, end in places[0]]
        return texts[0], spans[-1:] if self.last_turn_only else spans

    def _between_prefixes(self, text: str, conversation: Conversation, turn: int) -> Span | None:
        """From the end of the prompt for a turn to the end of the conversation up to it, where both begin `text`.

        A template that ignores `add_generation_prompt` but writes a header leaves it in between: then the turn begins
        with its content.
        """
        before, upto = (conversation._replace(messages=conversation.messages[:end]) for end in (turn, turn + 1))
        try:
            prompt = self.render(before, prompt=True)
            without = self.render(before)
            end = text if len(upto.messages) == len(conversation.messages) else self.render(upto)
        except Exception:  # templates refuse incomplete conversations in many ways
            return None
        if not (text.startswith(end) and end.startswith(prompt) and len(end) > len(prompt)):
            return None
        begin = len(prompt)
        if prompt == without and (marked := self._by_marker(text, conversation, turn)) is not None:
            begin = marked.begin if text[begin : marked.begin].strip() else begin
        return Span(begin, len(end))

    def _by_marker(self, text: str, conversation: Conversation, turn: int) -> Span | None:
        """What stands where a marker appears that is put in place of the turn's content, and what the template writes
        after a marker that ends the conversation: the end of the turn."""
        messages: list[Message] = list(conversation.messages)
        messages[turn] = {**messages[turn], "content": _MARKER}
        try:
            before, *after = self.render(conversation._replace(messages=messages)).split(_MARKER)
            _, *trailer = self.render(conversation._replace(messages=messages[: turn + 1])).split(_MARKER)
        except Exception:
            return None
        if len(after) != 1 or len(trailer) != 1 or len(before) + len(after[0]) > len(text):
            return None
        if not (text.startswith(before) and text.endswith(after[0]) and after[0].startswith(trailer[0])):
            return None
        return Span(len(before), len(text) - len(after[0]) + len(trailer[0]))

    def _mask(self, text: str, spans: Sequence[Span], tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        special = np.isin(tokens, list(self.special))
        mask = np.zeros(len(tokens), dtype=bool)
        for span in spans:
            inside = np.flatnonzero((offsets[:, 1] > span.begin) & (offsets[:, 0] < span.end))
            if len(inside) == 0:
                continue
            first, last = int(inside[0]), int(inside[-1])
            if not self.tagged:
                last = _without_separator(text, offsets, special, first, last)
            mask[first : last + 1] = True
        return mask


def _without_separator(text: str, offsets: np.ndarray, special: np.ndarray, first: int, last: int) -> int:
    """The last token of a turn: the model stops after the end-of-turn token and never writes the blanks behind it."""
    at = last
    while at > first and not special[at] and not text[offsets[at, 0] : offsets[at, 1]].strip():
        at -= 1
    return at if special[at] else last


def _template(tokenizer: Any, file: Path | None) -> str | None:
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"task.options.chat_template: `{file}` cannot be read: {error}.") from error
    if not tokenizer.chat_template:
        raise DataError(
            "The data are conversations, and the tokenizer has no chat template. Set task.options.chat_template to a "
            "file with one, or data.tokenizer to a tokenizer that has one (that of an instruction-tuned model)."
        )
    template = tokenizer.chat_template
    return str(template) if isinstance(template, str) else None  # several named ones: transformers chooses


def _problem(text: str, mask: np.ndarray) -> RowError | None:
    if mask.all() or not mask.any():
        what = "every token" if len(mask) and mask.all() else "no token"
        return RowError(
            f"the chat template makes {what} the assistant's; nothing could be learned. It gives: {_short(text)}"
        )
    return None


def _short(text: str) -> str:
    shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} [...] {text[-_SHOWN // 2 :]}"
    return repr(shown)
