"""One fused forward: whose examples, and how they lie beside one another.

Ragged: all sequences of all clients end to end, ``[1, N]``, not one padded position. Padded: one
sequence per row, ``[S, width]``, padded on the right, for models whose attention is their own.

Either way a client's rows are consecutive. The products with its own factors are small, and a call
for each of many clients costs more than the arithmetic; then they are done for stacks of clients,
in a copy of the rows that gives each client of a stack equally many (`Spread`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.data.batches import (
    PAD,
    Batch,
    TokenExample,
    first_target,
)
from fedlora.engine.fused.bank import Layout
from fedlora.models.layers import threshold
from fedlora.models.ragged import Geometry, indices

SPREAD_LANES = 4
"""Fewer clients are not worth a copy of their rows."""
SPREAD_NUMBERS = 25_000
"""Of a hidden state that a client has on average, above which a call of its own costs less than
copying them: rows times width. An estimate from the time of calls and of copies, not tuned."""

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Lane:
    """One client's forward pass."""

    slot: int
    layout: Layout
    examples: Sequence[TokenExample]
    """At least one, each with at least one token that has a loss."""
    loss: str
    """``full`` or ``response``."""
    tokens: int
    """Supervised tokens of the whole optimizer step, over which its loss is a mean."""
    train_a: bool = True
    train_b: bool = True
    dropped: int = 0
    """`dropped_share` of the dropout rate."""
    seed: int = 0
    """Of its dropout masks."""


@dataclass(frozen=True, eq=False)
class Group:
    """Lanes whose products are batched: one layout and flags, consecutive slots, equal rows."""

    lanes: tuple[Lane, ...]
    rows: int
    """Of all its lanes together, in the copy where there is one."""


@dataclass(frozen=True, eq=False)
class Spread:
    """A copy of the rows in which the lanes of a group have equally many."""

    out: Tensor
    """``[M]`` int64: the row that each row of the copy repeats; a pad repeats its lane's last."""
    back: Tensor
    """``[N]`` int64: where each row is in the copy."""
    pads: Tensor | None
    """``[p]`` int64: rows of the copy that are nobody's."""

    def to(self, device: torch.device) -> "Spread":
        """The same on another device."""
        pads = None if self.pads is None else self.pads.to(device)
        return Spread(self.out.to(device), self.back.to(device), pads)


@dataclass(frozen=True, eq=False)
class FusedBatch:
    """The tensors of one fused forward."""

    batch: Batch
    """``inputs [1, N]`` or ``[S, width]``; positions and targets of the supervised tokens."""
    owners: Tensor
    """``[n]`` int64: the lane of each supervised token."""
    weights: Tensor
    """``[n]``: one over its client's `Lane.tokens`."""
    groups: tuple[Group, ...]
    """In the order of the rows."""
    lanes: tuple[Lane, ...]
    """In the order of the rows; what `owners` counts."""
    geometry: Geometry | None
    """None: padded."""
    spread: Spread | None
    """None: the products with the clients' factors use the rows as they are."""
    source: Tensor | None
    """Which row of the clients' own padded batches a row (of the copy, ``[M]``, where there is one,
    else ``[N]``) is; None: all rows are, in order. Dropout masks are drawn for those batches, as a
    client alone draws them."""
    thresholds: Tensor | None
    """``[M or N, 1]`` int16: sixteen random bits below it drop a number; None: no dropout."""
    drawn: tuple[int, ...]
    """Rows of each lane's own padded batch."""
    tokens: int
    """Real tokens."""

    @property
    def rows(self) -> int:
        """What the frozen layers compute: real tokens and pads."""
        return self.batch.inputs.numel()


def ragged_batch(lanes: Sequence[Lane], hidden: int) -> FusedBatch:
    """Lanes, in the order of their slots, end to end.

    Args:
        lanes: at least one.
        hidden: width of the model, which decides whether rows are worth a copy.
    """
    return _assemble(lanes, hidden, ragged=True)


def padded_batch(lanes: Sequence[Lane], hidden: int) -> FusedBatch:
    """Lanes, in the order of their slots, one sequence per row; arguments as `ragged_batch`."""
    return _assemble(lanes, hidden, ragged=False)


def _width(example: TokenExample) -> int:
    """Input tokens of an example: all but the last."""
    return len(example.input_ids) - 1


def _alike(a: Lane, b: Lane) -> bool:
    """Whether the products of two lanes can be batched, ``b`` following ``a``."""
    flags = [(x.layout, x.train_a, x.train_b, x.dropped) for x in (a, b)]
    return flags[0] == flags[1] and a.slot + 1 == b.slot


def _grouped(lanes: Sequence[Lane], counts: Sequence[int], spread: bool) -> tuple[Group, ...]:
    """Runs of lanes that can be batched: those of equal rows, or all if rows are spread."""
    runs: list[list[int]] = []
    for i, lane in enumerate(lanes):
        last = runs[-1][-1] if runs else -1
        if last >= 0 and _alike(lanes[last], lane) and (spread or counts[last] == counts[i]):
            runs[-1].append(i)
        else:
            runs.append([i])
    return tuple(
        Group(tuple(lanes[i] for i in run), max(counts[i] for i in run) * len(run)) for run in runs
    )


def _spread(groups: Sequence[Group], counts: Ids) -> Spread:
    """The copy in which each lane has as many rows as the largest of its group."""
    room = np.repeat([g.rows // len(g.lanes) for g in groups], [len(g.lanes) for g in groups])
    start, place = np.cumsum(counts) - counts, np.cumsum(room) - room
    within = np.arange(room.sum()) - np.repeat(place, room)
    real = within < np.repeat(counts, room)
    out = np.repeat(start, room) + np.minimum(within, np.repeat(counts, room) - 1)
    back = np.flatnonzero(real)
    return Spread(torch.from_numpy(out), torch.from_numpy(back), indices(np.flatnonzero(~real)))


def _assemble(lanes: Sequence[Lane], hidden: int, ragged: bool) -> FusedBatch:
    examples = [e for lane in lanes for e in lane.examples]
    length = np.array([_width(e) for e in examples])
    sizes = np.array([len(lane.examples) for lane in lanes])
    owner = np.repeat(np.arange(len(lanes)), sizes)
    shape = (1, int(length.sum())) if ragged else (len(examples), int(length.max()))
    starts = np.cumsum(length) - length if ragged else np.arange(len(examples)) * shape[1]
    rows = shape[0] * shape[1]
    counts = np.bincount(owner, length).astype(np.int64) if ragged else sizes * shape[1]
    within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    row = np.repeat(starts, length) + within
    inputs, following, positions = np.full(rows, PAD), np.zeros(rows, int), np.zeros(rows, int)
    inputs[row] = np.concatenate([e.input_ids[:-1] for e in examples])
    following[row] = np.concatenate([e.input_ids[1:] for e in examples])
    positions[row] = within
    first = [
        first_target(e, lanes[k].loss) - 1 for e, k in zip(examples, owner.tolist(), strict=True)
    ]
    supervised = within >= np.repeat(first, length)
    chosen, owners = row[supervised], np.repeat(owner, length)[supervised]
    apart = len(lanes) >= SPREAD_LANES and rows * hidden <= SPREAD_NUMBERS * len(lanes)
    groups = _grouped(lanes, counts.tolist(), apart)
    spread = _spread(groups, counts) if apart else None
    drawn, source = _draws(lanes, length, owner, row, within, rows)
    if spread is not None and source is not None:
        source = source[spread.out]
    elif spread is not None:
        source = spread.out
    return FusedBatch(
        batch=Batch(
            torch.from_numpy(inputs).view(shape),
            torch.from_numpy(chosen),
            torch.from_numpy(following[chosen]),
            torch.from_numpy(positions).view(shape) if ragged else None,
        ),
        owners=torch.from_numpy(owners),
        weights=torch.from_numpy((1 / np.array([lane.tokens for lane in lanes]))[owners]),
        groups=groups,
        lanes=tuple(lanes),
        geometry=Geometry.of(length.tolist()) if ragged else None,
        spread=spread,
        source=source,
        thresholds=_thresholds(groups),
        drawn=drawn,
        tokens=int(length.sum()),
    )


def _thresholds(groups: Sequence[Group]) -> Tensor | None:
    """Of every row. Where everything is dropped the scale is zero (`FusedModel`), not the mask."""
    dropped = [g.lanes[0].dropped % 2**16 for g in groups]
    if not any(dropped):
        return None
    each = np.array([threshold(d) for d in dropped], np.int16)
    return torch.from_numpy(np.repeat(each, [g.rows for g in groups])).view(-1, 1)


def _draws(
    lanes: Sequence[Lane], lengths: Ids, owner: Ids, row: Ids, within: Ids, rows: int
) -> tuple[tuple[int, ...], Tensor | None]:
    """Rows of every lane's own padded batch, and where each row of this one is among them."""
    sequences = np.bincount(owner, minlength=len(lanes))
    widths = np.zeros(len(lanes), np.int64)
    np.maximum.at(widths, owner, lengths)
    drawn = sequences * widths
    if not any(lane.dropped for lane in lanes):
        return tuple(drawn.tolist()), None
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(sequences) - sequences, sequences)
    begin = (np.cumsum(drawn) - drawn)[owner] + nth * widths[owner]
    source = np.zeros(rows, np.int64)
    source[row] = np.repeat(begin, lengths) + within
    in_order = rows == drawn.sum() and bool((source == np.arange(rows)).all())
    return tuple(drawn.tolist()), None if in_order else torch.from_numpy(source)
