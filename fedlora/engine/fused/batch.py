"""Assembles one fused forward pass: which examples it holds and which rows they occupy.

Two layouts. Ragged: all sequences of all clients end to end, ``[1, N]``, without padding. Padded:
one sequence per row, ``[S, width]``, padded on the right, for models whose attention cannot be
replaced.

In both layouts the rows of one client are consecutive. The products with a client's own factors are
small: with many clients, one call per client costs more than the arithmetic. Such products are
computed for stacks of clients, on a copy of the rows in which every client of a stack has equally
many rows (`Spread`).

The examples in this module follow two clients (`Lane`) through the assembly, ``K = 2`` lanes with
``S = 3`` sequences of ``T = 9`` input tokens. A sequence's last token is a target only. Client 0
has a loss on responses, client 1 on all tokens:

>>> from types import SimpleNamespace
>>> from fedlora.engine.fused.bank import Layout
>>> def sequence(*ids, prompt=1):
...     kept = {"prompt_tokens": prompt, "responses": None, "states": None}
...     return SimpleNamespace(input_ids=np.array(ids), **kept)
>>> layout = Layout(paths=(), parts=(), a_size=0, size=0)
>>> client_0 = [sequence(11, 12, 13, 14, prompt=2), sequence(21, 22)]
>>> client_1 = [sequence(31, 32, 33, 34, 35, 36)]
>>> lanes = [
...     Lane(0, layout, client_0, "response", tokens=3, dropped=2**14, seed=7),
...     Lane(1, layout, client_1, "full", tokens=5, dropped=2**14, seed=8),
... ]
>>> ragged, padded = ragged_batch(lanes, hidden=16), padded_batch(lanes, hidden=16)
>>> ragged.batch.inputs.tolist()
[[11, 12, 13, 21, 31, 32, 33, 34, 35]]
>>> ragged.batch.position_ids.tolist()
[[0, 1, 2, 0, 0, 1, 2, 3, 4]]
>>> padded.batch.inputs.tolist()
[[11, 12, 13, 0, 0], [21, 0, 0, 0, 0], [31, 32, 33, 34, 35]]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.data.batches import PAD, Batch, TokenExample, states_of, targets_of
from fedlora.engine.fused.lanes import Group, Lane, Shares, Spread
from fedlora.models.layers import threshold
from fedlora.models.ragged import Geometry, indices

SPREAD_LANES = 4
"""Rows are copied only where at least so many clients share a forward pass."""
SPREAD_SCALARS = 25_000
"""Rows are copied only where a client has at most so many scalars of a hidden state on average
(rows times width); above, one call per client is cheaper than the copy. An estimate from the
measured time of calls and copies, not tuned."""

Ids = NDArray[np.int64]
Collate: TypeAlias = Callable[[Sequence[TokenExample]], Batch]


@dataclass(frozen=True, eq=False)
class FusedBatch:
    """The tensors of one fused forward pass.

    ``K`` lanes, ``N`` rows (pads of the padded layout included), ``n`` supervised tokens, or labels
    of a classifier: one a sequence.
    """

    batch: Batch
    """``inputs [1, N]`` or ``[S, width]``, and where there is a loss."""
    owners: Tensor
    """``[n]`` int64: the lane of each supervised token."""
    weights: Tensor
    """``[n]``: one divided by `Lane.tokens` of the token's lane."""
    lanes: tuple[Lane, ...]
    """Lanes in the order of the rows; `owners` counts them."""
    geometry: Geometry | None
    """None: padded."""
    all: Shares
    """The clients' shares of all ``N`` rows."""
    pooled: Shares | None
    """Their shares of the rows that a classifier's head reads, one a sequence; None: no layer is
    given these alone (`fedlora.models.last_block`)."""
    drawn: tuple[int, ...]
    """``K`` counts: tokens of each lane, for which masks are drawn."""
    tokens: int
    """Real tokens."""

    @property
    def rows(self) -> int:
        """``N``: rows that the frozen layers compute, real tokens and pads."""
        return self.batch.inputs.numel()


def ragged_batch(
    lanes: Sequence[Lane], hidden: int, labelled: Collate | None = None, pooled: bool = False
) -> FusedBatch:
    """All sequences end to end.

    Args:
        lanes: at least one, in the order of their slots.
        hidden: width of the model; decides whether the rows are worth a copy.
        labelled: how a classifier collates them in this layout; None: of a language model.
        pooled: whether some layers are given the rows alone that the classifier's head reads.
    """
    return _assemble(lanes, hidden, True, labelled, pooled)


def padded_batch(lanes: Sequence[Lane], hidden: int, labelled: Collate | None = None) -> FusedBatch:
    """One sequence per row; arguments as for `ragged_batch`."""
    return _assemble(lanes, hidden, False, labelled, False)


def _assemble(
    lanes: Sequence[Lane], hidden: int, ragged: bool, labelled: Collate | None, pooled: bool
) -> FusedBatch:
    # Where every token goes.
    held = _sequences(lanes, unread=1 if labelled is None else 0)
    rows = _ragged_rows(held) if ragged else _padded_rows(held)

    # What the network computes on, and where it has a loss.
    if labelled is None:
        batch, owners = _next_tokens(lanes, held, rows, ragged)
    else:
        batch, owners = labelled(held.examples), held.lane
    weights = (1 / np.array([lane.tokens for lane in lanes]))[owners]  # [n]

    # Masks are drawn for tokens: the number of every row's among them.
    drawn = np.bincount(held.lane, held.length).astype(np.int64)  # [K]
    own = _token_numbers(rows) if any(lane.dropped for lane in lanes) else None
    read = own if own is None or not pooled else own.index_select(0, batch.positions)

    return FusedBatch(
        batch=batch,
        owners=torch.from_numpy(owners),
        weights=torch.from_numpy(weights),
        lanes=tuple(lanes),
        geometry=Geometry.of(held.length.tolist()) if ragged else None,
        all=_shares(lanes, rows.per_lane, hidden, own, drawn.sum()),
        pooled=_shares(lanes, held.per_lane, hidden, read, drawn.sum()) if pooled else None,
        drawn=tuple(drawn.tolist()),
        tokens=int(held.length.sum()),
    )


def _next_tokens(
    lanes: Sequence[Lane], held: "_Sequences", rows: "_Rows", ragged: bool
) -> tuple[Batch, Ids]:
    """The batch of a language model, and the lane of each of its targets ``[n]``."""
    inputs = _fill(rows, np.concatenate([e.input_ids[:-1] for e in held.examples]), PAD)
    following = _fill(rows, np.concatenate([e.input_ids[1:] for e in held.examples]), 0)
    positions = _fill(rows, held.within, 0) if ragged else None
    supervised, owners = _find_supervised(lanes, held, rows)
    batch = Batch(
        torch.from_numpy(inputs).view(rows.shape),
        torch.from_numpy(supervised),
        torch.from_numpy(following[supervised]),
        None if positions is None else torch.from_numpy(positions).view(rows.shape),
        states=_states(held, rows),
    )
    return batch, owners


# --- counting in runs ----------------------------------------------------------------------------


def _starts(counts: Ids) -> Ids:
    """Where each run begins, of runs of ``counts [n]`` items one after another: ``[n]``.

    >>> _starts(np.array([3, 1, 5])).tolist()
    [0, 3, 4]
    """
    starts: Ids = np.cumsum(counts) - counts
    return starts


def _within(counts: Ids) -> Ids:
    """The place of every item in its own run, ``[sum(counts)]``.

    >>> _within(np.array([3, 1, 5])).tolist()
    [0, 1, 2, 0, 0, 1, 2, 3, 4]
    """
    within: Ids = np.arange(counts.sum()) - np.repeat(_starts(counts), counts)
    return within


# --- which row each token has --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Sequences:
    """``S`` sequences of ``K`` lanes, ``T`` input tokens together."""

    examples: list[TokenExample]
    """``S``, lane after lane."""
    lane: Ids
    """``[S]``: the lane of each sequence."""
    length: Ids
    """``[S]``: input tokens of each sequence."""
    within: Ids
    """``[T]``: the place of every token in its sequence."""
    per_lane: Ids
    """``[K]``: sequences of each lane."""


def _sequences(lanes: Sequence[Lane], unread: int = 1) -> _Sequences:
    """All sequences, lane after lane; their last ``unread`` tokens are targets only.

    >>> held = _sequences(lanes)
    >>> held.lane.tolist(), held.length.tolist(), held.per_lane.tolist()
    ([0, 0, 1], [3, 1, 5], [2, 1])
    """
    examples = [e for lane in lanes for e in lane.examples]
    per_lane = np.array([len(lane.examples) for lane in lanes])  # [K]
    length = np.array([len(e.input_ids) - unread for e in examples])  # [S]
    lane = np.repeat(np.arange(len(lanes)), per_lane)  # [S]
    return _Sequences(examples, lane, length, _within(length), per_lane)


@dataclass(frozen=True, eq=False)
class _Rows:
    """``N`` rows, in the order in which the frozen layers compute them."""

    shape: tuple[int, int]
    """The shape of the network's input; ``N`` is its product."""
    of_token: Ids
    """``[T]``: the row of every token. The other rows are pads."""
    per_lane: Ids
    """``[K]``: consecutive rows of each lane, pads included."""

    @property
    def total(self) -> int:
        """``N``."""
        return self.shape[0] * self.shape[1]


def _ragged_rows(held: _Sequences) -> _Rows:
    """Token after token: no pads.

    >>> rows = _ragged_rows(_sequences(lanes))
    >>> rows.shape, rows.of_token.tolist(), rows.per_lane.tolist()
    ((1, 9), [0, 1, 2, 3, 4, 5, 6, 7, 8], [4, 5])
    """
    total = int(held.length.sum())
    per_lane = np.bincount(held.lane, held.length).astype(np.int64)  # [K]
    return _Rows((1, total), np.arange(total), per_lane)


def _padded_rows(held: _Sequences) -> _Rows:
    """As many rows per sequence as the longest has tokens.

    >>> rows = _padded_rows(_sequences(lanes))
    >>> rows.shape, rows.of_token.tolist(), rows.per_lane.tolist()
    ((3, 5), [0, 1, 2, 5, 10, 11, 12, 13, 14], [10, 5])
    """
    width = int(held.length.max())
    first = np.arange(len(held.length)) * width  # [S]: row of each sequence's first token
    of_token = np.repeat(first, held.length) + held.within  # [T]
    return _Rows((len(held.length), width), of_token, held.per_lane * width)


def _fill(rows: _Rows, values: NDArray[np.integer], pad: int) -> Ids:
    """``values [T]`` of the tokens as rows ``[N]``, with ``pad`` elsewhere.

    >>> _fill(_padded_rows(_sequences(lanes)), np.arange(1, 10), pad=0).tolist()
    [1, 2, 3, 0, 0, 4, 0, 0, 0, 0, 5, 6, 7, 8, 9]
    """
    full = np.full(rows.total, pad, np.int64)
    full[rows.of_token] = values
    return full


def _states(held: _Sequences, rows: _Rows) -> Tensor | None:
    """What enters the first adapted block at every row, ``[*shape, d]``, zero at pads; None unless
    all sequences have it (`Example.states`)."""
    found = states_of(held.examples)
    if found is None:
        return None
    tokens = torch.cat(found)  # [T, d]
    if len(tokens) < rows.total:
        tokens = tokens.new_zeros(rows.total, tokens.shape[1]).index_copy_(
            0, torch.from_numpy(rows.of_token), tokens
        )
    return tokens.view(*rows.shape, -1)


def _find_supervised(lanes: Sequence[Lane], held: _Sequences, rows: _Rows) -> tuple[Ids, Ids]:
    """Row and lane of every token with a loss, ``[n]`` each.

    Input token ``t`` predicts token ``t + 1``, so the first supervised one is the token in front of
    the first target: 12 for the answer 13 14 of client 0's first sequence.

    >>> held = _sequences(lanes)
    >>> for values in _find_supervised(lanes, held, _ragged_rows(held)):
    ...     print(values.tolist())
    [1, 2, 3, 4, 5, 6, 7, 8]
    [0, 0, 0, 1, 1, 1, 1, 1]
    """
    losses = [lanes[k].loss for k in held.lane.tolist()]
    pairs = zip(held.examples, losses, strict=True)
    within = [targets_of(e, loss) - 1 for e, loss in pairs]  # [S] of places in their sequence
    counts = np.array([len(places) for places in within])  # [S]
    chosen = np.concatenate(within) + np.repeat(_starts(held.length), counts)  # [n]
    return rows.of_token[chosen], np.repeat(held.lane, counts)


# --- stacks of lanes -----------------------------------------------------------------------------


def _shares(
    lanes: Sequence[Lane], counts: Ids, hidden: int, own: Tensor | None, drawn: int
) -> Shares:
    """Which lanes are multiplied in one stack, and the copy of the rows which that may need.

    Args:
        lanes: ``K``.
        counts: ``[K]`` rows of each.
        hidden: width of the model.
        own: ``[N]``: the number of each row's token; None: no dropout.
        drawn: tokens of all lanes.

    >>> shares = _shares(lanes, np.array([2, 1]), 16, own=torch.tensor([0, 3, 6]), drawn=11)
    >>> [g.rows for g in shares.groups], shares.source.tolist()
    ([2, 1], [0, 3, 6])
    """
    copied = _worth_a_copy(len(lanes), int(counts.sum()), hidden)
    groups = _group(lanes, counts.tolist(), copied)
    spread = _spread(groups, counts) if copied else None
    source = own if own is None or spread is None else own[spread.out]
    if source is not None and torch.equal(source, torch.arange(drawn)):
        source = None
    return Shares(groups, spread, source, _thresholds(groups))


def _worth_a_copy(lanes: int, rows: int, hidden: int) -> bool:
    """Whether stacks of clients on a copy of the rows are cheaper than one call per client."""
    return lanes >= SPREAD_LANES and rows * hidden <= SPREAD_SCALARS * lanes


def _stackable(a: Lane, b: Lane) -> bool:
    """Whether lane ``b`` may follow lane ``a`` in a stack."""
    flags = [(x.layout, x.train_a, x.train_b, x.dropped) for x in (a, b)]
    return flags[0] == flags[1] and a.slot + 1 == b.slot


def _group(lanes: Sequence[Lane], counts: Sequence[int], copied: bool) -> tuple[Group, ...]:
    """Runs of stackable lanes; without a copy they must have equally many rows.

    Args:
        lanes: ``K``.
        counts: rows of each.
        copied: whether every lane of a group is given the rows of its largest.

    >>> [g.rows for g in _group(lanes, [4, 5], copied=False)]
    [4, 5]
    >>> [g.rows for g in _group(lanes, [4, 5], copied=True)]
    [10]
    """
    runs: list[list[int]] = []
    for i, lane in enumerate(lanes):
        last = runs[-1][-1] if runs else -1
        if last >= 0 and _stackable(lanes[last], lane) and (copied or counts[last] == counts[i]):
            runs[-1].append(i)
        else:
            runs.append([i])
    return tuple(
        Group(tuple(lanes[i] for i in run), max(counts[i] for i in run) * len(run)) for run in runs
    )


def _spread(groups: Sequence[Group], counts: Ids) -> Spread:
    """The copy in which each lane has as many rows as the largest lane of its group.

    Args:
        groups: ``K`` lanes, ``M`` rows together.
        counts: ``[K]`` rows of each lane, ``N`` together.

    >>> spread = _spread(_group(lanes, [4, 5], copied=True), np.array([4, 5]))
    >>> spread.out.tolist()
    [0, 1, 2, 3, 3, 4, 5, 6, 7, 8]
    >>> spread.back.tolist(), spread.pads.tolist()
    ([0, 1, 2, 3, 5, 6, 7, 8, 9], [4])
    """
    # Rows that each lane has in the copy, [K].
    room = np.repeat([g.rows // len(g.lanes) for g in groups], [len(g.lanes) for g in groups])

    # Of every row of the copy, [M]: its place in its lane, how many rows that lane really has.
    within, real = _within(room), np.repeat(counts, room)

    # It repeats the row at that place, or its lane's last one if the lane has no such row.
    out = np.repeat(_starts(counts), room) + np.minimum(within, real - 1)  # [M]
    back, pads = np.flatnonzero(within < real), np.flatnonzero(within >= real)  # [N], [M - N]
    return Spread(torch.from_numpy(out), torch.from_numpy(back), indices(pads))


# --- dropout -------------------------------------------------------------------------------------


def _thresholds(groups: Sequence[Group]) -> Tensor | None:
    """``[M or N, 1]`` int16; None without dropout.

    At a rate of 1 the scale of the product is zero (`FusedModel`), and no mask is needed.

    >>> thresholds = _thresholds(_group(lanes, [4, 5], copied=False))
    >>> thresholds.shape, thresholds.unique().tolist()  # 2^14 - 2^15
    (torch.Size([9, 1]), [-16384])
    """
    dropped = [g.lanes[0].dropped % 2**16 for g in groups]
    if not any(dropped):
        return None
    each = np.array([threshold(d) for d in dropped], np.int16)
    return torch.from_numpy(np.repeat(each, [g.rows for g in groups])).view(-1, 1)


def _token_numbers(rows: _Rows) -> Tensor:
    """``[N]``: the number of every row's token, of all lanes' tokens in their order.

    A pad is no token; its mask does not matter, so it is given token 0's.

    >>> _token_numbers(_padded_rows(_sequences(lanes))).tolist()
    [0, 1, 2, 0, 0, 3, 0, 0, 0, 0, 4, 5, 6, 7, 8]
    """
    return torch.from_numpy(_fill(rows, np.arange(len(rows.of_token)), 0))
