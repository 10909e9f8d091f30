"""What every source of data yields: an instruction record that belongs to one client's split."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

SPLITS = ("train", "eval", "test")


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    """``system``, ``user``, ``assistant`` or ``tool``."""
    text: str


@dataclass(frozen=True)
class Record:
    """One example of one client, as text."""

    client: int
    """The client's id, in ``0..N-1``."""
    split: str
    """One of `SPLITS`."""
    category: str
    """What the client's data is about (task group, author, topic): for statistics and hold-outs."""
    instruction: str
    input: str
    """May be empty."""
    output: str
    """May be empty: the model then learns to answer with EOS at once."""
    client_name: str = ""
    """What the source itself calls the client; empty: its id."""
    turns: tuple[Turn, ...] = ()
    """A conversation up to its last answer, which is `output`; instruction and input are then
    empty. Empty: instruction and input are the only question."""
    label: str = ""
    """The class to predict, which is also `output`; instruction and input are then the first and
    the second text. Empty: the data has no classes."""
    where: str = field(default="", compare=False)
    """The place where it was read, for messages."""
    moved: bool = False
    """Whether a partition gave it to this client only so that the client has examples enough."""

    def map_texts(self, change: Callable[[str], str]) -> "Record":
        """The record with every text that a model sees changed."""
        return dataclasses.replace(
            self,
            instruction=change(self.instruction),
            input=change(self.input),
            output=change(self.output),
            turns=tuple(Turn(t.role, change(t.text)) for t in self.turns),
            label=change(self.label),
        )

    def without_first_exchange(self) -> "Record | None":
        """The conversation from its second question on; None: it has only one.

        System messages at its beginning stay.
        """
        body = next((i for i, t in enumerate(self.turns) if t.role != "system"), 0)
        for i in range(body + 1, len(self.turns)):
            if self.turns[i].role == "user" and self.turns[i - 1].role != "user":
                return dataclasses.replace(self, turns=self.turns[:body] + self.turns[i:])
        return None
