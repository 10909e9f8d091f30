"""The training loss of a split: cross-entropy over supervised tokens, labels smoothed on request.

loss = Σ_t (1 - e) nll_t + e mean_v(-log p_v)         (as ``torch.nn.CrossEntropyLoss``)
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Loss:
    """The loss of one client's step, summed over its tokens."""

    total: Tensor
    """The objective, a differentiable scalar."""
    nll: Tensor
    """The loss without smoothing, which is reported; a detached scalar."""


def sum_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Loss:
    """Sum the loss over tokens.

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
