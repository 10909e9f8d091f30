"""The smoothed loss is PyTorch's; what is reported is not smoothed."""

import pytest
import torch
from torch.nn import functional

from fedlora.split.loss import sum_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_loss_is_that_of_its_definition(smoothing: float) -> None:
    """``Σ_t (1 - e) nll_t + e mean_v(-log p_v)``."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=g, dtype=torch.float64)
    targets = torch.randint(0, 7, (5,), generator=g)
    loss = sum_loss(logits, targets, smoothing)
    log_p = logits.log_softmax(dim=1)
    nll = -log_p.gather(1, targets[:, None]).sum()
    want = (1 - smoothing) * nll - smoothing * log_p.mean(dim=1).sum()
    torch.testing.assert_close(loss.total, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(loss.nll, nll, rtol=1e-13, atol=1e-13)
    theirs = functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(loss.total, theirs, rtol=1e-13, atol=1e-13)
