"""What every source of data yields: an instruction record that belongs to one client's split."""

from dataclasses import dataclass

SPLITS = ("train", "eval", "test")


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
