"""The scalars that a client trains in place of the factors in its row of the bank.

The network computes with the factors, so each optimizer step goes both ways: the gradient of the
factors back to the scalars, and the scalars' new values forward to the factors.

    R, of start.parametrisation  --factors-->  row of the bank  --network-->  loss
    R.grad  <--chain rule--  gradients in the bank
"""

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlora.core.payload import Parametrisation
from fedlora.engine.fused.bank import Layout


class Parametrised:
    """One client's trained scalars in one buffer, and how they make its row of factors.

    Args:
        made: what trains, of the dtype and device of the row.
        layout: of the row.
        row: ``[layout.size]``: the factors, which are those of ``made.start``.
        grad: ``[layout.size]``: their gradients.
    """

    def __init__(self, made: Parametrisation, layout: Layout, row: Tensor, grad: Tensor) -> None:
        self._made = made
        self._row, self._grad = layout.factors(row), layout.factors(grad)
        self.start = torch.cat([t.detach().reshape(-1) for t in made.start.values()])
        """``[p]``: the values before the first step."""
        self.buffer = nn.Parameter(self.start.clone())
        """``[p]``: the present values; its gradient is in place."""
        self.buffer.grad = torch.zeros_like(self.start)
        self._factors = made.factors(self._named(self.buffer))
        self.sides = (
            any(f.a.requires_grad for f in self._factors.values()),
            any(f.b.requires_grad for f in self._factors.values()),
        )
        """Whether any A is a function of the values, and whether any B is."""

    def pull(self) -> None:
        """Add the gradients in the bank, of the factors, to those of the buffer."""
        outputs, grads = [], []
        for path, f in self._factors.items():
            grad_a, grad_bt = self._grad[path]
            for factor, grad in ((f.a, grad_a), (f.b, grad_bt.t())):
                if factor.requires_grad:
                    outputs.append(factor)
                    grads.append(grad)
        (found,) = torch.autograd.grad(outputs, self.buffer, grads)
        assert self.buffer.grad is not None
        self.buffer.grad.add_(found)

    def push(self) -> None:
        """Write the factors of the present values to the bank, and clear the gradient."""
        assert self.buffer.grad is not None
        self.buffer.grad.zero_()
        self._factors = self._made.factors(self._named(self.buffer))
        for path, f in self._factors.items():
            a, bt = self._row[path]
            if f.a.requires_grad:
                a.copy_(f.a.detach())
            if f.b.requires_grad:
                bt.copy_(f.b.detach().t())

    def values(self) -> dict[str, Tensor]:
        """A copy of the present values, by name."""
        return self._named(self.buffer.detach().clone())

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a buffer ``[p]`` in the shapes of the values that it holds."""
        shapes: Mapping[str, Tensor] = self._made.start
        stops = itertools.accumulate((math.prod(t.shape) for t in shapes.values()), initial=0)
        return {
            name: flat[start:stop].view(t.shape)
            for (name, t), (start, stop) in zip(
                shapes.items(), itertools.pairwise(stops), strict=True
            )
        }
