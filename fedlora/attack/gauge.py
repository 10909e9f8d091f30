r"""Gauge: the same product from other factors.

    (B, A)  →  (c B, A / c)        s B A does not change

The change of the weights is that of an honest client; an average of factors is ruined.
One of 20 clients that trained as all others and rescales by 3, 10 or 30 moves the FedIT average by
a few per cent to more than its whole length; averages of products do not notice
(docs/robustness.md).
"""

from dataclasses import dataclass

from fedlora.attack.base import Attackers
from fedlora.attack.moves import free_factors, with_factors
from fedlora.core.checks import at_least
from fedlora.core.payload import Payload
from fedlora.core.types import Factors, LocalPlan


@dataclass(frozen=True)
class Gauge(Attackers):
    """Attackers train as they should and rescale each pair of factors. Where a factor is frozen, or
    there are none, there is nothing to rescale."""

    strength: float = 10.0
    """``c``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("attack.strength", self.strength, 0, strict=True)

    def returned(self, start: Payload, trained: Payload, plan: LocalPlan) -> Payload:
        factors = free_factors(trained, plan)
        if factors is None:
            return trained
        c = self.strength
        turned = {path: Factors(f.a / c, f.b * c, f.alpha) for path, f in factors.items()}
        return with_factors(trained, turned)
