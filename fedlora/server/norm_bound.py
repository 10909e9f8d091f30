r"""A bound on how far one client may move the model, relative to the others of its round.

    n_k > factor · median_j(n_j) · max(1, T_k / median T) · max(1, median r / r_k)   →   left out

``n_k`` is the norm of the change of the effective weights, and, in a second pass of the same rule,
of the numbers that were sent: ``1000 A`` and ``B / 1000`` are the same weights and ruin an average
of factors. ``T`` are the local steps that a client's examples give, ``r`` its smallest rank:

* A step of AdamW moves a parameter by the learning rate at most, and clipped SGD by its gradient's
  bound, so the path grows with ``T``.
* The scale ``alpha / r`` of a small rank is large. With AdamW the change of the weights grows as
  ``1 / sqrt(r)``, with SGD as ``1 / r``.

A client with more steps or a smaller rank than most is given that much more room, and every client
at least ``factor`` medians. What is left for ``factor`` is how unlike clients' texts are.

The median is the upper one of those who moved at all. A minority can therefore neither raise it
above what honest clients send nor push it below. One or two clients have no majority: they are not
compared, and only `fedlora.server.validation.LARGEST` bounds them. Norms of honest rounds are used
by no other round, so a resumed run decides as an unbroken one.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedlora.core.types import Expected, Update
from fedlora.data.batches import num_steps
from fedlora.wire.change import change

COHORT, OFF = "cohort", "off"
FEWEST = 3
"""Clients that moved, below which there is no majority."""


@dataclass(frozen=True)
class Move:
    """How far an update is from its start, and how far its client may have come."""

    update: Update
    weights: float
    """Norm of the change of the effective weights (`Payload.change_norm`)."""
    sent: float
    """Norm of the change of the tensors that were sent."""
    steps: int
    rank: int
    """The smallest of its ranks."""


@dataclass(frozen=True)
class NormBound:
    """What a round's clients were held to."""

    refused: Mapping[int, str]
    """Client id -> why."""
    median: float = 0.0
    """Median change of the effective weights; 0: there was no majority to compare with."""


def move(update: Update, expected: Expected) -> Move:
    """Measure an update that has passed `fedlora.server.validation.check_update`."""
    client, payload = expected.client, update.payload
    start = payload.aligned(expected.start)
    moved = change(dict(payload.tensors()), dict(start.tensors()))
    return Move(
        update,
        payload.change_norm(start),
        float(torch.cat([t.double().reshape(-1) for t in moved.values()]).norm()),
        steps_of(client.num_examples, expected),
        min(client.ranks.values(), default=1),
    )


def steps_of(examples: int, expected: Expected) -> int:
    """The optimizer steps that a client of this many examples takes in a round."""
    plan = expected.plan
    held = min(examples, plan.max_examples) if plan.max_examples else examples
    return max(1, num_steps(held, plan))


def compare(moves: Sequence[Move], factor: float) -> NormBound:
    """Find the updates that moved too far.

    Args:
        moves: of all accepted updates of a round.
        factor: see the module.
    """
    refused = dict[int, str]()
    weights, median = _outliers(moves, factor, lambda m: m.weights, "the change of its weights")
    sent, _ = _outliers(moves, factor, lambda m: m.sent, "the change of what it sent")
    return NormBound(refused | sent | weights, median)


def furthest(moves: Sequence[Move]) -> Move:
    """The update that moved furthest for its steps and rank, by either measure."""
    return max(moves, key=lambda m: max(m.weights, m.sent) * m.rank / m.steps)


def _outliers(
    moves: Sequence[Move], factor: float, norm: Callable[[Move], float], what: str
) -> tuple[dict[int, str], float]:
    there = [m for m in moves if norm(m) > 0]
    if len(there) < FEWEST:
        return {}, 0.0
    median = statistics.median_high(norm(m) for m in there)
    steps = statistics.median_high(m.steps for m in there)
    rank = statistics.median_high(m.rank for m in there)
    refused = {}
    for m in there:
        bound = factor * median * max(1.0, m.steps / steps) * max(1.0, rank / m.rank)
        if not norm(m) <= bound:
            refused[m.update.client.id] = (
                f"{what} has norm {norm(m):.4g}, the median of its round is {median:.4g}; up to "
                f"{bound:.4g} are averaged (federation.norm_bound={COHORT}, norm_factor={factor:g})"
            )
    return refused, median
