"""Rank self-pruning on the client: the tail of the ranks, its penalty, and when it is removed.

    tail(r) = {keep(r), ..., r - 1}        keep(r) = max(1, min(r - 1, floor(gamma r)))
    score   = Σ_modules ||B[:, tail]||_F ||A[tail, :]||_F

The local loss gains ``weight * score``. If the score is smaller after training than it was on
arrival, every module's rank becomes ``max(min_rank, keep(r))`` before the update is sent. From
Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
arXiv:2401.06432, section 4; what the paper leaves open is settled in docs/fidelity.md.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.core.checks import at_least, fraction
from fedlora.core.types import (
    Adapter,
    Client,
    Factors,
    Ranks,
)


@dataclass(frozen=True)
class SelfPrune:
    """HeteroLoRA's local regulariser and rank pruning (Cho et al., section 4).

    The loss gains ``weight * Σ_modules ||B[:, keep:]||_F ||A[keep:, :]||_F`` with
    ``keep = max(1, min(r - 1, floor(gamma r)))``; if the sum is smaller after training than on
    arrival, the client's ranks shrink to ``max(min_rank, keep)`` and the tail is not sent.
    """

    weight: float
    gamma: float
    min_rank: int

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        fraction("gamma", self.gamma)
        at_least("min_rank", self.min_rank, 1)


def keep(rank: int, gamma: float) -> int:
    """The number of leading rank indices before the tail:
    ``max(1, min(rank - 1, floor(gamma rank)))``.

    The tail holds at least one index whenever ``rank >= 2``; rank 1 has no tail. A product such as
    ``0.29 * 100`` counts as the whole number it means, not as the float just below.
    """
    return max(1, min(rank - 1, math.floor(gamma * rank + 1e-9)))


def shrunk_rank(rank: int, prune: SelfPrune) -> int:
    """The rank after pruning: ``max(min_rank, keep(rank))``, never more than ``rank``."""
    return min(rank, max(prune.min_rank, keep(rank, prune.gamma)))


def tail_product(a: Tensor, b: Tensor, keep: int) -> Tensor:
    """``||B[:, keep:]||_F ||A[keep:, :]||_F``, a scalar; zero for an empty tail.

    Differentiable. The gradient is finite where a factor's tail is zero (there the norm's
    subgradient 0 is taken), which is where every run starts, with ``B = 0``.
    """
    product: Tensor = torch.linalg.vector_norm(b[:, keep:]) * torch.linalg.vector_norm(a[keep:, :])
    return product


def penalty(pairs: Iterable[Sequence[Tensor]], prune: SelfPrune) -> Tensor:
    """The score, summed over the ``(A [r, d_in], B [d_out, r])`` of a client's modules.

    Without the factor ``prune.weight``: the training loss is ``loss + prune.weight * penalty``.
    """
    terms = [tail_product(a, b, keep(a.shape[0], prune.gamma)) for a, b in pairs]
    return torch.stack(terms).sum()


def score(adapter: Adapter, prune: SelfPrune) -> float:
    """The penalty of an adapter, a float, to compare its values on arrival and after training."""
    with torch.no_grad():
        return float(penalty(((f.a, f.b) for f in adapter.values()), prune))


def should_prune(on_arrival: float, after: float) -> bool:
    """Whether training made the tail smaller. Never in the first round, when ``B = 0`` arrives."""
    return after < on_arrival


def prune_adapter(adapter: Adapter, prune: SelfPrune) -> Adapter:
    """The adapter without its tail, with the effect of the remaining ranks unchanged.

    The scale ``alpha / r`` grows when ``r`` shrinks to ``r'``, so both factors are multiplied by
    ``sqrt(r' / r)``: ``(alpha / r') B' A' = (alpha / r) B[:, :r'] A[:r', :]``.
    """
    return {path: _head(f, shrunk_rank(f.rank, prune)) for path, f in adapter.items()}


def _head(f: Factors, rank: int) -> Factors:
    c = math.sqrt(rank / f.rank)
    return Factors(a=c * f.a[:rank], b=c * f.b[:, :rank], alpha=f.alpha)


def prune_client(
    client: Client, start: Adapter, trained: Adapter, prune: SelfPrune
) -> tuple[Client, Adapter]:
    """Remove the tail of a client's ranks if training made it smaller.

    Returns:
        The client with its ranks afterwards, and the adapter that it sends.
    """
    if not should_prune(score(start, prune), score(trained, prune)):
        return client, trained
    kept = prune_adapter(trained, prune)
    return replace(client, ranks=Ranks({path: f.rank for path, f in kept.items()})), kept
