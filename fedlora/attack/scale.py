r"""Attacks that send a multiple of what was learnt.

    sign     start - λ Δ        against the direction of all others
    scale    start + λ Δ        one client outweighs the round

``of`` says what Δ is: the change of the ``tensors`` that are sent, or of the ``product`` ``s B A``.
The two differ: ``λ`` times the changes of both factors is not ``λ`` times that of the product.
"""

from dataclasses import dataclass

from fedlora.attack.base import Attackers
from fedlora.attack.moves import (
    changes,
    free_factors,
    scaled_products,
    with_changes,
    with_factors,
)
from fedlora.core.checks import at_least, one_of
from fedlora.core.payload import Payload
from fedlora.core.types import LocalPlan

TENSORS, PRODUCT = "tensors", "product"


@dataclass(frozen=True)
class Scale(Attackers):
    """Attackers train as they should and send ``strength`` times the change."""

    strength: float = 10.0
    """``λ``."""
    of: str = TENSORS
    """What is scaled: ``tensors`` or ``product``. Where an update is not two trained factors a
    module, its tensors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("attack.strength", self.strength, 0)
        one_of("attack.of", self.of, (TENSORS, PRODUCT))

    @property
    def factor(self) -> float:
        """What the change is multiplied by."""
        return self.strength

    def returned(self, start: Payload, trained: Payload, plan: LocalPlan) -> Payload:
        before, after = start.low_rank(), free_factors(trained, plan)
        if self.of == PRODUCT and before is not None and after is not None:
            return with_factors(trained, scaled_products(before, after, self.factor))
        moved = {name: self.factor * t for name, t in changes(start, trained).items()}
        return with_changes(start, trained, moved)


@dataclass(frozen=True)
class Sign(Scale):
    """The same the other way."""

    @property
    def factor(self) -> float:
        return -self.strength
