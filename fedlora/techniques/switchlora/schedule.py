r"""How often vectors are exchanged.

    ρ(t) = max(0.3^{(t+1) / (ratio T)}, 1e-8)        q(t) = r ρ(t) / interval
    k(t) = ⌊q⌋ + Bernoulli(q - ⌊q⌋)

``interval`` is the expected number of steps between two exchanges in one slot of one factor at the
start, ``ratio T`` the step at which that has become 0.3 of it.
"""

import math
import zlib

from fedlora.core.seeding import generator
from fedlora.core.types import Switching


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
