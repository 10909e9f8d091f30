"""Conversations as data sets write them: chat `messages` and ShareGPT's `conversations`.

{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.core.errors import DataError
from fedlora.data.records import Turn
from fedlora.data.values import missing, text

FIELDS = ("messages", "conversations", "conversation")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""What data sets call a speaker -> the role of chat templates."""


def conversation(value: Any, system: str, where: str) -> tuple[tuple[Turn, ...], str]:
    """The turns before the last answer, and that answer; what follows it is left out.

    Args:
        value: a list of messages, or its JSON text (as a cell of a table holds it).
        system: a system message that the record keeps in a field of its own; empty: none.
        where: of the record.

    Raises:
        DataError: if it is no such list or has no answer of the assistant.
    """
    turns = [_turn(m, f"{where}, message {i}") for i, m in enumerate(_messages(value, where), 1)]
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise DataError(
            f"{where}: no answer of the assistant in its {len(turns)} messages: leave it out"
        )
    start = [Turn("system", system)] if system else []
    return (*start, *turns[: answers[-1]]), turns[answers[-1]].text


def _messages(value: Any, where: str) -> Sequence[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(
                f"{where}: the conversation is a text that is not JSON: {error}"
            ) from error
    if isinstance(value, Mapping):  # a list per key, as older versions of `datasets` keep them
        columns = [v if isinstance(v, list) else [] for v in value.values()]
        value = [dict(zip(value, entries, strict=True)) for entries in zip(*columns, strict=False)]
    if not isinstance(value, list | tuple):
        raise DataError(
            f"{where}: a conversation must be a list of messages, not {type(value).__name__}"
        )
    return value


def _turn(message: Any, where: str) -> Turn:
    """One message, in either form."""
    if not isinstance(message, Mapping):
        raise DataError(f"{where} must be an object, not {type(message).__name__}")
    for speaker, content in (("role", "content"), ("from", "value")):
        if missing(message.get(speaker)):
            continue
        role = ROLES.get(str(message[speaker]).strip().lower())
        if role is None:
            raise DataError(f"{where}: {speaker}={message[speaker]!r} is not one of {list(ROLES)}")
        return Turn(role, _content(message.get(content), content, where))
    raise DataError(
        f"{where} names no speaker: needed are 'role' and 'content', or 'from' and 'value'; found "
        f"{sorted(message)}"
    )


def _content(value: Any, name: str, where: str) -> str:
    """A message's text; that of several parts end to end."""
    if missing(value):
        raise DataError(f"{where}: {name!r} is missing (calls of tools have no text to learn)")
    if not isinstance(value, list):
        return text(value, name, where)
    for part in value:
        if not isinstance(part, Mapping) or missing(part.get("text")):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"{where}: a part of {name!r} is no text but {kind!r}")
    return "".join(text(part["text"], name, where) for part in value)
