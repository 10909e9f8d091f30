"""One frozen linear layer with a dense update of chosen coordinates of its weight."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.models.layers import LinearUpdate, dense_weight, stored_transposed


class SparseValues(LinearUpdate):
    """``y = W' x`` with ``W' = W + values`` at the mask; elsewhere ``W'`` is bitwise identical to
    ``W``."""

    def __init__(self, values: Tensor, index: Tensor, dtype: torch.dtype) -> None:
        self.values = nn.Parameter(values.detach().to(index.device, dtype, copy=True))
        self.index = index
        """``[nnz]`` int64: positions of the mask's coordinates (row-major over ``[d_out, d_in]``)
        in the flat stored weight."""

    def __call__(self, x: Tensor, base: nn.Module) -> Tensor:
        """Any leading shape: ``x [..., d_in]`` to ``[..., d_out]``."""
        bias: Any = base.bias
        return functional.linear(x, self.weight(base), bias)

    def parameters(self) -> list[nn.Parameter]:
        """The values."""
        return [self.values]

    def weight(self, base: nn.Module) -> Tensor:
        """The effective weight, ``[d_out, d_in]``, in the base's type."""
        # The weight as it is stored, [d_out, d_in] or transposed, flat; new values at the mask.
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
