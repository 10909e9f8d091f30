"""The one reader of records: which fields a row must have, and what their values mean.

Sources differ in where rows come from and in what their fields are called. What counts as missing,
as a text or as the same client is decided here for all of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedlora.core.errors import DataError
from fedlora.data import conversations
from fedlora.data.records import Turn
from fedlora.data.values import identity, missing, split_name, text

_HINT = (
    " (a record has an instruction and an output, under the names of data.instruction_field and "
    f"data.output_field, or a conversation in one of {list(conversations.FIELDS)})"
)


_LABEL_HINT = (
    " (a record has a text and a label, under the names of data.text_field and data.label_field)"
)


class Row(NamedTuple):
    """A record as it lies in a file or table."""

    values: Any
    """A mapping of fields, unless the file is malformed."""
    where: str
    """The place, for messages."""
    client: str = ""
    """Whose it is by the file's name; empty: the name does not say."""
    split: str = ""
    """Likewise the split."""


@dataclass(frozen=True)
class Entry:
    """What a row says, checked, as text."""

    instruction: str
    """Or the text, of a record with a label."""
    input: str
    """Or the second text."""
    output: str
    """Or the label, in its one spelling."""
    turns: tuple[Turn, ...]
    """Messages of a conversation; instruction and input are then empty."""
    category: str
    group: str
    """The client's id or the label by which records are divided, in its one spelling; empty: none
    was asked for."""
    split: str
    """Empty: the row does not say."""
    where: str


@dataclass(frozen=True)
class Fields:
    """What the fields of a row are called."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    category: str = "category"
    split: str = ""
    """Empty: rows do not name their split."""
    group: str = ""
    """The client's id or the label by which records are divided: every row must have one. Empty:
    not read."""
    labelled: bool = False
    """Whether rows are texts with a label: instruction and input name the texts, output the
    label."""

    def read(self, row: Row) -> Entry:
        """The row as text. Input and category may be missing, nothing else that is named.

        Raises:
            DataError: naming the place, the field and its value.
        """
        values, where = mapping(row), row.where
        instruction, input, output, turns = self._texts(values, where)
        category = values.get(self.category)
        return Entry(
            instruction,
            input,
            output,
            turns,
            "" if missing(category) else identity(category, self.category, where),
            _group(values, self.group, where) if self.group else "",
            split_name(required(values, self.split, where), self.split, where)
            if self.split
            else row.split,
            where,
        )

    def _texts(
        self, values: Mapping[str, Any], where: str
    ) -> tuple[str, str, str, tuple[Turn, ...]]:
        """Instruction, input, output and turns."""
        if self.labelled:
            first = text(
                required(values, self.instruction, where, _LABEL_HINT), self.instruction, where
            )
            second = values.get(self.input)
            label = _group(values, self.output, where, _LABEL_HINT)
            return first, "" if missing(second) else text(second, self.input, where), label, ()
        for name in conversations.FIELDS:
            if missing(values.get(self.output)) and not missing(values.get(name)):
                system = values.get("system")
                start = "" if missing(system) else text(system, "system", where)
                turns, output = conversations.conversation(values[name], start, where)
                return "", "", output, turns
        instruction, output = (
            text(required(values, name, where, _HINT), name, where)
            for name in (self.instruction, self.output)
        )
        input = values.get(self.input)
        return instruction, "" if missing(input) else text(input, self.input, where), output, ()


def mapping(row: Row) -> Mapping[str, Any]:
    """The fields of a row.

    Raises:
        DataError: if it is something else.
    """
    if not isinstance(row.values, Mapping):
        raise DataError(f"{row.where} must be an object, not {type(row.values).__name__}")
    return row.values


def required(values: Mapping[str, Any], name: str, where: str, hint: str = "") -> Any:
    """The value of a field that must be there.

    Args:
        values: the fields of a row.
        name: the field.
        where: the row's place.
        hint: what to do if the field is absent, for the message.

    Raises:
        DataError: that says whether the field is absent or has no value.
    """
    if name not in values:
        raise DataError(f"{where} has no field {name!r}; found {sorted(map(str, values))}{hint}")
    if missing(values[name]):
        raise DataError(
            f"{where}: the value of {name!r} is missing ({values[name]!r}): give it one or leave "
            "the record out"
        )
    return values[name]


def _group(values: Mapping[str, Any], name: str, where: str, hint: str = "") -> str:
    found = identity(required(values, name, where, hint), name, where)
    if not found:
        raise DataError(f"{where}: the value of {name!r} is empty: give it one")
    return found


def require(columns: Iterable[str], wanted: Iterable[str], where: str) -> None:
    """Refuse a table that lacks a column."""
    found, needed = sorted(columns), list(wanted)
    if lacking := [c for c in needed if c not in found]:
        raise DataError(f"{where} has no {lacking}; found {found}, needed {needed}")
