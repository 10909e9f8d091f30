"""A frozen linear layer with room for one update, and the updates that fit there.

A base model is wrapped once; mounting another client's update is an assignment. The engine of
another method may put its own ``nn.Module`` of signature ``(x, base) -> y`` there.

PEFT's LoRA layers compute the same (tests/fedlora/models/test_layers.py holds the two together, in
values and gradients). They are not used here because re-mounting them writes into their private
dictionaries, and because nothing but low-rank factors fits into them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.types import Factors


def stored_transposed(base: nn.Module) -> bool:
    """Whether the layer stores ``[d_in, d_out]``, as GPT-2's ``Conv1D`` does."""
    return not isinstance(base, nn.Linear)


def dense_weight(base: nn.Module) -> Tensor:
    """The layer's own weight as ``[d_out, d_in]``: a view, not a copy.

    Raises:
        TypeError: if the layer stores quantised weights.
    """
    weight = base.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        raise TypeError(f"{type(base).__name__} stores {weight.dtype} weights: no dense view")
    return weight.t() if stored_transposed(base) else weight


class LowRank(nn.Module):
    """``y = W x + (alpha / r) B (A dropout(x))``.

    Dropout acts whenever its rate is positive, whatever ``training`` says (the base stays in
    evaluation mode), and draws from torch's current generator.
    """

    def __init__(self, factors: Factors, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Parameter(factors.a.detach().to(dtype, copy=True))
        self.b = nn.Parameter(factors.b.detach().to(dtype, copy=True))
        self.alpha = factors.alpha
        self.scale = factors.scale
        self.dropout = dropout

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Any leading shape: ``x [..., d_in]`` to ``[..., d_out]``."""
        y: Tensor = base(x)
        x = x.to(self.a.dtype)
        if self.dropout > 0:
            x = functional.dropout(x, self.dropout)
        low = functional.linear(functional.linear(x, self.a), self.b)
        return torch.add(y, low, alpha=self.scale).to(y.dtype)

    def weight(self, base: nn.Module) -> Tensor:
        """The effective weight ``W + (alpha / r) B A``, ``[d_out, d_in]``, in the factors' type."""
        return dense_weight(base).to(self.a.dtype) + self.scale * (self.b @ self.a)

    def factors(self) -> Factors:
        """A detached copy of what is trained."""
        return Factors(self.a.detach().clone(), self.b.detach().clone(), self.alpha)


class SparseValues(nn.Module):
    """``y = W' x`` with ``W' = W + values`` at the mask and ``W' = W``, bit for bit, elsewhere."""

    def __init__(self, values: Tensor, index: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.values = nn.Parameter(values.detach().to(dtype, copy=True))
        self.index = index
        """Of the mask's coordinates (row-major over ``[d_out, d_in]``) in the stored weight."""

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Any leading shape: ``x [..., d_in]`` to ``[..., d_out]``."""
        bias: Any = base.bias
        return functional.linear(x, self.weight(base), bias)

    def weight(self, base: nn.Module) -> Tensor:
        """The effective weight, ``[d_out, d_in]``, in the base's type."""
        stored = dense_weight(base).t() if stored_transposed(base) else dense_weight(base)
        flat = stored.reshape(-1)
        moved = (flat[self.index].to(self.values.dtype) + self.values).to(flat.dtype)
        weight = flat.index_put((self.index,), moved).view(stored.shape)
        return weight.t() if stored_transposed(base) else weight


def mask_index(mask: Tensor, base: nn.Module) -> Tensor:
    """Where the true coordinates of ``mask [d_out, d_in]``, in row-major order, are stored."""
    rows, columns = mask.nonzero(as_tuple=True)
    d_out, d_in = mask.shape
    return columns * d_out + rows if stored_transposed(base) else rows * d_in + columns


class AdaptedLinear(nn.Module):
    """One linear layer of the frozen base with a place for one update."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.update: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Any leading shape: ``x [..., d_in]`` to ``[..., d_out]``."""
        y: Tensor = self.base(x) if self.update is None else self.update(x, self.base)
        return y

    @property
    def weight(self) -> Tensor:
        """The base's own stored weight, for model code that asks for its type or device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, if it has one."""
        bias: Any = self.base.bias
        return bias if isinstance(bias, Tensor) else None
