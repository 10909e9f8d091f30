"""One linear layer whose weight has moved, with a low-rank update."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.core.types import Factors
from fedlora.models.layers import dense_weight
from fedlora.techniques.lora.layer import LowRank


class Rebuilt(LowRank):
    """`LowRank` over ``W' = W + shift`` in the factors' type; the base itself is not changed.

    Args:
        moved: ``W' [d_out, d_in]``, shared by all clients on this base and not changed.
        factors: None: ``W'`` alone.
        p: dropout rate of the factors' input.
    """

    def __init__(self, moved: Tensor, factors: Factors | None, p: float) -> None:
        self.moved = moved
        """``W'``"""
        self.trains = factors is not None
        """Whether there are factors at all."""
        d_out, d_in = moved.shape
        nothing = Factors(torch.zeros(1, d_in), torch.zeros(d_out, 1), 1.0)
        super().__init__(factors or nothing, p, moved.device, moved.dtype)

    def __call__(self, x: Tensor, base: nn.Module) -> Tensor:
        """Any leading shape: ``x [..., d_in]`` to ``[..., d_out]``."""
        bias: Any = base.bias
        moved = functional.linear(
            x.to(self.moved.dtype), self.moved, None if bias is None else bias.to(self.moved.dtype)
        )
        y = self.added(moved, x) if self.trains else moved
        return y.to(x.dtype)

    def parameters(self) -> list[nn.Parameter]:
        """A and B, if there are any."""
        return super().parameters() if self.trains else []

    def weight(self, base: nn.Module) -> Tensor:
        """The effective weight ``W' + (alpha / r) B A``, ``[d_out, d_in]``."""
        return self.moved + self.scale * (self.b @ self.a)

    def change(self, base: nn.Module) -> Tensor:
        """The effective weight minus the base's, ``[d_out, d_in]``, detached."""
        with torch.no_grad():
            return self.weight(base) - dense_weight(base).to(self.moved.dtype)
