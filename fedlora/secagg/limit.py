r"""How large the summands of a private secure sum may be, so that rounding stays within the clip.

Rounding moves each of ``D`` numbers by less than a step, ``2 R / (2^v - 1)`` for numbers in ``±R``.
A client shortens its numbers to a norm of at most ``R``, so that no more are needed:

    R = (1 - 2⁻²⁰) C / (1 + 2 sqrt(D) / (2^v - 1))
    ||decode(e_k)|| < R + 2 R sqrt(D) / (2^v - 1) < C

What a client adds to the decoded sum never exceeds the clip ``C``, whatever it is asked to add.
"""

import math
from dataclasses import dataclass

MARGIN = 1 - 2.0**-20
"""For the rounding of float64 itself."""


@dataclass(frozen=True)
class Limit:
    """What privacy asks of each client's numbers."""

    clip: float
    """``C``: what they may add to the sum at most, as a norm; may be infinite."""
    counts: bool = False
    """Whether the sum also counts the clients whose numbers were not shortened."""

    def radius(self, levels: int, numbers: int) -> float:
        """``R``: the norm to which a client shortens its numbers before they are rounded.

        Args:
            levels: ``v``.
            numbers: ``D``.

        Raises:
            ValueError: if rounding would take more than half of the clip.
        """
        share = 2 * math.sqrt(numbers) / ((1 << levels) - 1)
        if share > 1:
            enough = math.ceil(math.log2(2 * math.sqrt(numbers) + 1))
            raise ValueError(
                f"secagg.levels={levels}: rounding {numbers:,} numbers to 2^{levels} values takes "
                "more than half of the clip that privacy allows each client; use "
                f"secagg.levels={enough} or more"
            )
        return MARGIN * self.clip / (1 + share)
