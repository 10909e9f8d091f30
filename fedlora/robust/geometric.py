r"""RFA: the geometric median of clients' changes by smoothed Weiszfeld steps.

    v ← Σ_k β_k x_k / Σ_k β_k,     β_k = w_k / max(ν, ||v - x_k||),     from the weighted mean

Pillutla, Kakade and Harchaoui, arXiv:1912.13445. With ``v = Σ_k c_k x_k`` every distance follows
from the inner products ``G``: ``||v - x_k||² = cᵀ G c - 2 (G c)_k + G_kk``. No step builds ``v``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedlora.core.checks import at_least
from fedlora.robust.geometry import gram
from fedlora.robust.rule import Centre, Term, Weighted, combined


@dataclass(frozen=True)
class Geometric(Weighted):
    """The point of the smallest sum of distances to all changes, nearly."""

    steps: int = 8
    """Weiszfeld steps."""
    smoothing: float = 1e-6
    """``ν``: the smallest distance that is told from zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("robust.steps", self.steps, 1)
        at_least("robust.smoothing", self.smoothing, 0, strict=True)

    def centre(self, terms: Sequence[Term]) -> Centre:
        inner = gram([t.summands for t in terms])  # [K, K]
        weights = torch.tensor(self.weights(terms), dtype=torch.float64)
        c = weights / weights.sum()
        for _ in range(self.steps):
            along = inner @ c
            squared = c @ along - 2 * along + inner.diagonal()
            beta = weights / squared.clamp(min=0).sqrt().clamp(min=self.smoothing)
            c = beta / beta.sum()
        return combined(terms, c.tolist())
