"""Private steps in the fused engine: an example is a lane with a row of the bank of its own.

The rows hold the client's present factors, so the engine that computes gradients of many clients at
once computes those of many examples. They are clipped, summed into the client's own gradient and
forgotten. For factors of rank r, rows of length r (m + n) by example are cheaper than norms by Gram
matrices of the tokens, unless r exceeds an example's tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.core.example_privacy import ExamplePrivacy
from fedlora.core.types import TrainJob
from fedlora.engine.fused.bank import AdapterBank, Layout


class ExampleRows:
    """Rows of a bank for the examples of one client's forward pass.

    Args:
        bank: that holds the client.
        first: slot of the first row.
        privacy: clip and noise.
    """

    def __init__(self, bank: AdapterBank, first: int, privacy: ExamplePrivacy) -> None:
        self._bank, self._first, self._privacy = bank, first, privacy
        self._used: range = range(0)
        self._empty = False
        self.tokens: list[int] = []
        """Supervised tokens of each example."""

    @property
    def slots(self) -> range:
        """The rows in use."""
        return self._used

    def load(self, row: Tensor, tokens: Sequence[int], empty: bool) -> None:
        """Copy a client's parameters ``[size]`` for each example, and clear their gradients.

        Args:
            row: of the client.
            tokens: supervised tokens of each example of the forward pass.
            empty: whether the step drew no example, so that nothing of the pass counts.
        """
        self.tokens, self._empty = list(tokens), empty
        self._used = range(self._first, self._first + len(tokens))
        used = slice(self._used.start, self._used.stop)
        self._bank.params[used, : len(row)] = row
        self._bank.grads[used].zero_()

    def add_clipped(self, grad: Tensor, trained: Sequence[slice]) -> None:
        """``grad += Σ_i g_i min(1, C / ||g_i||)`` over the trained sections of the rows."""
        if self._empty:
            return
        rows = self._bank.grads[self._used.start : self._used.stop]
        norms = torch.stack([rows[:, s].norm(dim=1) for s in trained]).norm(dim=0)  # [examples]
        factors = self._privacy.factors(norms)
        for s in trained:
            grad[s] += factors @ rows[:, s]

    def loss(self, losses: Tensor) -> Tensor:
        """The sum of the losses of all supervised tokens, a scalar.

        Args:
            losses: ``[examples]``: means over each example's tokens.
        """
        weights = torch.tensor(self.tokens, dtype=losses.dtype, device=losses.device)
        return losses @ (0 * weights if self._empty else weights)

    def finish(self, grad: Tensor, job: TrainJob, layout: Layout, step: int) -> None:
        """Add the step's noise to the sum, in place, and divide by the expected batch.

        Args:
            grad: ``[size]``, the sum of the step's clipped gradients.
            job: of the client.
            layout: of its row.
            step: counted from 0.
        """
        plan, places = job.plan, []
        for a, bt in layout.factors(grad).values():
            places += [a] if plan.train_a else []
            places += [bt.t()] if plan.train_b else []  # as B [d_out, r] is drawn
        stream = {"seed": job.seed, "round": job.round, "client": job.client.id}
        drawn = self._privacy.noise([p.shape for p in places], step, **stream)
        for place, noise in zip(places, drawn, strict=True):
            place += noise.to(place)
        grad /= plan.batch_size
