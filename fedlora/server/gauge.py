r"""Factors of one product, turned back towards the start.

    (B, A)  and  (B G, G⁻¹ A)      the same weights, other factors

Averages, medians and norms of factors depend on the ``G`` that a client chooses. Here it is chosen
for the client: the ``A`` of the same row space that is closest to the start's,

    A ← A⁰ A⁺ A,    B ← B (A⁰ A⁺)⁻¹          A⁺ = Aᵀ (A Aᵀ)⁻¹

``B A`` does not change, and any ``G`` gives the same result. A client that did not turn anything
loses what its ``A`` has moved within its own row space to ``B``, no more: ``A⁰ A⁺`` is then near
the identity. The balanced factors of an SVD do not depend on ``G`` either, but their averages lose
almost everything, for singular vectors of different clients differ
(``python -m simulations.bench.gauge``).
"""

from dataclasses import replace

import torch

from fedlora.core.errors import RejectedUpdate
from fedlora.core.payload import Payload, plain_factors
from fedlora.core.types import Factors, LocalPlan, Update

WORST = 1e4
"""The largest condition number of ``A⁰ A⁺``: beyond it a client's ``A`` has left the start's."""


def turned_back(update: Update, start: Payload, plan: LocalPlan) -> Update:
    """The update with factors closest to the start's. Updates with a frozen factor, or with none,
    have nothing to be turned.

    Args:
        update: accepted.
        start: what its client started from.
        plan: what it did.

    Raises:
        RejectedUpdate: if a client's ``A`` has nothing of the start's left.
    """
    if not (plan.train_a and plan.train_b) or update.payload.head() is not None:
        return update
    sent, before = plain_factors(update.payload), plain_factors(update.payload.aligned(start))
    if sent is None or before is None:
        return update
    try:
        turned = {path: nearest(f, before[path]) for path, f in sent.items()}
    except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise RejectedUpdate(
            update.client.id, f"its factors cannot be turned back towards the start: {error}"
        ) from error
    return replace(update, payload=update.payload.trained(turned))


def nearest(f: Factors, start: Factors) -> Factors:
    """The factors of the same product whose ``A`` is closest to the start's.

    Raises:
        ValueError: if there is hardly anything left of the start's row space.
    """
    a, b, a0 = f.a.double(), f.b.double(), start.a.double()
    turn = torch.linalg.lstsq(a.T, a0.T).solution.T  # A⁰ A⁺, [r, r]
    condition = float(torch.linalg.cond(turn))
    if not condition <= WORST:
        raise ValueError(f"A⁰ A⁺ has condition {condition:.3g}, above {WORST:g}")
    back = torch.linalg.solve(turn.T, b.T).T  # B (A⁰ A⁺)⁻¹
    return Factors((turn @ a).to(f.a.dtype), back.to(f.b.dtype), f.alpha)
