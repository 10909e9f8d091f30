"""Records by a chat template: a tokenizer's own, or a Jinja file. Only answers have a loss.

The template is rendered as transformers renders it, and the whole text is tokenised at once, so the
ids are those of ``tokenizer.apply_chat_template``. Which characters are an assistant's comes from

* the template's own ``{% generation %}`` tags, where it has them: the mask is then the one that
  transformers returns (``return_assistant_tokens_mask``);
* else from prefixes: an answer is what rendering the conversation with it adds to rendering the
  conversation before it with ``add_generation_prompt``; the end of the turn belongs to it.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedlora.core.errors import ConfigError, DataError
from fedlora.data.encode import Encoded, prompt_room
from fedlora.data.records import Record, Turn
from fedlora.data.template import CHAT

_TAGS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_VERSION = 1  # of the rules below: part of the token cache's key
Message = Mapping[str, str]
Span = tuple[int, int]


def chat_template(name: str, tokenizer: Any) -> str:
    """The text of a chat template.

    Args:
        name: ``chat`` for the tokenizer's own, else a file.
        tokenizer: whose template it is.

    Raises:
        ConfigError: if the tokenizer has none.
    """
    if name != CHAT:
        return Path(name).expanduser().read_text(encoding="utf-8")
    own = getattr(tokenizer, "chat_template", None)
    found = own.get("default") if isinstance(own, dict) else own
    if not found:
        raise ConfigError(
            "data.template=chat: the model's tokenizer has no chat template (a base model has "
            "none); use data.template=ours or alpaca, or name a Jinja file"
        )
    return str(found)


@dataclass(frozen=True)
class _Rendered:
    """A conversation as text."""

    text: str
    answers: Sequence[Span]
    """The characters of each assistant turn; the last is the record's output."""
    question_end: int
    """Where the last question ends: there a prompt that is too long is cut."""
    is_open: bool
    """Whether nothing follows the last answer; EOS must then end it."""


@dataclass(frozen=True)
class ChatEncoder:
    """Tokenises records by a chat template."""

    tokenizer: Any
    max_length: int
    truncation: str
    name: str
    """The template's name, for messages."""
    template: str

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token: a response could never end")

    @property
    def version(self) -> str:
        """Hash of the template and of the special tokens that it may use."""
        text = repr((self.template, sorted(self._special.items())))
        return f"chat {_VERSION} {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @cached_property
    def _special(self) -> dict[str, str]:
        named = self.tokenizer.special_tokens_map.items()
        return {k: str(v) for k, v in named if not isinstance(v, list)}

    def encode(self, records: Sequence[Record]) -> list[Encoded]:
        """Tokenise a batch.

        Raises:
            DataError: if the template refuses a record or hides its answer.
        """
        rendered = [self._render_record(record) for record in records]
        found = tokens_with_places(self.tokenizer, [r.text for r in rendered])
        return [
            self._cut(record, chat, ids, places)
            for record, chat, (ids, places) in zip(records, rendered, found, strict=True)
        ]

    def _cut(
        self, record: Record, chat: _Rendered, ids: list[int], places: Sequence[Span]
    ) -> Encoded:
        """The tokens of a rendered record with the flags of its answers, cut to the length."""
        responses = [False] * len(ids)
        for span in chat.answers:
            first, end = token_span(places, span)
            responses[first:end] = [True] * (end - first)
        start, _ = token_span(places, chat.answers[-1])
        if chat.is_open:
            ids, responses = [*ids, self.tokenizer.eos_token_id], [*responses, True]
        limit, cut = self.max_length, len(ids) > self.max_length
        if cut and self.truncation == "input":
            shorter = record.without_first_exchange()
            if shorter is not None:
                return replace(self.encode([shorter])[0], truncated=True)
            room = prompt_room(start, len(ids) - start, limit)
            mark = sum(begin >= chat.question_end for begin, _ in places[:start])
            if room < start:  # the question gives way; what the template writes after it stays
                keep = max(0, room - mark)
                ids = ids[:keep] + ids[start - mark :]
                responses = responses[:keep] + responses[start - mark :]
                start = keep + mark
        return Encoded(ids[:limit], min(start, limit), cut, responses[:limit])

    def _render_record(self, record: Record) -> _Rendered:
        """A record as text, with the places of its answers."""
        from jinja2 import TemplateError

        messages = _messages(record)
        whose = f"client {record.client_name or record.client}"
        fields = {"instruction": record.instruction, "input": record.input}
        try:
            if _TAGS.search(self.template):
                text, answers = self._render(messages, fields | {"output": record.output}, True)
            else:
                text, answers = self._by_prefix(messages, fields, record.output)
        except (DataError, TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"data.template={self.name} refuses a record of {whose} with messages by "
                f"{[m['role'] for m in messages]}: {error}"
            ) from error
        if not answers or not _shows(text[answers[-1][0] :], record.output):
            raise DataError(
                f"data.template={self.name} does not show the answer of a record of {whose}: "
                f"{record.output[:80]!r}"
            )
        start, _ = answers[-1]
        question = next((m["content"].strip() for m in messages[-2::-1]), "")
        at = text.rfind(question, 0, start)
        if at < 0:
            at = start - len(question)
        ends_open = text[start:].strip() == record.output.strip()
        return _Rendered(text, answers, at + len(question), ends_open)

    def _render(
        self, messages: Sequence[Message], fields: Mapping[str, str], answered: bool
    ) -> tuple[str, list[Span]]:
        """Messages as text, with what stands between the template's tags.

        Args:
            messages: of the conversation.
            fields: the record's own texts.
            answered: whether it is whole, or the next answer is asked for.
        """
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template
        texts, spans = render(
            conversations=[list(messages)],
            chat_template=self.template,
            add_generation_prompt=not answered,
            return_assistant_tokens_mask=bool(_TAGS.search(self.template)),
            **self._special,
            **fields,
        )
        return str(texts[0]), [(int(a), int(b)) for a, b in spans[0]] if spans else []

    def _by_prefix(
        self, messages: Sequence[Message], fields: Mapping[str, str], output: str
    ) -> tuple[str, list[Span]]:
        """The whole text, and each answer as what it adds to the text before it."""
        text, _ = self._render(messages, {**fields, "output": output}, True)
        answers = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._render(messages[:i], {**fields, "output": ""}, False)
            last = i == len(messages) - 1
            after = text if last else self._render(messages[: i + 1], fields, True)[0]
            if not text.startswith(before) or not after.startswith(before):
                raise DataError(_UNKNOWN.format(i + 1))
            answers.append((len(before), _end(text, len(before), after, message["content"], i + 1)))
        if any(end > start for (_, end), (start, _) in pairwise(answers)):
            raise DataError(_UNKNOWN.format(1))
        return text, answers


_UNKNOWN = (
    "the template writes message {} differently once more messages follow, so its place is not "
    "known; put {{% generation %}} tags around the answers in a copy of the template"
)


def _end(text: str, start: int, after: str, content: str, number: int) -> int:
    """Where an answer and the end of its turn end in the whole text.

    Usually the text up to the answer is a beginning of the whole text. Templates that leave the
    thoughts of earlier turns out still end a turn in the same way after the same content.
    """
    if text.startswith(after):
        return len(after)
    content = content.strip()
    at, shown = text.find(content, start), after.rfind(content)
    ending = after[shown + len(content) :]
    end = at + len(content)
    if at < 0 or shown < start or not text.startswith(ending, end):
        raise DataError(_UNKNOWN.format(number))
    return end + len(ending)


def _shows(text: str, output: str) -> bool:
    """Whether a text has the end of an answer, which templates may trim or wrap."""
    words = output.split()
    return not words or words[-1] in text


def _messages(record: Record) -> list[Message]:
    """A record as messages; the input of an instruction record follows its instruction."""
    asked = "\n\n".join(t for t in (record.instruction, record.input) if t)
    turns = (*(record.turns or (Turn("user", asked),)), Turn("assistant", record.output))
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def tokens_with_places(tokenizer: Any, texts: list[str]) -> list[tuple[list[int], Sequence[Span]]]:
    """The token ids of each text, and the characters that each of them stands for.

    Raises:
        DataError: if the tokenizer cannot say.
    """
    try:
        found = tokenizer(
            texts, add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )
    except NotImplementedError as error:
        raise DataError(
            "data.template=chat needs a tokenizer with a tokenizer.json: this one cannot say which "
            "characters a token stands for"
        ) from error
    return list(zip(found["input_ids"], found["offset_mapping"], strict=True))


def token_span(places: Sequence[Span], span: Span) -> Span:
    """The tokens that hold some characters, whole: ``first`` and one past the last.

    >>> token_span([(0, 2), (2, 3), (3, 6)], (2, 4))
    (1, 3)
    >>> token_span([(0, 2), (2, 3)], (3, 3))
    (2, 2)
    """
    held = [i for i, (start, end) in enumerate(places) if start < span[1] and end > span[0]]
    return (held[0], held[-1] + 1) if held else (len(places), len(places))
