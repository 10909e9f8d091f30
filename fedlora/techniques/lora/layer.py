"""One frozen linear layer with a low-rank update.

PEFT's LoRA layers compute the same values and gradients; test_language_model.py compares both. They
are not used here because re-mounting them writes into their private dictionaries, and because they
can hold low-rank factors only.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.core.types import Factors
from fedlora.models.layers import LinearUpdate, dense_weight, dropout


class LowRank(LinearUpdate):
    """``y = W x + (alpha / r) B (A dropout(x))``.

    Dropout is applied if its rate is positive, independent of ``training`` (the base stays in
    evaluation mode). Its mask is a function of ``bits``.
    """

    def __init__(
        self, factors: Factors, p: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.a = nn.Parameter(factors.a.detach().to(device, dtype, copy=True))
        self.b = nn.Parameter(factors.b.detach().to(device, dtype, copy=True))
        self.alpha = factors.alpha
        self.scale = factors.scale
        self.p = p

    def __call__(self, x: Tensor, base: nn.Module) -> Tensor:
        """Any leading shape: ``x [..., d_in]`` to ``[..., d_out]``."""
        y: Tensor = base(x)
        return self.added(y, x).to(y.dtype)

    def added(self, y: Tensor, x: Tensor) -> Tensor:
        """``y + (alpha / r) B (A dropout(x))``, ``[..., d_out]``."""
        # x [..., d_in], its product with A [..., r], with B [..., d_out].
        x = x.to(self.a.dtype)
        if self.p > 0:
            if self.bits is None:
                raise RuntimeError(
                    f"dropout={self.p} without a seed: LanguageModel.seed_dropout before a forward"
                )
            x = dropout(x, self.p, self.bits)
        low = functional.linear(functional.linear(x, self.a), self.b)
        return torch.add(y, low, alpha=self.scale)

    def parameters(self) -> list[nn.Parameter]:
        """A and B."""
        return [self.a, self.b]

    def restrict(self, train_a: bool, train_b: bool) -> None:
        """Train A, B or both."""
        self.a.requires_grad_(train_a)
        self.b.requires_grad_(train_b)

    def weight(self, base: nn.Module) -> Tensor:
        """The effective weight ``W + (alpha / r) B A``, ``[d_out, d_in]``, in the factors' type."""
        return dense_weight(base).to(self.a.dtype) + self.scale * (self.b @ self.a)

    def factors(self) -> Factors:
        """A detached copy of A and B."""
        return Factors(self.a.detach().clone(), self.b.detach().clone(), self.alpha)
