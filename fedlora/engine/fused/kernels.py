"""A frozen linear layer with a LoRA of its own for every segment of its input, in one operation.

    y[k] = W x[k] + b + s_k B_k A_k (m_k ∘ x[k])        for the rows x[k] of client k

``W`` multiplies all rows at once; only the products of rank ``r`` are done segment by segment.
``m_k`` is the client's dropout mask of zeros and ones, and ``s_k`` holds ``alpha / r`` and the
mask's ``1 / (1 - p)``. With ``g = dL/dy`` the backward pass is

    dB_k^T += s_k h_k g[k]              h_k = A_k (m_k ∘ x[k])^T, saved
    dh_k    = s_k B_k^T g[k]^T
    dA_k   += dh_k (m_k ∘ x[k])
    dx[k]   = g[k] W + m_k ∘ (dh_k^T A_k)

so the mask enters dA and dx. mLoRA's public BatchLoRA leaves it out of both, which is 24 % of the
gradient of A at a dropout rate of 0.05.

Layout: with ``B^T [r, d_out]`` and ``h [r, n]`` the small rank is the M side of every product,
where a CPU's matrix multiplication runs at 44 to 60 GFLOP/s rather than 11 to 14.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlora.engine.fused.bank import Views


class Segment(NamedTuple):
    """Consecutive rows of a layer's input that belong to one client, or to several whose products
    can be batched: of one layout, in consecutive slots, with equally many rows each."""

    clients: int
    views: Views | None
    """The factors of this layer; None: no adapter here."""
    scale: float
    """``alpha / r``, divided by ``1 - p`` where there is dropout."""
    train_a: bool
    train_b: bool


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What one layer must know of a fused forward; fixed until the backward pass is over, so that
    a forward that is computed again under gradient checkpointing is the same."""

    sizes: Sequence[int]
    """Rows of each segment; their sum is the rows of the input."""
    segments: Sequence[Segment]
    bits: Tensor | None = None
    """``[N, d_in]`` int16, sixteen random bits per number; None: no dropout."""
    thresholds: Tensor | None = None
    """``[N, 1]`` int16: a number is dropped whose bits are smaller."""

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """``[N, d_in]``: one where a number survives dropout, zero elsewhere."""
        if self.bits is None or self.thresholds is None:
            return None
        kept = torch.empty(self.bits.shape, dtype=dtype, device=self.bits.device)
        return torch.ge(self.bits, self.thresholds, out=kept)


def up(y: Tensor, x: Tensor, plan: LayerPlan) -> list[Tensor | None]:
    """Add every segment's ``s B A x`` to ``y``, in place.

    Args:
        y: ``[N, d_out]``.
        x: ``[N, d_in]``, masked where there is dropout.
        plan: the segments.

    Returns:
        ``h = A x^T`` of every segment, ``[r, n]`` or ``[clients, r, n]``: what `down` needs.
    """
    hidden: list[Tensor | None] = []
    for s, ys, xs in zip(plan.segments, y.split(plan.sizes), x.split(plan.sizes), strict=True):
        if s.views is None:
            hidden.append(None)
        elif s.clients == 1:
            h = torch.mm(s.views.a, xs.t())
            ys.addmm_(h.t(), s.views.bt, alpha=s.scale)
            hidden.append(h)
        else:
            h = torch.bmm(s.views.a, _lanes(xs, s).transpose(1, 2))
            _lanes(ys, s).baddbmm_(h.transpose(1, 2), s.views.bt, alpha=s.scale)
            hidden.append(h)
    return hidden


def down(
    dx: Tensor | None, g: Tensor, x: Tensor, hidden: Sequence[Tensor | None], plan: LayerPlan
) -> None:
    """Add every segment's gradients: of its factors, and of its input to ``dx``, in place.

    Args:
        dx: ``[N, d_in]``, or None where the input needs no gradient.
        g: ``[N, d_out]``, the gradient of the output.
        x: ``[N, d_in]``, masked where there was dropout.
        hidden: what `up` returned.
        plan: the segments.
    """
    sizes = plan.sizes
    inputs: Sequence[Tensor | None] = [None] * len(sizes) if dx is None else dx.split(sizes)
    for s, h, gs, xs, dxs in zip(
        plan.segments, hidden, g.split(sizes), x.split(sizes), inputs, strict=True
    ):
        if s.views is None or h is None:
            continue
        one = s.clients == 1
        gs, xs = (gs, xs) if one else (_lanes(gs, s), _lanes(xs, s))
        if s.train_b:
            _accumulate(s.views.grad_bt, h, gs, s.scale)
        if s.train_a or dxs is not None:
            dh = torch.matmul(s.views.bt, gs.mT)
            if s.train_a:
                _accumulate(s.views.grad_a, dh, xs, s.scale)
            if dxs is not None:
                _accumulate(dxs if one else _lanes(dxs, s), dh.mT, s.views.a, s.scale)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """``total += scale a b``, of matrices or of stacks of them."""
    if total.dtype != a.dtype:  # an activation in bfloat16, a gradient in float32
        total.add_(torch.matmul(a, b), alpha=scale)
    elif total.dim() == 2:
        total.addmm_(a, b, alpha=scale)
    else:
        total.baddbmm_(a, b, alpha=scale)


def _lanes(x: Tensor, s: Segment) -> Tensor:
    """``[clients n, d]`` as ``[clients, n, d]``."""
    return x.view(s.clients, -1, x.shape[-1])


class FusedLinear(torch.autograd.Function):
    """The whole layer, where the frozen weight is a plain matrix.

    Gradients of the factors go into the bank's rows, not through autograd; ``anchor``, a scalar
    that requires a gradient, makes autograd come by even where the input needs none.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, plan: LayerPlan
    ) -> Tensor:
        """``x [..., d_in]``, ``weight [d_in, d_out]`` -> ``[..., d_out]``."""
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        mask = plan.mask(flat.dtype)
        hidden = up(y, flat if mask is None else flat * mask, plan)
        trains_a = any(s.train_a and s.views is not None for s in plan.segments)
        ctx.save_for_backward(flat if trains_a else None, weight, *hidden)
        ctx.plan, ctx.shape, ctx.dtype = plan, x.shape, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        """Of the input alone."""
        flat, weight, *hidden = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        dx = g @ weight.t() if ctx.needs_input_grad[0] else None
        _down_masked(dx, g, flat, hidden, ctx.plan)
        return None if dx is None else dx.view(ctx.shape).to(ctx.dtype), None, None, None, None


class FusedDelta(torch.autograd.Function):
    """The adapters' part alone, beside a layer that keeps its weight to itself (quantised)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, d_out: int, plan: LayerPlan) -> Tensor:
        """``x [..., d_in]`` -> ``[..., d_out]``."""
        flat = x.reshape(-1, x.shape[-1])
        y = flat.new_zeros(flat.shape[0], d_out)
        mask = plan.mask(flat.dtype)
        hidden = up(y, flat if mask is None else flat * mask, plan)
        ctx.save_for_backward(flat, *hidden)
        ctx.plan, ctx.shape = plan, x.shape
        return y.view(*x.shape[:-1], d_out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Of the input alone."""
        flat, *hidden = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        dx = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        _down_masked(dx, g, flat, hidden, ctx.plan)
        return None if dx is None else dx.view(ctx.shape), None, None, None


def _down_masked(
    dx: Tensor | None,
    g: Tensor,
    x: Tensor | None,
    hidden: Sequence[Tensor | None],
    plan: LayerPlan,
) -> None:
    """`down` with the mask of the forward on both sides of every adapter."""
    mask = plan.mask(g.dtype)
    if x is None:  # no A is trained
        x = g.new_empty(0).expand(g.shape[0], 0)
    if mask is None:
        down(dx, g, x, hidden, plan)
        return
    through = None if dx is None else torch.zeros_like(dx)
    down(through, g, x * mask if x.shape[1] else x, hidden, plan)
    if dx is not None and through is not None:
        dx.addcmul_(through, mask)
