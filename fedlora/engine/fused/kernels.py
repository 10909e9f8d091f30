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
from fedlora.engine.fused.batch import Spread
from fedlora.models.ragged import moved


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
    """Rows of each segment, in the copy where there is one (`batch.Spread`)."""
    segments: Sequence[Segment]
    bits: Tensor | None = None
    """``[M, d_in]`` int16, sixteen random bits per number; None: no dropout."""
    thresholds: Tensor | None = None
    """``[M, 1]`` int16: a number is dropped whose bits are smaller."""
    spread: Spread | None = None
    """Of ``N`` rows to ``M``; None: segments are the rows themselves, ``M = N``."""

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """``[M, d_in]``: one where a number survives dropout, zero elsewhere."""
        if self.bits is None or self.thresholds is None:
            return None
        kept = torch.empty(self.bits.shape, dtype=dtype, device=self.bits.device)
        return torch.ge(self.bits, self.thresholds, out=kept)

    @property
    def trains_a(self) -> bool:
        """Whether any A is trained, which takes the input."""
        return any(s.train_a and s.views is not None for s in self.segments)

    def inputs(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``x [N, d]`` as the adapters see it, ``[M, d]``."""
        rows = x if self.spread is None else x.index_select(0, self.spread.out)
        return rows if mask is None else rows * mask


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
    if total.dim() == 2 and total.dtype == a.dtype:
        total.addmm_(a, b, alpha=scale)
    elif total.is_contiguous() and total.dtype == a.dtype:
        total.baddbmm_(a, b, alpha=scale)
    else:  # the bank's rows lie apart, which baddbmm answers with a product for each
        total.add_(torch.matmul(a, b), alpha=scale)


def _lanes(x: Tensor, s: Segment) -> Tensor:
    """``[clients n, d]`` as ``[clients, n, d]``."""
    return x.view(s.clients, -1, x.shape[-1])


def add_adapters(y: Tensor, x: Tensor, plan: LayerPlan) -> list[Tensor | None]:
    """Add the adapters' part of the layer to ``y [N, d_out]``, in place.

    Args:
        y: what the frozen weight gives.
        x: ``[N, d_in]``.
        plan: the adapters.

    Returns:
        What `add_gradients` needs.
    """
    inputs = plan.inputs(x, plan.mask(x.dtype))
    if plan.spread is None:
        return up(y, inputs, plan)
    delta = y.new_zeros(inputs.shape[0], y.shape[1])
    hidden = up(delta, inputs, plan)
    y.add_(delta.index_select(0, plan.spread.back))
    return hidden


def add_gradients(
    dx: Tensor | None,
    g: Tensor,
    x: Tensor | None,
    hidden: Sequence[Tensor | None],
    plan: LayerPlan,
) -> None:
    """The backward pass of `add_adapters`: to the bank, and to ``dx [N, d_in]``, in place.

    Args:
        dx: the frozen weight's part; None where the input needs no gradient.
        g: ``[N, d_out]``.
        x: ``[N, d_in]``; None where no A is trained.
        hidden: what `add_adapters` returned.
        plan: the adapters.
    """
    spread, mask = plan.spread, plan.mask(g.dtype)
    grads = g if spread is None else moved(g, spread.out, spread.pads)
    rows = grads.shape[0]
    inputs = g.new_empty(rows, 0) if x is None else plan.inputs(x, mask)
    if spread is None and mask is None:
        down(dx, grads, inputs, hidden, plan)
        return
    through = None if dx is None else dx.new_zeros(rows, dx.shape[1])
    down(through, grads, inputs, hidden, plan)
    if dx is None or through is None:
        return
    if mask is not None:
        through.mul_(mask)
    dx.add_(through if spread is None else through.index_select(0, spread.back))


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
        hidden = add_adapters(y, flat, plan)
        ctx.save_for_backward(flat if plan.trains_a else None, weight, *hidden)
        ctx.plan, ctx.shape, ctx.dtype = plan, x.shape, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        """Of the input alone."""
        flat, weight, *hidden = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        dx = g @ weight.t() if ctx.needs_input_grad[0] else None
        add_gradients(dx, g, flat, hidden, ctx.plan)
        return None if dx is None else dx.view(ctx.shape).to(ctx.dtype), None, None, None, None


class FusedDelta(torch.autograd.Function):
    """The adapters' part alone, beside a layer that keeps its weight to itself (quantised)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, d_out: int, plan: LayerPlan) -> Tensor:
        """``x [..., d_in]`` -> ``[..., d_out]``."""
        flat = x.reshape(-1, x.shape[-1])
        y = flat.new_zeros(flat.shape[0], d_out)
        hidden = add_adapters(y, flat, plan)
        ctx.save_for_backward(flat if plan.trains_a else None, *hidden)
        ctx.plan, ctx.shape = plan, x.shape
        return y.view(*x.shape[:-1], d_out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Of the input alone."""
        flat, *hidden = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        wanted = ctx.needs_input_grad[0]
        dx = g.new_zeros(g.shape[0], ctx.shape[-1]) if wanted else None
        add_gradients(dx, g, flat, hidden, ctx.plan)
        return None if dx is None else dx.view(ctx.shape), None, None, None
