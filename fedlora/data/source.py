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
from fedlora.data.chat import ChatEncoder, chat_template
from fedlora.data.encode import Encoder, RecordEncoder, Tokenizer
from fedlora.data.labels import LabelledEncoder
from fedlora.data.records import Record
from fedlora.data.template import CHAT, TEMPLATES

TRUNCATIONS = ("input", "right")
_HASHED_BYTES = 64 * 2**20  # up to here a file is identified by its content: at most 0.1 s


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """A source of records, and the maximal length of a tokenised example."""

    name: ClassVar[str]
    """Short name for folders, run names and tables."""
    licence: ClassVar[str] = ""
    """Licence of the texts, for model cards; empty: not known."""

    max_length: int = 512
    """Tokens per example, with BOS and EOS."""
    truncation: str = "input"
    """What gives way in a longer example. ``input``: the end of the record's input, so that the
    response survives. ``right``: the end of the sequence, as in the FlexLoRA code; about a tenth of
    Natural Instructions then keeps no response token. Of a conversation that is too long, ``input``
    drops the first exchanges whole."""
    template: str = "ours"
    """How records become sequences: ``ours`` (Task, Input, Answer), ``alpaca``, ``context`` (E2E),
    ``chat`` (the tokenizer's own chat template) or a Jinja file in the form of a chat template,
    which also sees ``instruction``, ``input`` and ``output``."""

    def __post_init__(self) -> None:
        if self.template != CHAT and not Path(self.template).expanduser().is_file():
            known = [*TEMPLATES, CHAT]
            if self.template not in known:
                raise ValueError(
                    f"data.template={self.template!r} is not one of {known}, nor a Jinja file"
                )
        one_of("data.truncation", self.truncation, TRUNCATIONS)
        at_least("data.max_length", self.max_length, 32)
        for field in ("template", "truncation") if self.labelled else ():
            if (value := getattr(self, field)) != getattr(Source, field):
                raise ValueError(
                    f"data.{field}={value!r} has no effect on texts with labels: their tokens are "
                    "laid out as the tokenizer does for one or two texts, the longer text is cut"
                )

    @property
    def labelled(self) -> bool:
        """Whether every record has a `Record.label`: data for classification."""
        return False

    def encoder(self, tokenizer: Tokenizer) -> RecordEncoder:
        """What turns the records into tokens of a model.

        Raises:
            DataError: if the tokenizer lacks what the template needs.
        """
        if self.labelled:
            return LabelledEncoder(tokenizer, self.max_length)
        if self.template in TEMPLATES:
            laid_out = TEMPLATES[self.template]
            return Encoder(tokenizer, self.max_length, self.truncation, laid_out)
        text = chat_template(self.template, tokenizer)
        return ChatEncoder(tokenizer, self.max_length, self.truncation, self.template, text)

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
