"""What a client on a machine of its own is told of what it keeps there."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CompressedStart:
    """A start as its change from what the client was sent last (`fedlora.server.compressed`)."""

    data: NDArray[np.uint8]
    """As `fedlora.wire.tensors.Format.encode` wrote it."""
    seeded: tuple[str, ...]
    """Names of the tensors whose reference is drawn from the run's seed."""
    digest: str
    """`fedlora.wire.recall.digest` of the start that the client was sent last, and must still have.
    """


@dataclass(frozen=True)
class Recall:
    """Which of its memories a client takes up (`fedlora.wire.recall`)."""

    since: int
    """Round of its last reply that was accepted; 0: nothing that it keeps counts."""
    feedback: bool
    """Whether it keeps what rounding withholds of its replies."""
    start: CompressedStart | None = None
    """None: its start travels as values."""
