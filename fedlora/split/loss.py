"""The training loss of a split: cross-entropy over supervised tokens, labels smoothed on request.

loss = Σ_t (1 - e) nll_t + e mean_v(-log p_v)         (as ``torch.nn.CrossEntropyLoss``)
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Loss:
    """Of one client's step, summed over its tokens."""

    total: Tensor
    """What is minimised; differentiable."""
    nll: Tensor
    """Without smoothing: what is reported. Detached."""


def sum_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Loss:
    """The loss of some tokens.

    Args:
        logits: ``[n, vocabulary]``.
        targets: ``[n]`` int64.
        smoothing: ``e``, in ``[0, 1)``.
    """
    nll = functional.cross_entropy(logits, targets, reduction="sum")
    if not smoothing:
        return Loss(nll, nll.detach())
    total = functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    return Loss(total, nll.detach())
