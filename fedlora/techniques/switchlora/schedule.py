r"""How often vectors are exchanged.

    ρ(t) = max(0.3^{(t+1) / (ratio T)}, 1e-8)        q(t) = r ρ(t) / interval
    k(t) = ⌊q⌋ + Bernoulli(q - ⌊q⌋)

``interval`` is the expected number of steps between two exchanges in one slot of one factor at the
start, ``ratio T`` the step at which that has become 0.3 of it.
"""

import math
import zlib
from dataclasses import dataclass

from fedlora.core.checks import at_least, one_of
from fedlora.core.seeding import generator

CHOICES = ("ring", "random")
"""Of the next vector."""


@dataclass(frozen=True)
class Switching:
    """How vectors are exchanged."""

    interval: float = 40.0
    """Expected steps between two exchanges in one slot of one factor, at the start."""
    ratio: float = 0.1
    """Share of the run after which exchanges are 0.3 as frequent."""
    freeze: int = 5
    """Steps for which the partner of an exchanged vector does not move; its optimizer state is
    void in any case."""
    choice: str = "ring"
    """The next vector of the pool: in its order (``ring``), or any that is in no slot
    (``random``)."""
    count_frozen: bool = True
    """Whether a frozen vector's steps count in Adam's bias correction. If so its first real steps
    are half as large, a warm-up."""
    total: int = 0
    """Steps of the whole run; whoever plans the run sets it."""
    first: int = 0
    """How many of them are done."""

    def __post_init__(self) -> None:
        at_least("client.technique.interval", self.interval, 0, strict=True)
        at_least("client.technique.ratio", self.ratio, 0, strict=True)
        at_least("client.technique.freeze", self.freeze, 0)
        one_of("client.technique.choice", self.choice, CHOICES)
        if self.interval < 2 * self.freeze:
            raise ValueError(
                f"client.technique.interval={self.interval:g} is less than twice "
                f"client.technique.freeze={self.freeze}: vectors would be exchanged while they are "
                f"frozen; choose interval >= {2 * self.freeze}"
            )


def decay(step: int, total: float, ratio: float) -> float:
    """``ρ(t)``: how much rarer exchanges have become by a step, counted from 0."""
    return max(math.pow(0.3, (step + 1) / (ratio * total)), 1e-8)


def expected(switching: Switching, rank: int, step: int, total: float, times: float = 1.0) -> float:
    """``times q(t)``: how many vectors of one factor are exchanged in a step, on average."""
    return times * rank * decay(step, total, switching.ratio) / switching.interval


def draw(seed: int, path: str, step: int, mean: float) -> int:
    """``mean``, rounded up or down so that it is right on average.

    A function of ``(seed, path, step)``: neither order nor resuming changes it.
    """
    whole = math.floor(mean)
    u = generator(seed, "switch", zlib.crc32(path.encode()), step).random()
    return whole + int(u < mean - whole)
