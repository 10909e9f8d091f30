"""Records to tokens by a template, cut to a length."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fedlora.core.errors import ConfigError, DataError
from fedlora.data.records import Record, Turn
from fedlora.data.template import INSTRUCTION, Template

CHARACTERS_PER_TOKEN = 16
"""No text is read further than so many characters per token of `max_length`: the longest inputs of
Natural Instructions have 300,000 characters, of which a model sees two thousand."""


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __len__(self) -> int: ...
    def __call__(
        self,
        text: list[str],
        text_pair: list[str] | None = ...,
        *,
        add_special_tokens: bool = ...,
        verbose: bool = ...,
    ) -> Any:
        """``{"input_ids": [[...], ...]}``; not verbose, as long texts are cut here anyway."""


@dataclass(frozen=True)
class Encoded:
    """One tokenised record."""

    ids: list[int]
    prompt_tokens: int
    """Token ids before the last answer, with BOS and mark; of texts with a label, those before the
    second text."""
    truncated: bool
    responses: list[bool] | None = None
    """Which tokens belong to answers, one flag per id; None: those from `prompt_tokens` on."""


class RecordEncoder(Protocol):
    """Turns records into tokens by one template."""

    @property
    def version(self) -> int | str:
        """Equal versions make equal tokens: part of the token cache's key."""

    def encode(self, records: Sequence[Record]) -> list[Encoded]:
        """Tokenise a batch."""


@dataclass(frozen=True)
class Encoder:
    """Tokenises records. Prompt and response are tokenised apart, so their border is exact."""

    tokenizer: Tokenizer
    max_length: int
    truncation: str
    """``input`` or ``right``: see `fedlora.data.source.Source`."""
    template: Template = INSTRUCTION

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token: a response could never end")
        mark = len(self._mark())
        if mark + 2 > self.max_length // 2:
            raise ConfigError(
                f"data.max_length={self.max_length} must be >= {2 * (mark + 2)}: the prompt's "
                f"last line alone has {mark} tokens"
            )

    @property
    def version(self) -> int | str:
        """That of the template."""
        return self.template.version

    def encode(self, records: Sequence[Record]) -> list[Encoded]:
        """Tokenise a batch."""
        single = iter(self._encode_single([r for r in records if not r.turns]))
        return [self._encode_turns(r) if r.turns else next(single) for r in records]

    def _encode_turns(self, record: Record) -> Encoded:
        """A conversation: its exchanges one after another, each laid out like a record."""
        parts, shortened = self._exchanges(exchanges(record)), False
        while self.truncation == "input" and sum(len(p.ids) for p in parts) > self.max_length:
            shorter = record.without_first_exchange()
            if shorter is None:
                break
            record, shortened = shorter, True
            parts = self._exchanges(exchanges(record))
        ids = [i for part in parts for i in part.ids]
        responses = [n >= part.prompt_tokens for part in parts for n in range(len(part.ids))]
        cut = len(ids) > self.max_length
        prompt = min(len(ids) - len(parts[-1].ids) + parts[-1].prompt_tokens, self.max_length)
        truncated = shortened or cut or any(part.truncated for part in parts)
        return Encoded(ids[: self.max_length], prompt, truncated, responses[: self.max_length])

    def _exchanges(self, records: Sequence[Record]) -> list[Encoded]:
        """Exchanges of one conversation; only the first begins with BOS."""
        begin = len(self._begin())
        return [
            part
            if i == 0
            else Encoded(part.ids[begin:], part.prompt_tokens - begin, part.truncated)
            for i, part in enumerate(self._encode_single(records))
        ]

    def _encode_single(self, records: Sequence[Record]) -> list[Encoded]:
        """Tokenise records of one question each."""
        if not records:
            return []
        limit = CHARACTERS_PER_TOKEN * self.max_length
        texts = [(r.instruction[:limit], r.input[:limit], r.output[:limit]) for r in records]
        shortened = [
            any(len(text) > limit for text in (r.instruction, r.input, r.output)) for r in records
        ]
        prompts = self._prompts(texts)
        responses = self._tokens([y and self.template.lead + y for _, _, y in texts])
        for record, response in zip(records, responses, strict=True):
            if len(record.output) <= limit:  # the model must not learn to stop where we cut
                response += self._end()
        long = [
            i
            for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
            if len(p) + len(r) > self.max_length
        ]
        if long and self.truncation == "input":
            mark = self._mark()
            for i, head in zip(long, self._heads(prompts, mark, long, texts), strict=True):
                room = prompt_room(len(prompts[i]), len(responses[i]), self.max_length)
                if room < len(prompts[i]):
                    prompts[i] = head[: room - len(mark)] + mark
        cut = set(long)
        return [
            Encoded(
                (p + r)[: self.max_length], min(len(p), self.max_length), i in cut or shortened[i]
            )
            for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
        ]

    def _prompts(self, texts: Sequence[tuple[str, str, str]]) -> list[list[int]]:
        mark = self.template.mark
        found = self._tokens([self.template.question(i, x) + mark for i, x, _ in texts])
        end = [] if mark else self._end()
        return [self._begin() + ids + end for ids in found]

    def _mark(self) -> list[int]:
        """What ends every prompt, as tokens."""
        return self._tokens([self.template.mark])[0] if self.template.mark else self._end()

    def _heads(
        self,
        prompts: Sequence[list[int]],
        mark: list[int],
        which: Sequence[int],
        texts: Sequence[tuple[str, str, str]],
    ) -> list[list[int]]:
        """Some prompts without their last lines.

        Usually these end in the tokens of the last lines alone; only where the tokenizer merges
        across that border is the text tokenised again.
        """
        heads = {i: prompts[i][: -len(mark)] for i in which if prompts[i][-len(mark) :] == mark}
        merged = [i for i in which if i not in heads]
        if merged:
            again = self._tokens([self.template.question(*texts[i][:2]) for i in merged])
            for i, ids in zip(merged, again, strict=True):
                heads[i] = self._begin() + ids
        return [heads[i] for i in which]

    def _begin(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [bos] if self.template.bos and bos is not None else []

    def _end(self) -> list[int]:
        return [int(self.tokenizer.eos_token_id or 0)]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        found = self.tokenizer(texts, add_special_tokens=False, verbose=False)
        ids: list[list[int]] = found["input_ids"]
        return ids


def prompt_room(prompt: int, response: int, max_length: int) -> int:
    """How many tokens a prompt keeps so that the response survives.

    The prompt gives way first, but keeps half of `max_length` against a response that is longer
    than the other half; then the response is cut too.
    """
    return min(prompt, max(max_length - response, max_length // 2))


def exchanges(record: Record) -> list[Record]:
    """A conversation as question and answer pairs; system messages go before the next question.

    Raises:
        DataError: for a message of a tool, which has no place in such a pair.
    """
    found: list[Record] = []
    asked: list[str] = []
    for role, text in (*record.turns, Turn("assistant", record.output)):
        if role == "tool":
            raise DataError(
                "a conversation has a message of a tool, for which this template has no place: use "
                "data.template=chat or a Jinja file"
            )
        if role == "assistant":
            question = "\n\n".join(asked)
            asked = []
            found.append(replace(record, instruction=question, output=text, turns=()))
        else:
            asked.append(text)
    return found
