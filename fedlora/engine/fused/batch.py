"""One fused forward: whose examples, and how they lie beside one another.

Ragged: all sequences of all clients end to end, ``[1, N]``, not one padded position. Clients of
one layout in consecutive slots may be given equally many rows, so that their small products become
one batched product; the blanks that costs are weighed against the calls it saves. Padded: one
sequence per row, ``[S, width]``, padded on the right, for models whose attention is their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.batches import PAD, Batch, TokenExample, first_target
from fedlora.engine.fused.bank import Layout
from fedlora.models.ragged import Geometry

BLANK_SHARE = 0.06
"""Of a batch's rows that may be blank so that small products can be batched. At d = 128 and rank
15 the calls saved are worth about a tenth of the step of clients of 30 tokens, and less of larger
ones (`simulations.bench.engine`)."""

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
    seeds: Sequence[int] = ()
    """One per module, where there is dropout."""


@dataclass(frozen=True, eq=False)
class Group:
    """Lanes whose products are batched: one layout and flags, consecutive slots, equal rows."""

    lanes: tuple[Lane, ...]
    rows: int
    """Of all its lanes together, blanks included."""


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
    source: Tensor | None
    """``[N]`` int64: which row of the clients' own padded batches a row is; None: all rows are, in
    order. Dropout masks are drawn for those batches, as a client alone draws them."""
    thresholds: Tensor | None
    """``[N, 1]`` int16: sixteen random bits below it drop a number; None: no dropout."""
    drawn: tuple[int, ...]
    """Rows of each lane's own padded batch."""
    tokens: int
    """Real tokens."""

    @property
    def rows(self) -> int:
        """What the frozen layers compute: real tokens, pads and blanks."""
        return self.batch.inputs.numel()


def ragged_batch(lanes: Sequence[Lane], blank_share: float = BLANK_SHARE) -> FusedBatch:
    """Lanes, in the order of their slots, end to end."""
    counts = [sum(_width(e) for e in lane.examples) for lane in lanes]
    groups = _grouped(lanes, counts, blank_share)
    lengths, starts, owner, at, index = [], [], [], 0, 0
    for group in groups:
        each = group.rows // len(group.lanes)
        for lane in group.lanes:
            place = at
            for e in lane.examples:
                lengths.append(_width(e))
                starts.append(place)
                owner.append(index)
                place += lengths[-1]
            at += each
            index += 1
    return _assemble(groups, _Places(lengths, starts, owner), (1, at))


def padded_batch(lanes: Sequence[Lane]) -> FusedBatch:
    """Lanes, in the order of their slots, one sequence per row."""
    width = max(_width(e) for lane in lanes for e in lane.examples)
    counts = [len(lane.examples) * width for lane in lanes]
    lengths = [_width(e) for lane in lanes for e in lane.examples]
    owner = [k for k, lane in enumerate(lanes) for _ in lane.examples]
    starts = [row * width for row in range(len(lengths))]
    groups = _grouped(lanes, counts, 0.0)
    return _assemble(groups, _Places(lengths, starts, owner), (len(lengths), width), ragged=False)


@dataclass(frozen=True)
class _Places:
    """Of every sequence: tokens, first row, lane."""

    lengths: list[int]
    starts: list[int]
    owner: list[int]


def _width(example: TokenExample) -> int:
    """Input tokens of an example: all but the last."""
    return len(example.input_ids) - 1


def _grouped(lanes: Sequence[Lane], counts: Sequence[int], blank_share: float) -> tuple[Group, ...]:
    """Runs of lanes that can be batched, grown while blanks stay within their share."""
    groups: list[Group] = []
    run: list[int] = []

    def close() -> None:
        each = max(counts[i] for i in run)
        groups.append(Group(tuple(lanes[i] for i in run), each * len(run)))
        run.clear()

    longest = total = 0
    for i, (lane, count) in enumerate(zip(lanes, counts, strict=True)):
        if run:
            last = lanes[run[-1]]
            alike = (
                last.layout is lane.layout
                and last.slot + 1 == lane.slot
                and (last.train_a, last.train_b, last.dropped)
                == (lane.train_a, lane.train_b, lane.dropped)
            )
            rows = max(longest, count) * (len(run) + 1)
            if not alike or rows - total - count > blank_share * rows:
                close()
                longest = total = 0
        run.append(i)
        longest, total = max(longest, count), total + count
    close()
    return tuple(groups)


def _assemble(
    groups: tuple[Group, ...], places: _Places, shape: tuple[int, int], ragged: bool = True
) -> FusedBatch:
    lanes = tuple(lane for group in groups for lane in group.lanes)
    examples = [e for lane in lanes for e in lane.examples]
    rows = shape[0] * shape[1]
    lengths, starts = np.array(places.lengths), np.array(places.starts)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    row = np.repeat(starts, lengths) + within
    inputs, following = np.full(rows, PAD, np.int64), np.zeros(rows, np.int64)
    inputs[row] = np.concatenate([e.input_ids[:-1] for e in examples])
    following[row] = np.concatenate([e.input_ids[1:] for e in examples])
    owner = np.array(places.owner)
    first = [
        first_target(e, lanes[k].loss) - 1 for e, k in zip(examples, places.owner, strict=True)
    ]
    supervised = within >= np.repeat(first, lengths)
    chosen = row[supervised]
    owners = np.repeat(owner, lengths)[supervised]
    drawn, source = _draws(lanes, lengths, owner, row, within, rows)
    each = np.repeat([g.rows // len(g.lanes) for g in groups], [len(g.lanes) for g in groups])
    positions = np.zeros(rows, np.int64)
    positions[row] = within
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
        lanes=lanes,
        geometry=Geometry.of(places.starts, places.lengths, rows) if ragged else None,
        source=source,
        thresholds=_thresholds(lanes, each),
        drawn=drawn,
        tokens=int(lengths.sum()),
    )


def _thresholds(lanes: Sequence[Lane], rows: Ids) -> Tensor | None:
    """Of every row. Where everything is dropped the scale is zero (`FusedModel`), not the mask."""
    dropped = np.array([lane.dropped % 2**16 for lane in lanes])
    if not dropped.any():
        return None
    return torch.from_numpy(np.repeat(dropped - 2**15, rows).astype(np.int16)).view(-1, 1)


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
