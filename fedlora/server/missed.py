"""What a client lacks of a state: which rounds' results it knows, and the bytes of the rest.

A client begins with all that follows from the run's seed, so it knows the results of no round:
``seen = 0``. A client of round ``t``, counted from 0, has been sent the results of the
rounds before it and keeps them: ``seen = t``, until it takes part again. Its own work of round
``t`` is not that round's result. A client whose update did not arrive, or was rejected, is taken
for one that has missed the round.

A state holds ``seen`` as int64 ``[clients]``, and ``round``, the rounds that are complete.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from fedlora.algebra.init import sample_a
from fedlora.algebra.state import State, integers
from fedlora.core.payload import Payload, plain_factors
from fedlora.core.types import Adapter, TrainJob, Update
from fedlora.wire.codec import WIRE_BYTES

SEEN, ROUND = "seen", "round"
NOTHING = -1
"""``seen`` of clients that cannot have what follows from the seed, for the run began elsewhere."""


def first_seen(clients: int, known: int = 0) -> dict[str, Tensor]:
    """The part of a first state that says what clients know.

    Args:
        clients: of the population.
        known: 0, or `NOTHING`.
    """
    return {SEEN: integers([known] * clients), ROUND: integers(0)}


def seen_by(state: State, client: int) -> int:
    """How many rounds' results a client knows; 0 for one outside the population."""
    seen = state[SEEN]
    return int(seen[client]) if client < len(seen) else 0


def next_seen(state: State, updates: Iterable[Update]) -> dict[str, Tensor]:
    """The same part of the state after a round.

    Args:
        state: from which the round began.
        updates: of the clients that took part; of none, if only a sum is known.
    """
    seen = state[SEEN].clone()
    seen[integers(u.client.id for u in updates if u.client.id < len(seen))] = state[ROUND]
    return {SEEN: seen, ROUND: state[ROUND] + 1}


def missed_sides(state: State, client: int, schedule: str) -> set[str]:
    """The factors that have been averaged since a client took part, if a round averages one.

    Args:
        state: from which the next round begins.
        client: its id.
        schedule: the factors that successive rounds average, again and again: ``b`` or ``ba``.
    """
    done, seen = int(state[ROUND]), seen_by(state, client)
    if seen == NOTHING:
        return set(schedule)
    # As many rounds as there are factors in the schedule average all of them.
    rounds = range(seen, min(done, seen + len(schedule)))
    return {schedule[t % len(schedule)] for t in rounds}


def changed_bytes(start: Payload | Adapter, sides: Iterable[str], wire: str) -> int:
    """The bytes of some factors of a start.

    Args:
        start: factors.
        sides: ``a``, ``b`` or both: those that a client lacks.
        wire: number format.
    """
    assert isinstance(start, Mapping)
    scalars = sum(getattr(f, side).numel() for f in start.values() for side in sides)
    return int(scalars) * WIRE_BYTES[wire]


def seeded_bytes(job: TrainJob, wire: str) -> int:
    """The bytes of a start's frozen factors ``A`` that a client draws itself.

    A factor that the plan does not train and that is, bit for bit, the initial one of the run's
    seed has never changed. Factors that have, by another rule of averaging or a singular value
    decomposition, must be sent.
    """
    factors = None if job.plan.train_a else plain_factors(job.start)
    scalars = sum(
        f.a.numel()
        for path, f in (factors or {}).items()
        if bool((f.a == sample_a(job.seed, path, *f.a.shape)).all())  # of whatever dtype
    )
    return scalars * WIRE_BYTES[wire]
