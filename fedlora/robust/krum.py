r"""Krum: the change that lies closest to its neighbours, or the mean of the closest few.

    score_k = Σ of the K - f - 2 smallest ||x_k - x_j||², j ≠ k
    Krum        the x_k of the smallest score
    Multi-Krum  the mean of the K - f of the smallest scores

Blanchard et al., NeurIPS 2017, arXiv:1703.02757. Distances come from inner products, so that
products stay factored. Krum keeps the noise of one client, and of unequal ranks its result has the
rank of the client that it takes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedlora.robust.geometry import gram, squared_distances
from fedlora.robust.rule import Centre, Term, Weighted, Withstands, combined


@dataclass(frozen=True)
class Krum(Withstands):
    """One client's change, as it was sent."""

    def fewest(self, clients: int) -> int:
        """``2 f + 3``."""
        return 2 * self.f(clients) + 3

    def centre(self, terms: Sequence[Term]) -> Centre:
        best = by_score(terms, self.f(len(terms)))[0]
        return combined(terms, [float(k == best) for k in range(len(terms))])


@dataclass(frozen=True)
class MultiKrum(Weighted, Withstands):
    """The mean of the ``K - f`` changes of the smallest scores."""

    def __post_init__(self) -> None:
        Withstands.__post_init__(self)
        Weighted.__post_init__(self)

    def fewest(self, clients: int) -> int:
        """``2 f + 3``."""
        return 2 * self.f(clients) + 3

    def centre(self, terms: Sequence[Term]) -> Centre:
        f, weights = self.f(len(terms)), self.weights(terms)
        chosen = {*by_score(terms, f)[: len(terms) - f]}
        kept = [w if k in chosen else 0.0 for k, w in enumerate(weights)]
        whole = math.fsum(kept)
        return combined(terms, [w / whole for w in kept])


def by_score(terms: Sequence[Term], f: int) -> list[int]:
    """Indices of the terms from the smallest score to the largest; of equal scores the first."""
    apart = squared_distances(gram([t.summands for t in terms]))
    apart.fill_diagonal_(0)  # each is its own closest, at distance zero
    near = max(1, len(terms) - f - 2)
    scores = apart.sort(dim=1).values[:, 1 : near + 1].sum(dim=1)
    return [int(k) for k in torch.argsort(scores, stable=True)]
