"""SPP on one frozen linear layer: the multiplicative counterpart of `layers.LowRank`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.models.layers import dense_weight, dropout
from fedlora.spp import borders, factor, placed, spread


class BlockScaled:
    """``y = W x + s (W ∘ F) dropout(x)``, with ``F[i, j] = beta[i] alpha[g(i), j]``.

    Two ways to compute it, the same up to rounding; neither keeps anything of the size of ``W``. In
    blocks, ``beta ∘ (W_g (alpha_g ∘ x))`` is joined over blocks of rows, in the factors' type.
    Where ``W`` and ``x`` have that type too, ``x`` is multiplied by ``W ∘ (1 + s F)``, which is
    made and dropped in either pass; with dropout the branch by itself, by ``s W ∘ F``.

    Args:
        alpha: ``[r, d_in]``.
        beta: ``[d_out]``.
        scale: ``s``.
        p: dropout rate of the branch's input.
        base: the layer.
        tied: rank of the change of alpha that is trained in its place; 0: alpha itself is.
        change: ``[tied, d_in]``, where that change has begun.
        gain: ``[d_out, d_in]``, what earlier merges have multiplied ``W`` by.
        trains: ``alpha``, ``beta`` or ``both``.
        dtype: of the factors.
    """

    def __init__(
        self,
        alpha: Tensor,
        beta: Tensor,
        scale: float,
        p: float,
        base: nn.Module,
        *,
        dtype: torch.dtype,
        tied: int = 0,
        change: Tensor | None = None,
        gain: Tensor | None = None,
        trains: str = "both",
    ) -> None:
        weight = dense_weight(base)

        def here(t: Tensor) -> Tensor:
            return t.detach().to(weight.device, dtype, copy=True)

        rows, columns = trains != "beta", trains != "alpha"
        self.alpha = nn.Parameter(here(alpha), requires_grad=rows and not tied)
        self.beta = nn.Parameter(here(beta), requires_grad=columns)
        self.change: nn.Parameter | None = None
        if tied:
            start = alpha.new_zeros(tied, alpha.shape[1]) if change is None else change
            self.change = nn.Parameter(here(start), requires_grad=rows)
        self.scale, self.p = scale, p
        self.bits: Tensor | None = None
        """Of the next forward's mask (`fedlora.models.layers.dropout_bits`)."""
        self._merged = None if gain is None else (weight.to(dtype) * here(gain)).to(weight.dtype)

    def __call__(self, x: Tensor, base: nn.Module) -> Tensor:
        """Any leading shape: ``x [..., d_in]`` to ``[..., d_out]``."""
        weight, alpha, bias = self._weight(base), self.rows(), _bias(base)
        plain = weight.dtype == alpha.dtype == x.dtype and not _autocast(x)
        apply: Any = _Scaled.apply
        y: Tensor
        if plain and self.p == 0:
            y = apply(x, weight, bias, alpha, self.beta, self.scale, True)
            return y
        y = base(x) if self._merged is None else functional.linear(x, weight, bias)
        x = self._dropped(x.to(alpha.dtype))
        if plain:
            branch: Tensor = apply(x, weight, None, alpha, self.beta, self.scale, False)
            return y + branch
        return torch.add(y, self._branch(x, weight, alpha), alpha=self.scale).to(y.dtype)

    def _dropped(self, x: Tensor) -> Tensor:
        if self.p == 0:
            return x
        if self.bits is None:
            raise RuntimeError(
                f"dropout={self.p} without a seed: LanguageModel.seed_dropout before a forward"
            )
        return dropout(x, self.p, self.bits)

    def _branch(self, x: Tensor, weight: Tensor, alpha: Tensor) -> Tensor:
        """``(W ∘ F) x``, block by block."""
        at = borders(weight.shape[0], len(alpha))
        parts = [
            functional.linear(x * alpha[g], weight[at[g] : at[g + 1]].to(x.dtype))
            for g in range(len(alpha))
        ]
        return torch.cat(parts, dim=-1) * self.beta

    def rows(self) -> Tensor:
        """``alpha`` as it acts, ``[r, d_in]``."""
        if self.change is None:
            return self.alpha
        return self.alpha + spread(self.change, len(self.alpha))

    def parameters(self) -> list[nn.Parameter]:
        """Alpha, or the change of it, and beta; which of them require gradients is what trains."""
        return [self.alpha if self.change is None else self.change, self.beta]

    def weight(self, base: nn.Module) -> Tensor:
        """The effective weight ``W ∘ (1 + s F)``, ``[d_out, d_in]``, in the factors' type."""
        w = self._weight(base).to(self.alpha.dtype)
        return torch.addcmul(w, w, factor(self.rows(), self.beta), value=self.scale)

    def _weight(self, base: nn.Module) -> Tensor:
        return dense_weight(base) if self._merged is None else self._merged


def _bias(base: nn.Module) -> Tensor | None:
    bias: Any = base.bias
    return bias if isinstance(bias, Tensor) else None


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


class _Scaled(torch.autograd.Function):
    """``x (W ∘ (1 + s F))ᵀ + bias``, or ``x (s W ∘ F)ᵀ``, with nothing new kept but ``x``.

    With ``G = gyᵀ x``, one product for both factors: ``∂beta = s rowsum(G ∘ W ∘ alpha_g)`` and
    ``∂alpha = s Bᵀ (G ∘ W)``, where ``B [d_out, r]`` is beta in the columns of its blocks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        alpha: Tensor,
        beta: Tensor,
        scale: float,
        whole: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, alpha, beta)
        ctx.scale, ctx.whole = scale, whole
        return functional.linear(x, _effective(weight, alpha, beta, scale, whole), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, alpha, beta = ctx.saved_tensors
        (gy,) = grads
        gx = ga = gb = None
        if ctx.needs_input_grad[0]:
            gx = gy @ _effective(weight, alpha, beta, ctx.scale, ctx.whole)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            moved = gy.reshape(-1, gy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            moved = moved.mul_(weight)
            if ctx.needs_input_grad[3]:
                ga = placed(beta, len(alpha)).T @ moved * ctx.scale
            if ctx.needs_input_grad[4]:
                one = placed(torch.ones_like(beta), len(alpha))
                gb = (moved @ alpha.T * one).sum(1) * ctx.scale
        return gx, None, None, ga, gb, None, None


def _effective(weight: Tensor, alpha: Tensor, beta: Tensor, scale: float, whole: bool) -> Tensor:
    """``W ∘ (1 + s F)``: ``W`` itself, bit for bit, where beta is zero; or ``s W ∘ F``."""
    if not whole:
        return (placed(scale * beta, len(alpha)) @ alpha).mul_(weight)
    return torch.addcmul(weight, weight, placed(beta, len(alpha)) @ alpha, value=scale)
