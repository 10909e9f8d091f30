"""From a round's accepted updates to the next state: the place between accepted and averaged."""

from collections.abc import Sequence

from fedlora.algebra.state import State
from fedlora.core.types import Update
from fedlora.server.method import Method


def combine(method: Method, state: State, updates: Sequence[Update], round: int) -> State:
    """The next state, as the method makes it of the updates themselves.

    Args:
        method: whose `aggregate` it is.
        state: after the round's messages.
        updates: accepted, sorted by client id, at least one.
        round: counted from 1.
    """
    return method.aggregate(state, updates)
