"""Selects which clients run in which fused step.

A client is a chain of forward passes that must run in order. A fused step runs the next forward
pass of some of the clients that are in slots of the adapter bank. A schedule is a pure function of
the work, the policy, the token budget and the number of slots. It decides when a client computes,
not what it computes. The policies are compared in docs/performance.md, which also says how m-LoRA's
scheduling strategies map to them:

=========== ====================== ================
README      code                   here
=========== ====================== ================
Trivial     ``none``, dispatcher   ``fifo_refill``
Optimal-Fit ``optim`` (MinPad)     ``length_match``
Fast-Fit    not published          (``refill``)
=========== ====================== ================

Ye et al., "mLoRA: Fine-Tuning LoRA Adapters via Highly-Efficient Pipeline Parallelism in Multiple
GPUs", arXiv:2312.02515, whose first version is called ASPEN.
"""

import bisect
import heapq
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType

from fedlora.core.checks import at_least


@dataclass(frozen=True)
class Forward:
    """One forward pass of one client (a micro-batch): the unit of scheduling."""

    rows: int
    """Sequences."""
    width: int
    """Tokens of the longest sequence."""
    tokens: int
    """Real tokens, padding excluded."""

    def __post_init__(self) -> None:
        if not (self.rows > 0 and 0 < self.tokens <= self.rows * self.width):
            raise ValueError(f"{self} has no token or more than rows * width")


@dataclass(frozen=True)
class Work:
    """One client's chain of forward passes, in order; never empty."""

    forwards: tuple[Forward, ...]

    def __post_init__(self) -> None:
        if not self.forwards:
            raise ValueError("a client without a forward pass cannot be scheduled")


@dataclass(frozen=True)
class Step:
    """What one fused step does."""

    admitted: tuple[tuple[int, int], ...]
    """``(client, slot)``: to be loaded before this step."""
    active: tuple[tuple[int, int, int], ...]
    """``(client, slot, forward index)``, in the order of slots; never empty."""
    finished: tuple[int, ...]
    """Clients whose last forward pass this is: their slots are free at the next step."""


def cost(forwards: Collection[Forward], padded: bool) -> int:
    """Tokens that a step computes: the real ones, or rows times the largest width if padded.

    Two forward passes of 2 rows of up to 3 tokens and of 1 row of 5 tokens:

    >>> forwards = [Forward(rows=2, width=3, tokens=4), Forward(rows=1, width=5, tokens=5)]
    >>> cost(forwards, padded=False), cost(forwards, padded=True)
    (9, 15)
    """
    if not padded:
        return sum(f.tokens for f in forwards)
    return sum(f.rows for f in forwards) * max((f.width for f in forwards), default=0)


def check_limits(budget: int, slots: int) -> None:
    """Raise a ValueError that names the key, unless both limits are at least 1."""
    at_least("engine.tokens", budget, 1)
    at_least("engine.slots", slots, 1)


# --- selecting who runs --------------------------------------------------------------------------


@dataclass(slots=True)
class Resident:
    """A client in a slot, and its progress."""

    client: int
    slot: int
    work: Work
    forward: Forward
    """The forward pass that it runs next."""
    forwards_left: int

    @property
    def index(self) -> int:
        """The index of the next forward pass in its chain."""
        return len(self.work.forwards) - self.forwards_left


@dataclass(frozen=True)
class Room:
    """The size of one step. A single forward pass that exceeds it runs alone."""

    budget: int
    """Tokens, counted as `cost` does."""
    padded: bool
    least: int
    """Real tokens of the smallest forward pass of all clients: a step with less room is full."""

    def pack(self, line: Sequence[Resident]) -> list[Resident]:
        """The first resident in line, and all others that fit beside those before them."""
        # Running totals of those chosen: sequences, width of the widest, real tokens.
        chosen = [line[0]]
        first = line[0].forward
        rows, width, tokens = first.rows, first.width, first.tokens
        for resident in line[1:]:
            # Stop where not even the smallest forward pass would fit; skip what is too large.
            f = resident.forward
            if self.padded:
                if (rows + 1) * width > self.budget:
                    break
                fits = (rows + f.rows) * max(width, f.width) <= self.budget
            else:
                if tokens + self.least > self.budget:
                    break
                fits = tokens + f.tokens <= self.budget
            if fits:
                chosen.append(resident)
                rows, width, tokens = rows + f.rows, max(width, f.width), tokens + f.tokens
        return chosen


Choose = Callable[[Sequence[Resident], Room], list[Resident]]
"""Selects the residents that run the next step, at least one; they come in order of admission."""


def in_line(residents: Sequence[Resident], room: Room) -> list[Resident]:
    """First come, first served; a resident that does not fit waits, smaller ones may still fit."""
    return room.pack(residents)


def longest_remaining(residents: Sequence[Resident], room: Room) -> list[Resident]:
    """The longest remaining chain first: it determines when the round ends, so it must not wait.

    Chains are compared by their number of forward passes. Among equal chains the lower slots go
    first, so that the selected residents are neighbours, whose products can be stacked
    (`fedlora.engine.fused.batch`).
    """
    line = sorted(residents, key=lambda r: (-r.forwards_left, r.slot))
    return room.pack(line)


def similar_widths(residents: Sequence[Resident], room: Room) -> list[Resident]:
    """Residents of similar width: sorted by width, the best run of neighbours within the budget.

    A run is as long as the budget allows. Its score is its real tokens times their fraction of the
    tokens that the padded layout would compute: it favours full steps with little padding.
    """
    # A window [start, end) over the line: each resident enters at its end, and as many leave at its
    # start as the budget demands. A window of one may exceed the budget.
    line = sorted(residents, key=attrgetter("forward.width"))
    start, rows, tokens = 0, 0, 0
    best, most = (0, 1), 0.0
    for end, resident in enumerate(line, 1):
        width = resident.forward.width
        rows, tokens = rows + resident.forward.rows, tokens + resident.forward.tokens
        while start < end - 1 and (rows * width if room.padded else tokens) > room.budget:
            rows -= line[start].forward.rows
            tokens -= line[start].forward.tokens
            start += 1
        score = tokens * tokens / (rows * width)  # the last to enter is the widest
        if score > most:
            best, most = (start, end), score
    return line[slice(*best)]


# --- policies ------------------------------------------------------------------------------------


def first_come(works: Sequence[Work]) -> list[int]:
    """Clients in the order of ``works``."""
    return list(range(len(works)))


def longest_first(works: Sequence[Work]) -> list[int]:
    """Clients sorted by forward passes, then by tokens, the largest first."""
    size = [(-len(w.forwards), -sum(f.tokens for f in w.forwards)) for w in works]
    return sorted(range(len(works)), key=lambda k: (size[k], k))


@dataclass(frozen=True)
class Policy:
    """Decides how clients get slots, and which residents run."""

    order: Callable[[Sequence[Work]], list[int]]
    """The order in which clients wait for a slot."""
    choose: Choose
    """Which residents run a step."""
    wave: bool = False
    """Whether slots are assigned only when all of them are free."""
    lookahead: int = 0
    """Clients behind the first in line, per slot, that a free slot may go to instead: it goes to
    the client whose mean width is nearest to that of the residents."""


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "refill": Policy(longest_first, longest_remaining),
        "fifo_refill": Policy(first_come, in_line),
        "fifo_wave": Policy(first_come, in_line, wave=True),
        "lpt_wave": Policy(longest_first, longest_remaining, wave=True),
        "length_match": Policy(longest_first, similar_widths, lookahead=3),
    }
)


def policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ValueError: naming the policy and those that exist.
    """
    if name not in POLICIES:
        raise ValueError(f"engine.policy={name!r} must be one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name]


# --- the schedule --------------------------------------------------------------------------------


class Schedule(Iterator[Step]):
    """The steps of a round: every forward pass of every client once, in the client's order.

    The lowest free slot is assigned first, so that occupied slots stay together. A step exceeds the
    budget only if it is a single forward pass.

    Args:
        works: the chains, ``works[k]`` being client k's.
        policy: which clients are admitted and which run.
        budget: tokens of a step, counted as `cost` does.
        slots: how many clients may be resident at a time.
        padded: whether a step computes padding, as `cost` counts it.

    Raises:
        ValueError: if the budget or the number of slots is below 1.
    """

    def __init__(
        self,
        works: Sequence[Work],
        policy: Policy,
        budget: int,
        slots: int,
        padded: bool = False,
    ) -> None:
        check_limits(budget, slots)
        self.works = tuple(works)
        self.padded = padded
        self._policy = policy
        least = min((f.tokens for w in self.works for f in w.forwards), default=1)
        self._room = Room(budget, padded, least)
        self._free = list(range(min(slots, len(self.works))))
        self._residents: list[Resident] = []
        self._waiting = _Waiting(self.works, policy, len(self._free))

    def __next__(self) -> Step:
        # Fill free slots; without a resident all chains are done.
        admitted = tuple(self._admit())
        if not self._residents:
            raise StopIteration

        # Select who runs, in the order of slots: that is the order of rows in the batch.
        active = self._policy.choose(self._residents, self._room)
        active.sort(key=lambda r: r.slot)
        lanes = tuple((r.client, r.slot, r.index) for r in active)

        # Advance their chains; slots of finished clients are free at the next step.
        finished = tuple(r.client for r in active if r.forwards_left == 1)
        for resident in active:
            _advance(resident)
        if finished:
            self._leave(set(finished))
        return Step(admitted, lanes, finished)

    def drop(self, client: int) -> None:
        """Remove a client that failed: its slot becomes free, the rest of its chain does not run.

        It has no effect on a client that has finished or was dropped before.

        Raises:
            ValueError: if there is no such client.
        """
        if not 0 <= client < len(self.works):
            raise ValueError(f"client {client} is not one of the {len(self.works)} in the schedule")
        self._waiting.remove(client)
        self._leave({client})

    def _admit(self) -> Iterator[tuple[int, int]]:
        """Give free slots to waiting clients; ``(client, slot)`` of each."""
        if self._policy.wave and self._residents:
            return
        while self._free:
            client = self._waiting.next(self._residents)
            if client is None:
                return
            work, slot = self.works[client], heapq.heappop(self._free)
            first, count = work.forwards[0], len(work.forwards)
            self._residents.append(Resident(client, slot, work, first, count))
            yield client, slot

    def _leave(self, clients: set[int]) -> None:
        for resident in self._residents:
            if resident.client in clients:
                heapq.heappush(self._free, resident.slot)
        self._residents = [r for r in self._residents if r.client not in clients]


def _advance(resident: Resident) -> None:
    resident.forwards_left -= 1
    if resident.forwards_left:
        resident.forward = resident.work.forwards[resident.index]


class _Waiting:
    """Clients without a slot, in line. The first few are candidates for a slot, sorted by width."""

    def __init__(self, works: Sequence[Work], policy: Policy, slots: int) -> None:
        self._widths = [sum(f.width for f in w.forwards) / len(w.forwards) for w in works]
        self._line = deque(policy.order(works))
        self._room = policy.lookahead * slots + 1
        self._candidates: list[tuple[float, int]] = []
        self._gone: set[int] = set()

    def remove(self, client: int) -> None:
        """Remove a client from the line."""
        self._gone.add(client)

    def next(self, residents: Sequence[Resident]) -> int | None:
        """The next client that gets a free slot; None if none waits."""
        self._refill()
        if not self._candidates:
            return None
        return self._candidates.pop(self._nearest(residents))[1]

    def _refill(self) -> None:
        # Without removed clients, up to `_room` candidates (mean width, client), sorted.
        self._candidates = [c for c in self._candidates if c[1] not in self._gone]
        while self._line and len(self._candidates) < self._room:
            client = self._line.popleft()
            if client not in self._gone:
                bisect.insort(self._candidates, (self._widths[client], client))

    def _nearest(self, residents: Sequence[Resident]) -> int:
        """Index of the candidate nearest in width to the residents' mean; without residents, of the
        widest."""
        last = len(self._candidates) - 1
        if last == 0 or not residents:
            return last
        target = sum(self._widths[r.client] for r in residents) / len(residents)

        # Candidates are sorted by width: the first that is not narrower, or the one before it.
        above = bisect.bisect(self._candidates, (target, -1))
        if not 0 < above <= last:
            return min(above, last)
        gap = self._candidates[above][0] - target
        return above if gap < target - self._candidates[above - 1][0] else above - 1
