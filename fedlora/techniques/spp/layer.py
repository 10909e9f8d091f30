"""SPP on one frozen linear layer: the multiplicative counterpart of `layers.LowRank`."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.models.layers import (
    LinearUpdate,
    bits_of,
    dense_weight,
    dropped_share,
    survivors,
    threshold,
)
from fedlora.models.masks import check_zeros
from fedlora.techniques.spp.scale import (
    blocks,
    repeat_rows,
    scaled_weight,
)


class BlockScaled(LinearUpdate):
    """``y = W x + s (W ∘ F) dropout(x)``, with ``F[i, j] = beta[i] alpha[g(i), j]``.

    No matrix of the size of ``W`` is kept: both passes compute ``W ∘ (1 + s F)``, or with dropout
    ``s W ∘ F``, and free it again. If the number format differs from that of the factors (a
    bfloat16 base, autocast), the base computes ``W x`` unchanged and the branch is added to it,
    because ``W ∘ (1 + s F)`` rounded to bfloat16 would lose small updates. After earlier merges
    ``W ∘ gain`` is kept in the factors' type, and products use that type for the same reason.

    Args:
        alpha: ``[r, d_in]``.
        beta: ``[d_out]``.
        scale: ``s``.
        p: dropout rate of the branch's input.
        base: the layer.
        tied: rank of the change of alpha that is trained in its place; 0: alpha itself is trained.
        change: ``[tied, d_in]``, the value at which that change starts; None: zero.
        gain: ``[d_out, d_in]``, what earlier merges have multiplied ``W`` by.
        trains: ``alpha``, ``beta`` or ``both``.
        dtype: the type of the factors.
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
        self._merged = None if gain is None else weight.to(dtype) * here(gain)
        self._block = blocks(len(self.beta), len(alpha), weight.device)

    def __call__(self, x: Tensor, base: nn.Module) -> Tensor:
        """Any leading shape: ``x [..., d_in]`` to ``[..., d_out]``."""
        weight, alpha, bias = self._weight(base), self.rows(), _bias(base)
        if self.p > 0 and self.bits is None:
            raise RuntimeError(
                f"dropout={self.p} without a seed: LanguageModel.seed_dropout before a forward"
            )
        kind, given = alpha.dtype, _computed_in(x)
        whole = self._merged is not None or weight.dtype == kind == given
        how = _how(self.scale, self.p, whole, kind if whole else _computed_in(x, kind))
        ours = (self.bits, weight, bias if whole else None, alpha, self.beta, self._block)
        apply: Any = _Scaled.apply
        y: Tensor = apply(x, *ours, how)
        if whole:
            return y.to(given)
        plain: Tensor = base(x)
        return (plain + y).to(plain.dtype)

    def rows(self) -> Tensor:
        """The effective ``alpha``, ``[r, d_in]``: with its tied change, if there is one."""
        if self.change is None:
            return self.alpha
        return self.alpha + repeat_rows(self.change, len(self.alpha))

    def parameters(self) -> list[nn.Parameter]:
        """Alpha (or its change) and beta; those that require gradients are trained."""
        return [self.alpha if self.change is None else self.change, self.beta]

    def restrict(self, train_a: bool, train_b: bool) -> None:
        """Freeze alpha or beta, in addition to those that `trains` has frozen."""
        alpha, beta = self.parameters()
        alpha.requires_grad_(train_a and alpha.requires_grad)
        beta.requires_grad_(train_b and beta.requires_grad)

    def check_stored(self, path: str, base: nn.Module, stored: Tensor) -> None:
        """Check that no zero has moved and that every weight is finite."""
        weight: Any = base.weight
        check_zeros({path: (weight != 0).cpu()}, lambda _: stored, "merging")

    def weight(self, base: nn.Module) -> Tensor:
        """The effective weight ``W ∘ (1 + s F)``, ``[d_out, d_in]``, in the factors' type."""
        return scaled_weight(self._weight(base), self.rows(), self.beta, self.scale)

    def _weight(self, base: nn.Module) -> Tensor:
        return dense_weight(base) if self._merged is None else self._merged


def scaled_branch(x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor, scale: float) -> Tensor:
    """``s (W ∘ F) x``, ``[..., d_out]`` in the factors' type (or autocast's).

    Args:
        x: ``[..., d_in]``.
        weight: ``[d_out, d_in]``, frozen.
        alpha: ``[r, d_in]``.
        beta: ``[d_out]``.
        scale: ``s``.
    """
    how = _how(scale, 0.0, False, _computed_in(x, alpha.dtype))
    apply: Any = _Scaled.apply
    block = blocks(len(beta), len(alpha), beta.device)
    y: Tensor = apply(x, None, weight, None, alpha, beta, block, how)
    return y


def _bias(base: nn.Module) -> Tensor | None:
    bias: Any = base.bias
    return bias if isinstance(bias, Tensor) else None


def _computed_in(x: Tensor, otherwise: torch.dtype | None = None) -> torch.dtype:
    """Autocast's type while it is on; else ``otherwise``, or the type of ``x``."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return otherwise or x.dtype


class _How(NamedTuple):
    """What `_Scaled` computes besides its tensors."""

    scale: float
    """``s``, times what dropout multiplies survivors by."""
    dropped: int
    """Fraction of the branch's input that is dropped, in units of 2^-16."""
    whole: bool
    """Whether ``W`` and the bias are included; else only the branch."""
    kind: torch.dtype
    """The type of the products."""


def _how(scale: float, p: float, whole: bool, kind: torch.dtype) -> _How:
    dropped = dropped_share(p)
    if dropped == 2**16:  # nothing survives, whatever the mask
        return _How(0.0, dropped - 1, whole, kind)
    return _How(scale * 2**16 / (2**16 - dropped), dropped, whole, kind)


class _Scaled(torch.autograd.Function):
    """``x Wᵀ + bias + dropout(x) (s W ∘ F)ᵀ``, or only the last term. Of the new tensors only ``x``
    is saved for the backward pass.

    ``G = gyᵀ dropout(x)``, ``[d_out, d_in]``, gives the gradients of both factors:
    ``∂beta = s rowsum(G ∘ W ∘ alpha_g)``, and ``∂alpha_g`` is the sum of the block's rows of
    ``s beta ∘ G ∘ W``. Without dropout the first terms are one product with ``W ∘ (1 + s F)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bits: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        alpha: Tensor,
        beta: Tensor,
        block: Tensor,
        how: _How,
    ) -> Tensor:
        ctx.save_for_backward(x, bits, weight, alpha, beta, block)
        ctx.how = how
        with _without_autocast(x):
            # The matrix [d_out, d_in] that multiplies the input: W ∘ (1 + s F) or s W ∘ F.
            x, acts = x.to(how.kind), _effective(weight, _rows(weight, alpha, block), beta, how)
            bias = None if bias is None else bias.to(how.kind)
            kept = _survivors(x, bits, how)
            if kept is None:
                return functional.linear(x, acts, bias)

            # With dropout W and the branch have different inputs, so they are two products.
            kept.mul_(x)  # dropout(x), [..., d_in], without its scale, which is in how.scale
            if not how.whole:
                return functional.linear(kept, acts)
            y = functional.linear(x, weight, bias)
            y.view(-1, y.shape[-1]).addmm_(kept.view(-1, x.shape[-1]), acts.t())
            return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, bits, weight, alpha, beta, block = ctx.saved_tensors
        how: _How = ctx.how
        needs = ctx.needs_input_grad
        gx = ga = gb = None
        with _without_autocast(x):
            # All leading dimensions as n rows: gy [n, d_out], flat [n, d_in].
            gy = grads[0].reshape(-1, grads[0].shape[-1]).to(how.kind)
            flat = x.reshape(-1, x.shape[-1]).to(how.kind)
            kept, rows = _survivors(flat, bits, how), _rows(weight, alpha, block)

            # Gradient of the input, [n, d_in]: through the branch and its mask, and through W.
            if needs[0]:
                gx = gy @ _effective(weight, rows, beta, how)
                if kept is not None:
                    gx.mul_(kept)
                    gx = gx.addmm_(gy, weight) if how.whole else gx
                gx = gx.view(x.shape).to(x.dtype)

            # Gradients of beta [d_out] and alpha [r, d_in] from G [d_out, d_in].
            if needs[4] or needs[5]:
                g = (gy.T @ (flat if kept is None else kept.mul_(flat))).to(alpha.dtype)
                gb = (g * rows).sum(1) * how.scale if needs[5] else None
                if needs[4]:
                    g.mul_(weight).mul_((how.scale * beta)[:, None])
                    ga = torch.zeros_like(alpha).index_add_(0, block, g)
        return gx, None, None, None, ga, gb, None, None


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Turn autocast off: this function chooses the types itself."""
    device = x.device.type
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _rows(weight: Tensor, alpha: Tensor, block: Tensor) -> Tensor:
    """``W ∘ alpha_g``, ``[d_out, d_in]``."""
    return alpha.index_select(0, block).mul_(weight)


def _effective(weight: Tensor, rows: Tensor, beta: Tensor, how: _How) -> Tensor:
    """``W ∘ (1 + s F)``, ``[d_out, d_in]``, bitwise identical to ``W`` where beta is zero. For the
    branch alone, and with dropout: ``s W ∘ F``."""
    scaled = (how.scale * beta)[:, None]
    if how.whole and not how.dropped:
        return torch.addcmul(weight, rows, scaled)
    return (rows * scaled).to(how.kind)


def _survivors(x: Tensor, bits: Tensor | None, how: _How) -> Tensor | None:
    """One where an input survives dropout, zero elsewhere; None: all survive."""
    if bits is None or not how.dropped:
        return None
    return survivors(bits_of(bits, x), threshold(how.dropped), how.kind)
