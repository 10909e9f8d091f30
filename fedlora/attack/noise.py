"""Noise of the size of an honest change: what a bound on norms lets through."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from fedlora.attack.base import Attackers, Draw
from fedlora.attack.moves import changes, length, with_changes
from fedlora.core.checks import at_least
from fedlora.core.payload import Payload
from fedlora.core.types import Update


@dataclass(frozen=True)
class Noise(Attackers):
    """Attackers send Gaussian noise around their start, on the tensors that they trained."""

    strength: float = 1.0
    """The norm of the noise, as a multiple of the median norm of the honest changes of the
    round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("attack.strength", self.strength, 0)

    def together(
        self,
        own: Mapping[int, Update],
        honest: Mapping[int, Update],
        starts: Mapping[int, Payload],
        draw: Draw,
    ) -> Mapping[int, Update]:
        seen = honest or own
        typical = statistics.median(length(changes(starts[i], u.payload)) for i, u in seen.items())
        found = {}
        for i, update in sorted(own.items()):
            moved = changes(starts[i], update.payload)
            drawn = {
                name: torch.from_numpy(draw.standard_normal(tuple(t.shape))) * float(t.any())
                for name, t in moved.items()
            }
            scale = self.strength * typical / (length(drawn) or 1.0)
            noise = {name: scale * t for name, t in drawn.items()}
            found[i] = replace(update, payload=with_changes(starts[i], update.payload, noise))
        return found
