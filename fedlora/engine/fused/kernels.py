"""A frozen linear layer with a LoRA of its own for every segment of its input, in one operation.

    y[k] = W x[k] + b + s_k B_k A_k (m_k ∘ x[k])        for the rows x[k] of client k

``W`` multiplies all rows at once; only the products of rank ``r`` are done segment by segment.
``m_k`` is the client's dropout mask of zeros and ones, and ``s_k`` holds ``alpha / r`` and the
mask's ``1 / (1 - p)``. With ``g = dL/dy`` the backward pass is

    dB_k^T += s_k h_k g[k]              h_k = A_k (m_k ∘ x[k])^T, saved
    dh_k    = s_k B_k^T g[k]^T
    dA_k   += dh_k (m_k ∘ x[k])
    dx[k]   = g[k] W + m_k ∘ (dh_k^T A_k)

so the mask enters dA and dx. mLoRA's public BatchLoRA leaves it out of both: an error of 24 % of
the gradient of A at a dropout rate of 0.05.

Layout: with ``B^T [r, d_out]`` and ``h [r, n]`` the small rank is the M side of every product,
where a CPU's matrix multiplication runs at 44 to 60 GFLOP/s rather than 11 to 14.

The examples in this module are two clients of rank 1 with two rows and one row of a layer
``d_in = 2``, ``d_out = 3``: a segment for each, since their numbers of rows differ.

>>> def views(a, b):
...     a, bt = torch.tensor([a]), torch.tensor([b])
...     return Views(a, bt, torch.zeros_like(a), torch.zeros_like(bt))
>>> client_0, client_1 = views([1.0, 0.0], [1.0, 2.0, 3.0]), views([1.0, 1.0], [1.0, 0.0, 0.0])
>>> segments = [Segment(1, client_0, 0.5, True, True), Segment(1, client_1, 1.0, True, True)]
>>> plan = LayerPlan(sizes=[2, 1], segments=segments)
>>> x = torch.tensor([[2.0, 1.0], [4.0, 1.0], [1.0, 2.0]])
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlora.engine.fused.bank import Views
from fedlora.engine.fused.lanes import Spread
from fedlora.models.layers import survivors
from fedlora.models.ragged import gather_rows


class Segment(NamedTuple):
    """Consecutive rows of a layer's input that belong to one client, or to several whose products
    are computed in one stack: one layout, consecutive slots, equally many rows each."""

    clients: int
    views: Views | None
    """The factors of this layer; None: no adapter here."""
    scale: float
    """``alpha / r``, divided by ``1 - p`` where there is dropout."""
    train_a: bool
    train_b: bool


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """The segments of one layer in one fused forward pass.

    Fixed until the backward pass is over, so that a forward pass that gradient checkpointing
    computes again is the same. ``N`` rows go into the layer, ``M`` into the adapters' products.
    """

    sizes: Sequence[int]
    """Rows of each segment, in the copy where there is one (`lanes.Spread`)."""
    segments: Sequence[Segment]
    bits: Tensor | None = None
    """``[M, d_in]`` int16, sixteen random bits per scalar; None: no dropout."""
    thresholds: Tensor | None = None
    """``[M, 1]`` int16: a scalar is dropped if its bits are smaller."""
    spread: Spread | None = None
    """How ``N`` rows are copied to ``M``; None: segments are the rows themselves, ``M = N``."""
    dtype: torch.dtype | None = None
    """The factors' type, in which their products are computed; None: the layer's."""

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """``[M, d_in]``: one where a scalar survives dropout, zero elsewhere; None: no dropout."""
        if self.bits is None or self.thresholds is None:
            return None
        return survivors(self.bits, self.thresholds, dtype)

    @property
    def trains_a(self) -> bool:
        """Whether any A is trained; its gradient needs the input."""
        return any(s.train_a and s.views is not None for s in self.segments)


def up(y: Tensor, x: Tensor, plan: LayerPlan, fresh: bool) -> list[Tensor | None]:
    """Every segment's ``s B A x``, added to ``y`` in place, or written to it.

    Args:
        y: ``[M, d_out]``.
        x: ``[M, d_in]``, masked where there is dropout.
        plan: the segments.
        fresh: whether ``y`` is uninitialised.

    Returns:
        ``s h = s A x^T`` of every segment, ``[r, n]`` or ``[clients, r, n]``, for `down`; None
        where the segment has no adapter.

    >>> y = torch.zeros(3, 3)
    >>> [h.tolist() for h in up(y, x, plan, fresh=False)]
    [[[1.0, 2.0]], [[3.0]]]
    >>> y.tolist()
    [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 0.0, 0.0]]
    """
    hidden: list[Tensor | None] = []
    for s, ys, xs in zip(plan.segments, y.split(plan.sizes), x.split(plan.sizes), strict=True):
        if s.views is None:
            hidden.append(None)
            if fresh:
                ys.zero_()
            continue

        # One client: [n, d]; a stack: [clients, n, d]. Then h [(clients,) r, n], with the scale.
        ys, xs = (ys, xs) if s.clients == 1 else (_lanes(ys, s), _lanes(xs, s))
        h = torch.matmul(s.views.a, xs.mT).mul_(s.scale)
        if fresh:
            torch.matmul(h.mT, s.views.bt, out=ys)
        else:
            _accumulate(ys, h.mT, s.views.bt)
        hidden.append(h)
    return hidden


def down(
    dx: Tensor | None,
    g: Tensor,
    x: Tensor,
    hidden: Sequence[Tensor | None],
    plan: LayerPlan,
    fresh: bool,
) -> None:
    """Add every segment's gradients to the bank and the gradient of its input to ``dx``, in place.

    Args:
        dx: ``[M, d_in]``, or None where the input needs no gradient.
        g: ``[M, d_out]``, the gradient of the output.
        x: ``[M, d_in]``, masked where there was dropout.
        hidden: what `up` returned.
        plan: the segments.
        fresh: whether ``dx`` is uninitialised.

    >>> hidden = up(torch.zeros(3, 3), x, plan, fresh=False)
    >>> dx, g = torch.zeros(3, 2), torch.ones(3, 3)
    >>> down(dx, g, x, hidden, plan, fresh=False)
    >>> client_0.grad_bt.tolist(), client_0.grad_a.tolist()  # s h g; (s B^T g^T) x
    ([[3.0, 3.0, 3.0]], [[18.0, 6.0]])
    >>> dx.tolist()
    [[3.0, 0.0], [3.0, 0.0], [1.0, 1.0]]
    """
    sizes = plan.sizes
    inputs: Sequence[Tensor | None] = [None] * len(sizes) if dx is None else dx.split(sizes)
    for s, h, gs, xs, dxs in zip(
        plan.segments, hidden, g.split(sizes), x.split(sizes), inputs, strict=True
    ):
        if s.views is None or h is None:
            if fresh and dxs is not None:
                dxs.zero_()
            continue
        if s.clients > 1:  # [clients, n, d]
            gs, xs, dxs = _lanes(gs, s), _lanes(xs, s), None if dxs is None else _lanes(dxs, s)

        # dB^T += s h g, [r, n] x [n, d_out].
        if s.train_b:
            _accumulate(s.views.grad_bt, h, gs)
        if not s.train_a and dxs is None:
            continue

        # dh = s B^T g^T, [r, n]; dA += dh x, [r, d_in]; dx += dh^T A, [n, d_in].
        dh = torch.matmul(s.views.bt, gs.mT).mul_(s.scale)
        if s.train_a:
            _accumulate(s.views.grad_a, dh, xs)
        if dxs is not None and fresh:
            torch.matmul(dh.mT, s.views.a, out=dxs)
        elif dxs is not None:
            _accumulate(dxs, dh.mT, s.views.a)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a b``, of matrices or of stacks of them."""
    if total.dim() == 2 and total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_contiguous() and total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:  # the bank's rows lie apart, which baddbmm answers with a product for each
        total.add_(torch.matmul(a, b))


def _lanes(x: Tensor, s: Segment) -> Tensor:
    """``[clients n, d]`` as ``[clients, n, d]``."""
    rows, d = x.shape
    return x.view(s.clients, rows // s.clients, d)  # -1 would not do where d is 0


def add_adapters(y: Tensor, rows: Tensor, plan: LayerPlan) -> list[Tensor | None]:
    """Add the adapters' part of the layer to ``y [N, d_out]``, in place.

    Args:
        y: the frozen weight's part.
        rows: the layer's input, or its copy if rows are spread, ``[M, d_in]``.
        plan: the adapters.

    Returns:
        What `add_gradients` needs.
    """
    kind = plan.dtype or rows.dtype
    inputs = _masked(rows.to(kind), plan.mask(kind))
    if plan.spread is None and kind == y.dtype:
        return up(y, inputs, plan, fresh=False)

    # The products on the copy, [M, d_out], and back to the rows; pads are left out.
    delta = y.new_empty(rows.shape[0], y.shape[1], dtype=kind)
    hidden = up(delta, inputs, plan, fresh=True)
    y.add_(_back(delta.to(y.dtype), plan.spread))
    return hidden


def add_gradients(
    dx: Tensor | None,
    g: Tensor,
    rows: Tensor | None,
    hidden: Sequence[Tensor | None],
    plan: LayerPlan,
) -> None:
    """The backward pass of `add_adapters`: into the bank and ``dx [N, d_in]``, in place.

    Args:
        dx: the frozen weight's part; None where the input needs no gradient.
        g: ``[N, d_out]``.
        rows: ``[M, d_in]`` as in `add_adapters`; None where no A is trained.
        hidden: what `add_adapters` returned.
        plan: the adapters.
    """
    # Gradient of the output and input as the products see them, [M, d_out] and [M, d_in]. A pad has
    # no gradient. If no A is trained the input is not needed, and an empty one stands for it.
    kind = plan.dtype or g.dtype
    spread, mask = plan.spread, plan.mask(kind)
    grads = (g if spread is None else gather_rows(g, spread.out, spread.pads)).to(kind)
    inputs = grads.new_empty(grads.shape[0], 0) if rows is None else _masked(rows.to(kind), mask)
    if spread is None and mask is None and kind == g.dtype:
        down(dx, grads, inputs, hidden, plan, fresh=False)
        return

    # Gradient of the adapters' input, [M, d_in]: through the mask, and back to the rows.
    through = None if dx is None else grads.new_empty(grads.shape[0], dx.shape[1])
    down(through, grads, inputs, hidden, plan, fresh=True)
    if dx is None or through is None:
        return
    if mask is not None:
        through.mul_(mask)
    dx.add_(_back(through.to(dx.dtype), spread))


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _back(x: Tensor, spread: Spread | None) -> Tensor:
    """The rows ``[N, d]`` of a copy ``[M, d]``."""
    return x if spread is None else x.index_select(0, spread.back)


class FusedLinear(torch.autograd.Function):
    """The whole layer, where the frozen weight is a plain matrix.

    Gradients of the factors go into the bank's rows, not through autograd. ``anchor``, a scalar
    that requires a gradient, makes autograd call `backward` even where the input needs none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        plan: LayerPlan,
    ) -> Tensor:
        """``x [..., d_in]`` and its copy ``rows [M, d_in]`` if rows are spread, ``weight [d_in,
        d_out]`` -> ``[..., d_out]``."""
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        # A tensor of its own, not a view: some models continue in place.
        out = flat.new_empty(*x.shape[:-1], weight.shape[1])
        y = out.view(-1, weight.shape[1])
        if bias is None:
            torch.mm(flat, weight, out=y)
        else:
            torch.addmm(bias, flat, weight, out=y)
        rows = flat if rows is None else rows
        hidden = add_adapters(y, rows, plan)
        ctx.save_for_backward(rows if plan.trains_a else None, weight, *hidden)
        ctx.plan, ctx.shape, ctx.dtype = plan, x.shape, x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        """Gradient of the input; the factors' gradients go into the bank."""
        rows, weight, *hidden = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        dx = g @ weight.t() if ctx.needs_input_grad[0] else None
        add_gradients(dx, g, rows, hidden, ctx.plan)
        if dx is not None:
            dx = dx.view(ctx.shape).to(ctx.dtype)
        return dx, None, None, None, None, None


class FusedDelta(torch.autograd.Function):
    """The adapters' part alone, beside a layer whose weight is not a plain matrix (quantised), or
    on what that weight is known to give."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        d_out: int,
        known: Tensor | None,
        rows: Tensor | None,
        plan: LayerPlan,
    ) -> Tensor:
        """``x [..., d_in]``, what it is added to ``[..., d_out]`` (which gets no gradient; None:
        nothing), and the copy of x, if rows are spread -> ``[..., d_out]``."""
        flat = x.reshape(-1, x.shape[-1])
        out = flat.new_zeros(*x.shape[:-1], d_out)
        if known is not None:
            out.copy_(known)
        rows = flat if rows is None else rows
        hidden = add_adapters(out.view(-1, d_out), rows, plan)
        ctx.save_for_backward(rows if plan.trains_a else None, *hidden)
        ctx.plan, ctx.shape = plan, x.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        """Gradient of the input; the factors' gradients go into the bank."""
        rows, *hidden = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        wanted = ctx.needs_input_grad[0]
        dx = g.new_zeros(g.shape[0], ctx.shape[-1]) if wanted else None
        add_gradients(dx, g, rows, hidden, ctx.plan)
        return None if dx is None else dx.view(ctx.shape), None, None, None, None, None
