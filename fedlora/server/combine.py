"""Combines a round's accepted updates into the next state, with postprocessors if there are any.

no postprocessors    state ← aggregate(state, updates)
postprocessors       x_k ← each(adds(state, start_k, update_k))
                     state ← absorb(state, whole(Σ_k w_k x_k), Σ_k w_k)
robust rule          state ← absorb(state, whole(R(x_1, ..., x_K)), 1)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedlora.algebra.state import State
from fedlora.algebra.summand import Summands, total
from fedlora.core.errors import RunError
from fedlora.core.payload import Payload
from fedlora.core.types import Client, Update
from fedlora.robust.rule import NO_RULE, Rule, Term
from fedlora.server.method import Method
from fedlora.server.ownership import owned_elements
from fedlora.server.postprocess import Moment, Postprocessor
from fedlora.server.validation import absurd

NUMERICAL = (ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
"""Errors of an average whose numbers are beyond any use, such as an SVD that is not finite."""


@dataclass(frozen=True)
class Combined:
    """The next state, and what is known of how it was made."""

    state: State
    influence: Mapping[int, float]
    """Client id -> its fraction of what was absorbed; of a method that aggregates by itself, the
    one that `Method.reference_weights` gives it."""


def combine(
    method: Method,
    state: State,
    updates: Sequence[Update],
    now: Moment,
    *,
    starts: Mapping[int, Payload],
    postprocessors: Sequence[Postprocessor] = (),
    rule: Rule = NO_RULE,
) -> Combined:
    """The next state.

    Args:
        method: its `aggregate` is called, or its `adds` and `absorb`.
        state: the state after the round's messages.
        updates: accepted, sorted by client id, at least one.
        now: seed and round.
        starts: client id -> its start of the round.
        postprocessors: none: the method aggregates the updates themselves.
        rule: what takes the place of the mean.

    Raises:
        RunError: if there are postprocessors or a rule and the method needs the updates themselves,
            or if there are too few updates for the rule.
    """
    weights = method.reference_weights(updates)
    weight = math.fsum(weights)
    ids = [u.client.id for u in updates]
    shares = {i: w / weight if weight else 0.0 for i, w in zip(ids, weights, strict=True)}
    if not postprocessors and not rule.acts:
        return Combined(method.aggregate(state, updates), shares)
    terms = [added(method, state, starts[u.client.id], u, now, postprocessors) for u in updates]
    if rule.acts:
        try:
            rule.check(len(updates))
        except ValueError as error:
            raise RunError(f"round {now.round}: {error}") from error
        owned = owned_elements(method, state, updates, starts)
        of = [Term(x, u.num_examples, o) for x, u, o in zip(terms, updates, owned, strict=True)]
        centre = rule.centre(of)
        summed, weight = centre.value, 1.0
        shares = dict(zip(ids, centre.influence, strict=True))
    else:
        summed = total(terms, weights)
    return Combined(absorbed(method, state, summed, weight, now, postprocessors), shares)


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
        raise RunError(f"between accepted and averaged: {method.needs_updates}")
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
        summed: ``Σ_k w_k x_k``, or what takes its place.
        weight: ``Σ_k w_k``.
        now: seed and round.
        postprocessors: of the run.
    """
    for p in postprocessors:
        summed = p.whole(summed, weight, now)
    return method.absorb(state, summed, weight)


def zero_summand(method: Method, state: State, client: Client) -> Summands:
    """The summand of a client that did not move: exact zeros of the names and shapes of all.

    Args:
        method: its hooks are called.
        state: the state of the round.
        client: any of the population.

    Raises:
        RunError: if the method needs the updates themselves.
    """
    enlisted = method.enlist(state, client)
    start = method.technique.payload(method.client_start(state, enlisted))
    update = Update(enlisted, start, client.num_examples)
    return added(method, state, start, update, Moment(0, 0), ())


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
