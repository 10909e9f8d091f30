"""The clip of a client's change: one norm over all modules together.

    x ← x min(1, (1 - 2⁻²⁰) C / ||x||₂)

The small factor keeps what is stored within ``C`` when its entries are rounded. A clip of each
module by itself would let one client move the sum by ``sqrt(modules) C``.
"""

from fedlora.algebra.summand import Summands, norm, scaled

MARGIN = 1 - 2.0**-20


def clipped(summands: Summands, clip: float) -> tuple[Summands, float]:
    """The change at a norm of at most ``clip``, and its norm before, both in float64.

    Products stay factored. A change within the bound is returned as it is.

    Args:
        summands: of one client.
        clip: ``C`` > 0; may be infinite.
    """
    length = norm(summands)
    if length <= clip:
        return summands, length
    found, left = scaled(summands, MARGIN * clip / length), length
    while (left := norm(found)) > clip:  # the rounded factors of a product that cancels
        found = scaled(found, MARGIN * clip / left)
    return found, length
