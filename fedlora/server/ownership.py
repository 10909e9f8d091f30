"""Which elements of a method's summands a client can move, found by asking the method itself.

Shapes of summands do not depend on the client: one of a small rank adds zeros for the rank indices
that it does not have. A statistic over clients has to know those from the zeros of clients that did
not move. So each method is asked once per rank pattern what a client adds that has moved every
number: what is still zero is no element of that client. No client has a say in it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedlora.algebra.state import State
from fedlora.algebra.summand import Product
from fedlora.core.payload import Payload
from fedlora.core.types import Ranks, Update
from fedlora.server.method import Method


def owned_elements(
    method: Method, state: State, updates: Sequence[Update], starts: Mapping[int, Payload]
) -> list[dict[str, Tensor]]:
    """For each update the names of the summands of which its client owns a part, with the part.

    Args:
        method: one that needs no more than a sum.
        state: the state after the round's messages.
        updates: accepted.
        starts: client id -> its start of the round.

    Returns:
        Name -> booleans of the summand's shape. Left out: names that are owned as a whole, such as
        all products.
    """
    known: dict[Ranks, dict[str, Tensor]] = {}
    found = []
    for update in updates:
        ranks, start = update.client.ranks, starts[update.client.id]
        if update.payload.indices is not None:  # its own choice, in every round anew
            found.append(_owned(method, state, update, start))
            continue
        if ranks not in known:
            known[ranks] = _owned(method, state, update, start)
        found.append(known[ranks])
    return found


def _owned(method: Method, state: State, update: Update, start: Payload) -> dict[str, Tensor]:
    before = dict(start.tensors())
    moved = {name: _moved(t, before.get(name)) for name, t in update.payload.tensors()}
    payload = type(update.payload).from_header(update.payload.header(), moved)
    probe = Update(update.client, payload, update.num_examples, update.metrics)
    added = method.adds(state, start, probe) or {}
    masks = {name: x != 0 for name, x in added.items() if not isinstance(x, Product)}
    return {name: mask for name, mask in masks.items() if not bool(mask.all())}


def _moved(t: Tensor, before: Tensor | None) -> Tensor:
    """A tensor that differs from the start in every element, by amounts that are not all alike."""
    g = torch.Generator().manual_seed(t.numel())
    step = 1 + torch.rand(t.shape, generator=g, dtype=torch.float64)
    if before is None or before.shape != t.shape:
        return step.to(t.dtype)
    return (before.double() + step).to(t.dtype)
