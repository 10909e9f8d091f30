"""The examples of a client's step, and how they cross a cut: rows of tokens without padding.

A client of a split continues through its epochs across rounds, so its steps are counted from its
first one: step ``t`` is step ``t`` of an unsplit client whose only round is as long
(`fedlora.data.batches.step_indices` with ``round=1``), with the same dropout masks.

The example in this module is a step of two rows of 3 and 2 input tokens. In a padded batch they are
rows of three places, 0-2 and 3-5, and place 5 is padding:

>>> shape = Shape((3, 2))
>>> shape.index().tolist()
[0, 1, 2, 3, 4]
>>> shape.index(width=4).tolist()
[0, 1, 2, 4, 5]
>>> hidden = torch.arange(6.0).view(2, 3, 1)
>>> pack(hidden, shape).flatten().tolist()
[0.0, 1.0, 2.0, 3.0, 4.0]
>>> pad(pack(hidden, shape), shape).flatten().tolist()
[0.0, 1.0, 2.0, 3.0, 4.0, 0.0]
>>> labels = Labels(first=(1, 0), targets=torch.tensor([12, 13, 21, 22]))
>>> labels.positions(shape).tolist()  # a loss from the first row's second token on
[1, 2, 3, 4]
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.core.seeding import dropout_seeds, generator
from fedlora.core.types import LocalPlan
from fedlora.data.batches import (
    Batch,
    TokenExample,
    collate,
    epoch_order,
    real_of,
    targets_of,
)
from fedlora.models.layers import places_of

ROUND = 1
"""A split client's random streams are always those of this round."""


@dataclass(frozen=True)
class Shape:
    """The number of tokens of each row of a step. A stage in the middle needs nothing else."""

    lengths: tuple[int, ...]
    """Input positions of each row."""

    @property
    def width(self) -> int:
        """Width of the padded batch: the longest row."""
        return max(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of all rows together; hidden states cross the cut as ``[tokens, d]``."""
        return sum(self.lengths)

    def check(self, context: int, most: int) -> None:
        """Raise a ValueError unless there are 1 to ``most`` rows and each has 1 to ``context``
        tokens."""
        if len(self.lengths) > most:
            raise ValueError(f"{len(self.lengths)} rows: a step has at most {most} of them")
        if not self.lengths or not 1 <= min(self.lengths) <= max(self.lengths) <= context:
            raise ValueError(
                f"rows of {list(self.lengths)} tokens: the model takes 1..{context} in a row"
            )

    def index(self, width: int = 0) -> Tensor:
        """``[tokens]`` int64: the place of each token in a padded batch ``[b * width]``.

        Args:
            width: of the padded batch; 0: that of the longest row.
        """
        width = width or self.width
        real = real_of(self.lengths, width)
        return torch.arange(self.tokens) if real is None else real

    def places(self, width: int = 0) -> Tensor:
        """``[b * width]`` int64: the number of the token at each place; 0 in padding."""
        return places_of(self.index(width), len(self.lengths) * (width or self.width))


@dataclass(frozen=True)
class Labels:
    """The targets of a loss: the tokens that follow each row's supervised positions."""

    first: tuple[int, ...]
    """First supervised position of each row; later ones have a loss too, but for the gaps."""
    targets: Tensor
    """``[n]`` int64, row by row."""
    gaps: tuple[int, ...] = ()
    """Positions without a loss between answers, ascending: counted over all rows, each from its
    first supervised position on."""

    def positions(self, shape: Shape, width: int = 0) -> Tensor:
        """``[n]`` int64: supervised positions in the padded batch ``[b * width]``."""
        width = width or shape.width
        rows = zip(self.first, shape.lengths, strict=True)
        places = torch.cat(
            [torch.arange(r * width + first, r * width + n) for r, (first, n) in enumerate(rows)]
        )
        if not self.gaps:
            return places
        supervised = torch.ones_like(places, dtype=torch.bool)
        supervised[list(self.gaps)] = False
        return places[supervised]

    def check(self, shape: Shape, vocabulary: int) -> None:
        """Raise a ValueError unless the labels fit the rows and the vocabulary."""
        # Row r has lengths[r] - first[r] labels; all of them but the gaps are the targets.
        counts = [n - f for f, n in zip(self.first, shape.lengths, strict=True)]
        labels, last = sum(counts) - len(self.gaps), -1
        for gap in self.gaps:
            labels, last = labels if last < gap < sum(counts) else -1, gap
        if min(self.first) < 0 or min(counts) < 0 or labels != self.targets.numel():
            raise ValueError(
                f"{self.targets.numel()} labels do not fit rows of {list(shape.lengths)} tokens "
                f"supervised from {list(self.first)} on"
            )
        if (
            self.targets.numel()
            and not 0 <= int(self.targets.min()) <= int(self.targets.max()) < vocabulary
        ):
            raise ValueError(f"a label is not in 0..{vocabulary - 1}")


@dataclass(frozen=True)
class Step:
    """One client's examples of one step."""

    batch: Batch
    shape: Shape
    labels: Labels


def step_of(examples: Sequence[TokenExample], indices: Sequence[int], plan: LocalPlan) -> Step:
    """Examples as a padded batch, with the shape and labels that cross the cut."""
    chosen = [examples[i] for i in indices]
    lengths = tuple(max(0, len(e.input_ids) - 1) for e in chosen)
    batch = collate(chosen, plan.loss)
    places = [targets_of(e, plan.loss) - 1 for e in chosen]
    first = tuple(int(at[0]) if len(at) else n for at, n in zip(places, lengths, strict=True))
    within = zip(places, first, lengths, strict=True)
    has_loss = np.concatenate([np.isin(np.arange(start, n), at) for at, start, n in within])
    gaps = tuple(np.flatnonzero(~has_loss).tolist())
    return Step(batch, Shape(lengths), Labels(first, batch.targets, gaps))


def pack(hidden: Tensor, shape: Shape) -> Tensor:
    """``[b, t, d]`` without its padding, ``[tokens, d]``; differentiable."""
    return hidden.flatten(0, 1).index_select(0, shape.index(hidden.shape[1]).to(hidden.device))


def pad(packed: Tensor, shape: Shape, width: int = 0) -> Tensor:
    """The inverse of `pack`, with zeros for padding, ``[b, width, d]``; differentiable."""
    width = width or shape.width
    rows, d = len(shape.lengths), packed.shape[1]
    flat = packed.new_zeros(rows * width, d)
    return flat.index_copy(0, shape.index(width).to(packed.device), packed).view(rows, width, d)


class Order:
    """The examples of any step of a client: a new permutation per epoch, cut into batches.

    Args:
        n: number of examples.
        plan: batch size, and whether to group by length.
        seed: of the run.
        client: its id.
        lengths: of the examples; may be left out where the plan does not group.
    """

    def __init__(
        self,
        n: int,
        plan: LocalPlan,
        *,
        seed: int,
        client: int,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.n = n
        self._plan, self._lengths = plan, lengths
        self.size = plan.batch_size
        self.per_epoch = math.ceil(n / plan.batch_size)
        self._keys = (seed, client)
        self._restart()

    def _restart(self) -> None:
        seed, client = self._keys
        self._generator = generator(seed, "order", ROUND, client)
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def __getitem__(self, step: int) -> list[int]:
        # Permutations are drawn one after another: for an earlier epoch start again, and draw up to
        # the epoch of this step.
        epoch, at = divmod(step, self.per_epoch)
        if epoch < self._epoch:
            self._restart()
        while self._epoch < epoch:
            drawn = self._generator.permutation(self.n)
            self._permutation = epoch_order(drawn, self._plan, self._lengths)
            self._epoch += 1
        found: list[int] = self._permutation[at * self.size : (at + 1) * self.size].tolist()
        return found


class Seeds:
    """The seed of the dropout masks of any step of a client; kept once drawn."""

    def __init__(self, *, seed: int, client: int) -> None:
        self._stream = dropout_seeds(seed, ROUND, client)
        self._drawn: list[int] = []

    def __getitem__(self, step: int) -> int:
        while len(self._drawn) <= step:
            self._drawn.append(next(self._stream))
        return self._drawn[step]
