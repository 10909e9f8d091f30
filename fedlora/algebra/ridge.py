r"""Moves an averaged B towards the mean of the clients' products, by ridge regression.

    B' = B̄ + ΔB        ΔB = (D / s - B̄ Ā) Āᵀ (Ā Āᵀ + λ I)⁻¹        D = s Σ_k p_k B_k A_k

``ΔB`` is the minimum of ``||D / s - (B̄ + ΔB) Ā||² + λ ||ΔB||²``. The gap to ``D`` is never wider
than that of the plain average, falls with ``λ``, and is ``||D (I - P)||`` at ``λ = 0``, with ``P``
the projection on the rows of ``Ā``: no ``B'`` comes nearer. A rule of this project, with the aim of
LoRA-FAIR, arXiv:2411.14961, and neither its objective nor its name (docs/fidelity.md).
"""

from collections.abc import Sequence

import torch

from fedlora.algebra.linalg import weighted_sum
from fedlora.core.types import Factors


def corrected(mean: Factors, held: Sequence[Factors], p: Sequence[float], ridge: float) -> Factors:
    """The mean with ``B'`` for ``B̄``. No dense matrix is built.

    Args:
        mean: ``(Ā, B̄)``.
        held: the factors that it is the mean of, of one rank.
        p: their weights, of sum 1.
        ridge: ``λ`` as a multiple of ``tr(Ā Āᵀ) / r``.
    """
    a, b = mean.a.double(), mean.b.double()
    # D / s - B̄ Ā = Σ p_k (B_k - B̄)(A_k - Ā): exactly zero if there is but one client.
    missing = weighted_sum(
        [(f.b.double() - b) @ ((f.a.double() - a) @ a.T) for f in held], p
    )  # [d_out, r]
    gram = a @ a.T
    damped = gram + ridge * gram.trace() / mean.rank * torch.eye(mean.rank, dtype=gram.dtype)
    change = missing @ torch.linalg.pinv(damped, hermitian=True)
    return Factors(mean.a, (b + change).to(mean.b.dtype), mean.alpha)
