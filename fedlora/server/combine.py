"""Combines a round's accepted updates into the next state, with postprocessors if there are any.

no postprocessors    state ← aggregate(state, updates)
postprocessors       x_k ← each(adds(state, start_k, update_k))
                     state ← absorb(state, whole(Σ_k w_k x_k), Σ_k w_k)
"""

import math
from collections.abc import Mapping, Sequence

import torch

from fedlora.algebra.state import State
from fedlora.algebra.summand import Summands, total
from fedlora.core.errors import RunError
from fedlora.core.payload import Payload
from fedlora.core.types import Update
from fedlora.server.method import Method
from fedlora.server.postprocess import Moment, Postprocessor
from fedlora.server.validation import absurd

NUMERICAL = (ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
"""Errors of an average whose numbers are beyond any use, such as an SVD that is not finite."""


def combine(
    method: Method,
    state: State,
    updates: Sequence[Update],
    now: Moment,
    *,
    starts: Mapping[int, Payload],
    postprocessors: Sequence[Postprocessor] = (),
) -> State:
    """The next state.

    Args:
        method: its `aggregate` is called, or its `adds` and `absorb`.
        state: the state after the round's messages.
        updates: accepted, sorted by client id, at least one.
        now: seed and round.
        starts: client id -> its start of the round.
        postprocessors: none: the method aggregates the updates themselves.

    Raises:
        RunError: if there are postprocessors and the method needs the updates themselves.
    """
    if not postprocessors:
        return method.aggregate(state, updates)
    weights = method.reference_weights(updates)
    terms = [added(method, state, starts[u.client.id], u, now, postprocessors) for u in updates]
    return absorbed(method, state, total(terms, weights), math.fsum(weights), now, postprocessors)


def added(
    method: Method,
    state: State,
    start: Payload,
    update: Update,
    now: Moment,
    postprocessors: Sequence[Postprocessor],
) -> Summands:
    """What one client adds, after the postprocessors.

    Raises:
        RunError: if the method needs the updates themselves.
    """
    x = method.adds(state, start, update)
    if x is None:
        raise RunError(f"it is no sum of changes: {method.needs_updates}")
    for p in postprocessors:
        x = p.each(x, update.client, now)
    return x


def absorbed(
    method: Method,
    state: State,
    summed: Summands,
    weight: float,
    now: Moment,
    postprocessors: Sequence[Postprocessor],
) -> State:
    """The state after a sum of what clients add, and after the postprocessors.

    Args:
        method: its `absorb` is called.
        state: from which the round began.
        summed: ``Σ_k w_k x_k``.
        weight: ``Σ_k w_k``.
        now: seed and round.
        postprocessors: of the run.
    """
    for p in postprocessors:
        summed = p.whole(summed, weight, now)
    return method.absorb(state, summed, weight)


def unusable(method: Method, state: State) -> str:
    """Why no client could go on from a state; empty: they can.

    Its tensors and those of the global model must be finite and of a size that weights have.
    """
    wrong = absurd(state.items())
    if wrong:
        return f"the server's {wrong}"
    try:
        payload = method.technique.payload(method.global_update(state))
    except NUMERICAL as error:
        return f"there is no global model: {error}"
    wrong = absurd(payload.tensors())
    return f"the global model's {wrong}" if wrong else ""
