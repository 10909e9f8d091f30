"""Buffered asynchrony: a state is made of changes that began from earlier ones (FedBuff).

    θ ← absorb(θ, Σ_k w_k ς(τ_k) x_k, Σ_k w_k)          ς(τ) = (1 + τ)^(-a)

``x_k`` is the change of what client ``k`` started from, ``τ_k`` the versions made since then. The
denominator has no ``ς``, so that stale changes count less; ``normalise=staleness`` divides by
``Σ_k w_k ς(τ_k)`` instead. With ``size = 1`` this is FedAsync. Nguyen et al., arXiv:2106.06639,
whose clients all count alike.

A round of the run is the making of one version. The clients that start from a version train in its
round, and their changes are kept until they arrive; they are part of a checkpoint.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from fedlora.algebra.state import State
from fedlora.algebra.summand import Product, Summand, Summands, scaled, total
from fedlora.core.checks import at_least, one_of
from fedlora.core.errors import RunError
from fedlora.core.payload import Payload
from fedlora.core.types import Client, Ranks, Setting, Update
from fedlora.devices.buffer import Buffer, Queue, Version
from fedlora.devices.time import Visit, charge
from fedlora.population.sampling import Roster, cohort
from fedlora.robust.rule import NO_RULE, Rule, Term
from fedlora.run.checkpoint import pack, unpack
from fedlora.server.combine import Combined, absorbed, added, zero_summand
from fedlora.server.method import Method
from fedlora.server.ownership import owned_elements
from fedlora.server.postprocess import Moment, Postprocessor
from fedlora.server.training_round import TrainingRound
from fedlora.server.virtual_time import Make, VirtualTime, without

WEIGHTS, STALENESS = "weights", "staleness"


@dataclass(frozen=True)
class Buffered:
    """The settings of ``federation.mode=buffered``."""

    size: int = 10
    """Results of which a version is made, ``K``."""
    concurrency: int = 80
    """Clients at work at once, ``M``."""
    staleness: float = 0.5
    """``a``; 0: stale changes count in full."""
    max_staleness: int = 100
    """Changes that are older are dropped."""
    normalise: str = WEIGHTS
    """What a sum is divided by: ``weights``, or ``staleness``: weights times ``ς``."""

    def __post_init__(self) -> None:
        at_least("federation.buffer", self.size, 1)
        at_least("federation.staleness", self.staleness, 0)
        at_least("federation.max_staleness", self.max_staleness, 0)
        one_of("federation.normalise", self.normalise, (WEIGHTS, STALENESS))
        if self.concurrency < self.size:
            raise ValueError(
                f"federation.concurrency={self.concurrency} must be at least federation.buffer="
                f"{self.size}: the results of one version come from clients at work at once"
            )

    def discount(self, age: int) -> float:
        """``ς``.

        Args:
            age: ``τ``, versions made since the client started.
        """
        return float((1 + age) ** -self.staleness)


@dataclass(frozen=True)
class Change:
    """A client's change that has not been averaged yet."""

    client: Client
    weight: float
    summands: Summands
    owned: Mapping[str, Tensor] = field(default_factory=dict)
    """Which elements its ranks can move (`fedlora.server.ownership`), for robust rules."""

    def plain(self) -> list[Any]:
        """Tensors and JSON values in lists and mappings."""
        c = self.client
        terms = {k: [x.b, x.a] if isinstance(x, Product) else x for k, x in self.summands.items()}
        own = dict(self.owned)
        return [c.id, dict(c.ranks), c.num_examples, c.tier, self.weight, terms, own]

    @staticmethod
    def of(plain: Sequence[Any]) -> "Change":
        """The inverse of `plain`."""
        number, ranks, examples, tier, weight, terms, own = plain
        found: dict[str, Summand] = {
            k: x if isinstance(x, Tensor) else Product(*x) for k, x in terms.items()
        }
        return Change(Client(number, Ranks(ranks), examples, tier), weight, found, own)


@dataclass
class BufferedTime(VirtualTime):
    """The clock of a buffered run."""

    rule: Buffered = field(default_factory=Buffered)
    mixes: ClassVar[bool] = True
    queue: Queue = field(default_factory=Queue, init=False)
    changes: dict[int, Change] = field(default_factory=dict, init=False)
    """Client id -> its change, which is on its way."""
    _next: Version | None = field(default=None, init=False)
    _after: dict[int, Change] = field(default_factory=dict, init=False)
    _said: dict[str, float] = field(default_factory=dict, init=False)

    @property
    def buffer(self) -> Buffer:
        """The rule of the schedule."""
        return Buffer(self.fleet, self.rule.size, self.rule.concurrency, self.deadline)

    # --- a round ------------------------------------------------------------------------------

    def drawn(self, roster: Roster, seed: int, round: int) -> tuple[float, list[Client]]:
        """The first clients that would start from the present version, and when."""
        on, count = self.buffer.ready(self.queue, roster.trainable)
        draw = self.queue.draws + 1
        found = cohort(roster, seed, draw, among=on, count=count) if count else []
        return self.queue.now, found

    def open(self, roster: Roster, seed: int, round: int, make: Make) -> TrainingRound:
        """The clients that start from the present version and whose results will arrive."""
        parts: list[TrainingRound] = []

        def start(ids: Sequence[int], count: int, draw: int) -> Sequence[Visit]:
            parts.append(make(cohort(roster, seed, draw, among=ids, count=count)))
            return [self.visit(parts[-1], job) for job in parts[-1].jobs.values()]

        found = self._next = self.buffer.advance(self.queue, roster.trainable, start)
        current = without(joined(parts or [make(())]), found.missed)
        spent = [charge(v) for v in found.started] + [m.charge for m in found.missed]
        about = {v.client: {"device_seconds": v.seconds} for v in found.started}
        about |= {m.visit.client: {"device_seconds": m.visit.seconds} for m in found.missed}
        timing = {"time/virtual": found.after.now} | self.record(spent, found.missed)
        return replace(current, timing=timing, about=about)

    def combine(
        self,
        method: Method,
        state: State,
        updates: Sequence[Update],
        now: Moment,
        *,
        starts: Mapping[int, Payload],
        postprocessors: Sequence[Postprocessor] = (),
        rule: Rule = NO_RULE,
    ) -> Combined:
        """The next version: of the changes that arrive, whichever version they began from. A robust
        rule takes the place of their mean, and sees each change times its ``ς``.

        The changes of this round's clients are kept. Nothing is final before `close`.
        """
        assert self._next is not None
        changes = dict(self.changes)
        for update in updates:
            start, client = starts[update.client.id], update.client
            x = added(method, state, start, update, now, postprocessors)
            (own,) = owned_elements(method, state, [update], starts) if rule.acts else ({},)
            weight = method.reference_weights([update])[0]
            changes[client.id] = Change(client, weight, x, own)
        ages = {f.client: self.queue.version - f.version for f in self._next.arrived}
        here = {i: changes.pop(i) for i in sorted(ages) if i in changes}
        fresh = {i: c for i, c in here.items() if ages[i] <= self.rule.max_staleness}
        if fresh:
            names = zero_summand(method, state, next(iter(fresh.values())).client).keys()
            fresh = {i: c for i, c in fresh.items() if c.summands.keys() == names}
        self._after = changes
        self._said = _staleness([ages[i] for i in fresh], len(here) - len(fresh))
        if not fresh:
            return Combined(state, {})
        discounts = [self.rule.discount(ages[i]) for i in fresh]
        if rule.acts:
            summed, weight, shares = _centre(rule, list(fresh.values()), discounts)
        else:
            weights = [c.weight for c in fresh.values()]
            stale = [w * d for w, d in zip(weights, discounts, strict=True)]
            summed = total([c.summands for c in fresh.values()], stale)
            weight = math.fsum(weights if self.rule.normalise == WEIGHTS else stale)
            shares = [w / weight for w in stale]
        after = absorbed(method, state, summed, weight, now, postprocessors)
        return Combined(after, dict(zip(fresh, shares, strict=True)))

    def report(self) -> dict[str, float]:
        """The staleness of the changes of which the version was made."""
        return self._said

    def close(self) -> None:
        """Go on from the version that was made last."""
        assert self._next is not None
        self.queue, self.changes = self._next.after, self._after
        self.now = self.queue.now

    # --- resuming -----------------------------------------------------------------------------

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The queue as plain values, and the changes that are on their way as tensors."""
        changes = [c.plain() for c in self.changes.values()]
        return {"clock": self.now, "queue": self.queue.to_json()}, pack(changes)

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `saved` gave."""
        self.queue = Queue.from_json(values["queue"])
        self.now = self.queue.now
        changes = [Change.of(values) for values in unpack(tensors)]
        self.changes = {c.client.id: c for c in changes}


def joined(parts: Sequence[TrainingRound]) -> TrainingRound:
    """Rounds that begin from one state as one.

    Args:
        parts: at least one, each with other clients.
    """
    jobs = dict(sorted((i, job) for part in parts for i, job in part.jobs.items()))
    starts = {i: n for part in parts for i, n in part.account.starts.items()}
    account = replace(parts[0].account, jobs=jobs, starts=starts)
    return replace(parts[0], jobs=jobs, account=account)


def check_averages(method: Method, setting: Setting) -> None:
    """Refuse a method whose successive rounds average different things.

    Raises:
        ValueError: one sentence that says what to use instead.
    """
    state, client = method.init_state(setting), setting.trained[0]
    zero = zero_summand(method, state, client)
    later = zero_summand(method, method.absorb(state, zero, 1.0), client)
    if zero.keys() != later.keys():
        raise ValueError(
            f"federation.mode=buffered: {method.label} averages one factor in one round and the "
            "other in the next, and a change that arrives later fits neither; use a strategy that "
            "averages the same every round, such as ffa or fedit"
        )


def _centre(
    rule: Rule, changes: Sequence[Change], discounts: Sequence[float]
) -> tuple[Summands, float, Sequence[float]]:
    """What a robust rule makes of changes, the weight with which it is absorbed, and their part.

    Raises:
        RunError: if there are too few changes for the rule.
    """
    try:
        rule.check(len(changes))
    except ValueError as error:
        raise RunError(f"federation.buffer: {error}") from error
    terms = [
        Term(scaled(c.summands, d), c.client.num_examples, dict(c.owned))
        for c, d in zip(changes, discounts, strict=True)
    ]
    centre = rule.centre(terms)
    return centre.value, 1.0, centre.influence


def _staleness(ages: Sequence[int], dropped: int) -> dict[str, float]:
    found: dict[str, float] = {"buffer/results": len(ages), "staleness/dropped": dropped}
    if ages:
        mean, most = math.fsum(ages) / len(ages), max(ages)
        found |= {"staleness/mean": mean, "staleness/max": most}
    return found
