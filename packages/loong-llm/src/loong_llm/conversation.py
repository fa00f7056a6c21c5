"""The three ways conversations are written down (messages, sharegpt, alpaca), read into one list of messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from loong_core.data.rows import RowError

Message = dict[str, Any]

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
}


class Conversation(NamedTuple):
    """Messages as chat templates take them, and the tools the assistant may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def read(kind: str, fields: Mapping[str, Any]) -> Conversation:
    """The conversation of a row of kind `messages`, `conversations` or `instruction`.

    Raises RowError where it is malformed or the assistant says nothing in it.
    """
    if kind == "instruction":
        messages = _alpaca(fields)
    else:
        turns = fields[kind]
        if not isinstance(turns, list) or not turns:
            found = "empty" if turns == [] else f"of type {type(turns).__name__}, not a list"
            raise RowError(f"`{kind}` is {found}")
        one = _message if kind == "messages" else _sharegpt
        messages = [one(turn, f"{kind}[{number}]") for number, turn in enumerate(turns)]
        if fields.get("system") and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": _text(fields, "system", "")})
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
        raise RowError(f"the assistant says nothing; the roles are {roles}")
    return Conversation(messages, _tools(fields.get("tools")))


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise RowError(f"`{where}` is not an object with `role` and `content`")
    content = turn.get("content")
    calls = turn.get("tool_calls")
    if isinstance(content, list):
        content = _parts(content, where)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise RowError(f"`{where}.content` is of type {type(content).__name__}, not a string")
    if turn["role"] == "assistant" and not content.strip() and not calls and not turn.get("reasoning_content"):
        raise RowError(f"`{where}.content` is empty, and the assistant says it")
    return {**{key: value for key, value in turn.items() if value is not None}, "content": content}


def _parts(parts: list[Any], where: str) -> str:
    """The text of a content that is a list of parts; other parts than text cannot be learned here."""
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RowError(f"`{where}.content` holds a part of type {kind!r}; text tasks take only text")
        texts.append(part["text"])
    return "".join(texts)


def _sharegpt(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"`{where}` is not an object with `from` and `value`")
    speaker, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if speaker not in _SPEAKERS:
        raise RowError(f"`{where}.from` is {speaker!r}; allowed: {', '.join(_SPEAKERS)}")
    return _message({"role": _SPEAKERS[speaker], "content": value}, where)


def _alpaca(fields: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    if fields.get("system"):
        messages.append({"role": "system", "content": _text(fields, "system", "")})
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise RowError(f"`history` is of type {type(history).__name__}, not a list of [instruction, output] pairs")
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise RowError(f"`history[{number}]` is not a pair of strings, [instruction, output]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question, extra = _text(fields, "instruction", None), _text(fields, "input", "")
    if "output" not in fields:
        raise RowError(f"`output` is missing; the keys are {', '.join(f'`{key}`' for key in fields)}")
    answer = _text(fields, "output", None)
    if not answer.strip():
        raise RowError("`output` is empty")
    messages.append({"role": "user", "content": f"{question}\n{extra}" if extra else question})
    return [*messages, {"role": "assistant", "content": answer}]


def _text(fields: Mapping[str, Any], key: str, default: str | None) -> str:
    value = fields.get(key)
    value = default if value is None else value
    if not isinstance(value, str):
        raise RowError(f"`{key}` is of type {type(value).__name__}, not a string")
    return value


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """The row's `tools`: a list of JSON schemas, or the JSON text of one."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError(f"`tools` is broken JSON: {error.msg}") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError("`tools` is not a list of objects")
    return [dict(tool) for tool in value]
