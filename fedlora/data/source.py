"""What a source of federated data is: a frozen description that can yield records.

To add a source, write one file beside this one with a frozen dataclass that inherits `Source`. Its
fields are the schema of its YAML; the store, the statistics and every engine work without an edit.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedlora.core.checks import at_least, one_of
from fedlora.data.records import Record
from fedlora.data.template import INSTRUCTION, Template

TRUNCATIONS = ("input", "right")
_HASHED_BYTES = 64 * 2**20  # up to here a file is identified by its content: at most 0.1 s


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """A source of records, and the maximal length of a tokenised example."""

    name: ClassVar[str]
    """Short name for folders, run names and tables."""
    licence: ClassVar[str] = ""
    """Of the texts, for model cards; empty: not known."""
    template: ClassVar[Template] = INSTRUCTION
    """How its records become sequences of tokens."""

    max_length: int = 512
    """Tokens per example, with BOS and EOS."""
    truncation: str = "input"
    """What gives way in a longer example. ``input``: the end of the record's input, so that the
    response survives. ``right``: the end of the sequence, as in the FlexLoRA code; about a tenth of
    Natural Instructions then keeps no response token."""

    def __post_init__(self) -> None:
        one_of("data.truncation", self.truncation, TRUNCATIONS)
        at_least("data.max_length", self.max_length, 32)

    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of the records: equal text, equal records. Cheap (below a second)."""

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """Every record, in an order that depends on nothing but the fingerprint.

        Raises:
            DataError: naming the value, what is allowed and where it came from.
        """


def file_identity(path: Path) -> str:
    """Identity of a file's content: its hash, or for large files size, time stamp and both ends."""
    status = path.stat()
    with path.open("rb") as file:
        if status.st_size <= _HASHED_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        ends = hashlib.sha256(file.read(2**20))
        file.seek(-(2**20), 2)
        ends.update(file.read())
    return f"{status.st_size}-{status.st_mtime_ns}-{ends.hexdigest()}"
