"""One frozen linear layer with a trained core between two fixed factors."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.models.layers import LinearUpdate, dense_weight, dropout


class CoreLayer(LinearUpdate):
    """``y = W x + (alpha / r) U R V dropout(x)``, where ``R`` is block-diagonal.

    Args:
        u: ``[d_out, r]``, fixed and shared with others.
        blocks: ``R_i [b_i, b_i]`` along the diagonal of R, copied.
        v: ``[r, d_in]``, fixed and shared with others.
        scale: ``alpha / r``.
        gains: whether a gain ``g_i``, which is 1 at first, trains beside each block: ``g_i R_i``.
        p: dropout rate of the input.
    """

    def __init__(
        self,
        u: Tensor,
        blocks: Sequence[Tensor],
        v: Tensor,
        scale: float,
        gains: bool,
        p: float,
    ) -> None:
        self.u, self.v = u, v
        self.blocks = [nn.Parameter(b.detach().to(u.device, u.dtype, copy=True)) for b in blocks]
        self.gains = nn.Parameter(u.new_ones(len(blocks))) if gains else None
        """``[blocks]``"""
        self.scale, self.p = scale, p

    def __call__(self, x: Tensor, base: nn.Module) -> Tensor:
        """Any leading shape: ``x [..., d_in]`` to ``[..., d_out]``."""
        y: Tensor = base(x)

        # x [..., d_in], its product with V [..., r], with R [..., r], with U [..., d_out].
        x = x.to(self.v.dtype)
        if self.p > 0:
            if self.bits is None:
                raise RuntimeError(
                    f"dropout={self.p} without a seed: LanguageModel.seed_dropout before a forward"
                )
            x = dropout(x, self.p, self.bits)
        low = functional.linear(functional.linear(x, self.v), self.core())
        return torch.add(y, functional.linear(low, self.u), alpha=self.scale).to(y.dtype)

    def core(self) -> Tensor:
        """``R [r, r]``, with the gains."""
        return core_of(self.gained())

    def gained(self) -> list[Tensor]:
        """``g_i R_i`` of every block."""
        return gained(self.blocks, self.gains)

    def parameters(self) -> list[nn.Parameter]:
        """The blocks, and the gains if they train."""
        return [*self.blocks, *([] if self.gains is None else [self.gains])]

    def weight(self, base: nn.Module) -> Tensor:
        """The effective weight ``W + (alpha / r) U R V``, ``[d_out, d_in]``, in the core's type."""
        return dense_weight(base).to(self.u.dtype) + self.scale * (self.u @ self.core() @ self.v)


def core_of(blocks: Sequence[Tensor]) -> Tensor:
    """``R [r, r]`` of its blocks ``[b_i, b_i]``."""
    core: Tensor = torch.block_diag(*blocks)
    return core


def gained(blocks: Sequence[Tensor], gains: Tensor | None) -> list[Tensor]:
    """``g_i R_i`` of every block; the blocks themselves without gains."""
    if gains is None:
        return list(blocks)
    return [g * block for g, block in zip(gains, blocks, strict=True)]
