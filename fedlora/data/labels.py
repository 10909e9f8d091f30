"""Texts with labels: how they become tokens, and how labels become numbers.

A record of one or two texts is laid out as its tokenizer does, without a template: by BERT's as
``[CLS] a [SEP]`` and ``[CLS] a [SEP] b [SEP]``, by RoBERTa's as ``<s> a </s></s> b </s>``, by
GPT-2's as bare tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import DataError
from fedlora.data.encode import CHARACTERS_PER_TOKEN, Encoded, Tokenizer
from fedlora.data.records import Record


class Frame(NamedTuple):
    """The special tokens that a tokenizer sets around texts."""

    before: list[int]
    between: list[int]
    """After the first text, before the second; with one text empty."""
    after: list[int]

    def room(self, max_length: int) -> int:
        """How many tokens are left for the texts."""
        return max_length - len(self.before) - len(self.between) - len(self.after)


@dataclass(frozen=True)
class LabelledEncoder:
    """Tokenises records of one or two texts. `Encoded.prompt_tokens` is where the second begins."""

    tokenizer: Tokenizer
    max_length: int

    @property
    def version(self) -> str:
        """The special tokens belong to it: a tokenizer's settings can change them alone."""
        return f"labelled 1 {tuple(self._single)} {tuple(self._pair)}"

    def encode(self, records: Sequence[Record]) -> list[Encoded]:
        """Tokenise a batch.

        Raises:
            DataError: naming a record without a token of its own.
        """
        limit = CHARACTERS_PER_TOKEN * self.max_length
        first = self._tokens([r.instruction[:limit] for r in records])
        second = self._tokens([r.input[:limit] for r in records])
        found = []
        for record, a, b in zip(records, first, second, strict=True):
            if not a and not b:
                place = record.where or f"client {record.client}, {record.split} split"
                raise DataError(
                    f"{place}: the text {record.instruction + record.input!r:.80} has no token: "
                    "give it a text or leave the record out"
                )
            encoded = self._laid_out(a, b)
            shortened = max(len(record.instruction), len(record.input)) > limit
            truncated = encoded.truncated or shortened
            found.append(Encoded(encoded.ids, encoded.prompt_tokens, truncated))
        return found

    def _laid_out(self, first: list[int], second: list[int]) -> Encoded:
        frame = self._pair if second else self._single
        room = frame.room(self.max_length)
        cut = len(first) + len(second) > room
        if cut:
            a, b = longest_first(len(first), len(second), room)
            first, second = first[:a], second[:b]
        head = [*frame.before, *first, *frame.between]
        ids = [*head, *second, *frame.after]
        return Encoded(ids, len(head) if second else len(ids), cut)

    @cached_property
    def _single(self) -> Frame:
        (text,) = self._tokens(["a"])
        (ids,) = self.tokenizer(["a"], add_special_tokens=True, verbose=False)["input_ids"]
        at = _find(ids, text, 0)
        return Frame(ids[:at], [], ids[at + len(text) :])

    @cached_property
    def _pair(self) -> Frame:
        (text,) = self._tokens(["a"])
        (ids,) = self.tokenizer(["a"], ["a"], add_special_tokens=True, verbose=False)["input_ids"]
        first = _find(ids, text, 0)
        end = first + len(text)
        second = _find(ids, text, end)
        return Frame(ids[:first], ids[end:second], ids[second + len(text) :])

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        found = self.tokenizer(texts, add_special_tokens=False, verbose=False)
        ids: list[list[int]] = found["input_ids"]
        return ids


def _find(ids: Sequence[int], text: Sequence[int], start: int) -> int:
    """Where a text's tokens begin in a sequence with special tokens."""
    n = len(text)
    for i in range(start, len(ids) - n + 1):
        if list(ids[i : i + n]) == list(text):
            return i
    raise DataError("the tokenizer makes other tokens of a text where it adds special ones")


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two texts cut to ``room`` tokens together, as ``truncation="longest_first"`` of
    transformers: the longer one gives way until both are equal, then both do.

    >>> [longest_first(*n, 8) for n in ((9, 2), (2, 9), (9, 9), (5, 0), (9, 0))]
    [(6, 2), (2, 6), (4, 4), (5, 0), (8, 0)]
    """
    if first + second <= room:
        return first, second
    short = min(first, second)
    if 2 * short > room:
        return (room // 2, room - room // 2) if first <= second else (room - room // 2, room // 2)
    return (first, room - first) if first <= second else (room - second, second)


# --- numbers -------------------------------------------------------------------------------------


@dataclass
class LabelDraft:
    """The labels of records that stream by, numbered in order of appearance."""

    numbers: dict[str, int] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    """Those of training examples."""
    first: dict[str, str] = field(default_factory=dict)
    """The place of each label's first record."""
    without: str = ""
    """The place of a record without a label; empty: all have one."""

    def add(self, record: Record) -> int:
        """The number of a record's label; -1: it has none."""
        if not record.label:
            self.without = self.without or record.where or f"a record of client {record.client}"
            return -1
        if record.split == "train":
            self.trained.add(record.label)
        if record.label not in self.numbers:
            where = record.where or f"client {record.client}"
            self.first[record.label] = f"{where}, {record.split} split"
        return self.numbers.setdefault(record.label, len(self.numbers))

    def names(self, source_name: str) -> tuple[list[str], NDArray[np.int64]]:
        """The labels in their order, and the index there of each number here.

        Raises:
            DataError: if a label cannot be learnt, or if there is nothing to tell apart.
        """
        if self.without:
            raise DataError(f"data={source_name}: {self.without} has no label: give it one")
        if unseen := [label for label in self.numbers if label not in self.trained]:
            raise DataError(
                f"data={source_name}: the label {unseen[0]!r} ({self.first[unseen[0]]}) is on no "
                f"training example ({len(unseen)} such labels): give it some, or leave its "
                "examples out"
            )
        names = ordered(self.numbers)
        if len(names) == 1:
            raise DataError(
                f"data={source_name}: all examples have the label {names[0]!r}; a classifier needs "
                "two or more"
            )
        index = {name: i for i, name in enumerate(names)}
        return names, np.array([index[name] for name in self.numbers], dtype=np.int64)


def ordered(labels: Sequence[str] | dict[str, int]) -> list[str]:
    """Labels in an order that depends on nothing but themselves: whole numbers by value, so that
    labels ``0..n-1`` are their own indices, else by name.

    >>> ordered(["10", "9"]), ordered(["10", "9", "b"])
    (['9', '10'], ['10', '9', 'b'])
    """
    if all(label.isascii() and label.removeprefix("-").isdigit() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)
