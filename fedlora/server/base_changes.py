"""By what ranks a base has moved, round by round, and what a client that missed some is sent.

A server whose clients merge updates into their bases keeps, beside ``seen``
(`fedlora.server.missed`), one tensor:

    sent  [rounds, modules] int64   the rank of each round's change of each adapted weight
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedlora.algebra.state import integers
from fedlora.core.types import Setting

SENT = "sent"


def nothing_sent(setting: Setting) -> Tensor:
    """``sent`` before round 1: ``[0, modules]``."""
    return torch.zeros(0, len(setting.modules), dtype=torch.int64)


def with_round(sent: Tensor, ranks: Iterable[int]) -> Tensor:
    """``sent`` with one more round, whose changes have these ranks, module by module."""
    return torch.cat([sent, integers(ranks)[None]])


def missed_scalars(sent: Tensor, known: int, shapes: Sequence[tuple[int, int]]) -> int:
    """Scalars that bring the weights of a client up to date.

    A change of rank ``ρ`` is sent as factors of ``ρ (m + n)`` scalars. All that a client missed of
    a weight never takes more than the ``m n`` scalars of the sum.

    Args:
        sent: ``[rounds, modules]``.
        known: of how many rounds the client knows the results; negative: not even of where the run
            began.
        shapes: ``(m, n)`` of each module's weight.
    """
    if known < 0:
        return sum(m * n for m, n in shapes)
    ranks = sent[known:].sum(dim=0).tolist()
    return sum(min(r * (m + n), m * n) for r, (m, n) in zip(ranks, shapes, strict=True))
