r"""How often vectors are switched.

    ρ(t) = max(0.3^{(t+1) / (ratio T)}, 1e-8)        q(t) = r ρ(t) / interval
    k(t) = ⌊q⌋ + Bernoulli(q - ⌊q⌋)

``interval`` is the expected number of steps between two switches in one slot of one factor at the
start. At step ``ratio T`` switches are 0.3 times as frequent.
"""

import math
import zlib
from dataclasses import dataclass

from fedlora.core.checks import at_least, one_of
from fedlora.core.seeding import generator

CHOICES = ("ring", "random")
"""Ways to choose the next candidate vector."""


@dataclass(frozen=True)
class Switching:
    """How vectors are switched."""

    interval: float = 40.0
    """Expected steps between two switches in one slot of one factor, at the start."""
    ratio: float = 0.1
    """Fraction of the run after which switches are 0.3 times as frequent."""
    freeze: int = 5
    """Steps for which the partner of a switched vector is frozen; its optimizer state is reset in
    any case."""
    choice: str = "ring"
    """The next candidate vector: in their order (``ring``), or a random one that is in no slot
    (``random``)."""
    count_frozen: bool = True
    """Whether a frozen vector's steps count in Adam's bias correction. If they do, its first real
    steps are half as large, a warm-up."""
    total: int = 0
    """Steps of the whole run; the strategy sets it."""
    first: int = 0
    """Steps that are done."""

    def __post_init__(self) -> None:
        at_least("client.technique.interval", self.interval, 0, strict=True)
        at_least("client.technique.ratio", self.ratio, 0, strict=True)
        at_least("client.technique.freeze", self.freeze, 0)
        one_of("client.technique.choice", self.choice, CHOICES)
        if self.interval < 2 * self.freeze:
            raise ValueError(
                f"client.technique.interval={self.interval:g} is less than twice "
                f"client.technique.freeze={self.freeze}: vectors would be switched while they are "
                f"frozen; choose interval >= {2 * self.freeze}"
            )


def decay(step: int, total: float, ratio: float) -> float:
    """``ρ(t)``: the frequency of switches relative to the start, at a step counted from 0."""
    return max(math.pow(0.3, (step + 1) / (ratio * total)), 1e-8)


def expected(switching: Switching, rank: int, step: int, total: float, times: float = 1.0) -> float:
    """``times q(t)``: the mean number of vectors of one factor that are switched in a step."""
    return times * rank * decay(step, total, switching.ratio) / switching.interval


def draw(seed: int, path: str, step: int, mean: float) -> int:
    """``mean``, rounded up or down at random without bias.

    A function of ``(seed, path, step)``: neither order nor resuming changes it.
    """
    whole = math.floor(mean)
    u = generator(seed, "switch", zlib.crc32(path.encode()), step).random()
    return whole + int(u < mean - whole)
