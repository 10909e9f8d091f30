r"""A Little Is Enough: attackers stay within the spread of honest changes, all on one side.

    x = μ - z σ        μ, σ of the attackers' own honest changes, element by element
    z = Φ⁻¹((K - f - s) / (K - f)),   s = ⌊K / 2 + 1⌋ - f

With that ``z`` enough honest clients lie further out for a median or Krum to take the attackers'
side. Baruch, Baruch and Goldberg, NeurIPS 2019, arXiv:1902.06156. Changes are those of the tensors
that travel; of clients of unequal rank each element is taken over the attackers that have it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor

from fedlora.attack.base import Attackers, Draw
from fedlora.attack.moves import changes, with_changes
from fedlora.core.checks import at_least
from fedlora.core.payload import Payload
from fedlora.core.types import Update


@dataclass(frozen=True)
class Little(Attackers):
    """Attackers train as they should, and all send one point beside the mean of what they got."""

    z: float = 0.0
    """Standard deviations from the mean; 0: as above, from the clients and attackers of the
    round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("attack.z", self.z, 0)

    def together(
        self,
        own: Mapping[int, Update],
        honest: Mapping[int, Update],
        starts: Mapping[int, Payload],
        draw: Draw,
    ) -> Mapping[int, Update]:
        z = self.z or deviations(len(own) + len(honest), len(own))
        moved = {i: changes(starts[i], u.payload) for i, u in own.items()}
        names = dict.fromkeys(name for m in moved.values() for name in m)
        common = {name: beside([m[name] for m in moved.values() if name in m], z) for name in names}
        found = {}
        for i, update in own.items():
            sent = {n: common[n][_block(t)].reshape(t.shape) for n, t in moved[i].items()}
            found[i] = replace(update, payload=with_changes(starts[i], update.payload, sent))
        return found


def deviations(clients: int, attackers: int) -> float:
    """``z``, not negative: the largest for which honest clients lie further out."""
    honest = clients - attackers
    supporters = math.floor(clients / 2 + 1) - attackers
    if honest <= 0 or not 0 < (honest - supporters) / honest < 1:
        return 0.0
    return max(0.0, NormalDist().inv_cdf((honest - supporters) / honest))


def beside(changes: Sequence[Tensor], z: float) -> Tensor:
    """``μ - z σ`` of each element, over the tensors whose leading block reaches it."""
    shape = [max(sizes) for sizes in zip(*(t.shape for t in changes), strict=True)]
    wide = torch.full((len(changes), *shape), torch.nan, dtype=torch.float64)
    for row, t in zip(wide, changes, strict=True):
        row[_block(t)] = t.double()
    mean = wide.nanmean(dim=0)
    spread = (wide - mean).square().nanmean(dim=0).sqrt()
    return torch.where(mean == 0, mean, mean - z * spread)


def _block(t: Tensor) -> tuple[slice, ...]:
    return tuple(slice(n) for n in t.shape)
