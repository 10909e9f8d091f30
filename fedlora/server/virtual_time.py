"""The virtual clock of a run: what its rounds would take on the devices of its clients.

A round is settled before anybody trains (`fedlora.devices.clock`): clients whose results do not
arrive are not trained, and are charged for what they spend until then.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.algebra.state import State
from fedlora.core.errors import RunError
from fedlora.core.payload import Payload
from fedlora.core.types import Client, Failure, TrainJob, Update
from fedlora.devices.clock import AWAY, LATE, Missed, settle
from fedlora.devices.table import Fleet
from fedlora.devices.time import Charge, Cost, Visit, charge
from fedlora.population.sampling import Roster, cohort
from fedlora.robust.rule import NO_RULE, Rule
from fedlora.server.combine import Combined, combine
from fedlora.server.method import Method
from fedlora.server.postprocess import Moment, Postprocessor
from fedlora.server.training_round import TrainingRound

Make = Callable[[Sequence[Client]], TrainingRound]
"""Makes the round of some clients, of whom none has trained yet."""


class Lengths(Protocol):
    """The lengths of the sequences that a client trains on in a job."""

    def __call__(self, job: TrainJob) -> NDArray[np.int64]: ...


@dataclass
class VirtualTime:
    """The clock of synchronous rounds."""

    fleet: Fleet
    cost: Cost
    lengths: Lengths
    over: float = 1.0
    """How many times the clients that a round needs are asked."""
    deadline: float = math.inf
    """Seconds of a round after which the server no longer waits."""
    mixes: ClassVar[bool] = False
    """Whether a state is made of results that began from several states."""
    now: float = field(default=0.0, init=False)
    """Seconds since the run began."""
    _until: float = field(default=0.0, init=False)

    # --- a round ------------------------------------------------------------------------------

    def drawn(self, roster: Roster, seed: int, round: int) -> tuple[float, list[Client]]:
        """When a round begins and which clients it asks: a function of the present time.

        All are drawn from those that are available then. With everyone available and ``over = 1``
        the draw is that of a run without devices.

        Raises:
            RunError: if no client is ever available again.
        """
        begin = self._opening(roster, self.now)
        on = self.fleet.trace.on(roster.trainable, begin)
        count = min(math.ceil(self.over * roster.per_round - 1e-9), len(on))
        return begin, cohort(roster, seed, round, among=on, count=count)

    def open(self, roster: Roster, seed: int, round: int, make: Make) -> TrainingRound:
        """The round that begins now, without the clients whose results will not arrive.

        Args:
            roster: the population.
            seed: of the run.
            round: counted from 1.
            make: makes the round of the clients that are asked.

        Raises:
            RunError: if no client is ever available again.
        """
        begin, clients = self.drawn(roster, seed, round)
        current = make(clients)
        visits = [self.visit(current, job) for job in current.jobs.values()]
        stays = {v.client: self.fleet.trace.stays(v.client, begin) for v in visits}
        found = settle(visits, stays, roster.per_round, self.deadline, begin)
        self._until = begin + found.seconds + self.fleet.server_seconds
        current = without(current, found.missed)
        spent = [charge(v) for v in found.finished] + [m.charge for m in found.missed]
        record = self.record(spent, found.missed)
        seconds = {v.client: {"device_seconds": v.seconds} for v in visits}
        return replace(current, timing={"time/virtual": self._until} | record, about=seconds)

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
        """The next state: that of `fedlora.server.combine`; the same state if no result arrives."""
        if not updates:
            return Combined(state, {})
        return combine(
            method, state, updates, now, starts=starts, postprocessors=postprocessors, rule=rule
        )

    def report(self) -> dict[str, float]:
        """More of the record of a round, once its results are combined."""
        return {}

    def close(self) -> None:
        """Move the clock to the end of the round that was opened last."""
        self.now = self._until

    def visit(self, current: TrainingRound, job: TrainJob) -> Visit:
        """A client's part of the round, whose bytes up are those of a result of the start's form:
        an upper bound where clients send less than they train."""
        account, client = current.account, job.client
        operations = self.cost.work(client.ranks).of(self.lengths(job))
        sent = Update(client, untrained(job.start), client.num_examples)
        return Visit(
            client.id,
            self.fleet.devices[client.id],
            account.starts[client.id],
            account.method.bytes_up(account.state, sent, job.plan, account.wire),
            operations,
        )

    def record(self, spent: Sequence[Charge], missed: Sequence[Missed]) -> dict[str, float]:
        """What the clients of a round have spent together, and how many were missed."""
        kinds = [m.kind for m in missed]
        found: dict[str, float] = {
            "time/compute": math.fsum(c.compute for c in spent),
            "time/transfer": math.fsum(c.transfer for c in spent),
            "device/late": kinds.count(LATE),
            "device/away": kinds.count(AWAY),
        }
        if any(d.watts or d.radio_watts for d in self.fleet.devices):
            found["device/energy"] = math.fsum(c.energy for c in spent)
        return found

    def _opening(self, roster: Roster, now: float) -> float:
        """The first time from now on at which a client can be asked."""
        begin = self.fleet.trace.opens(roster.trainable, now)
        if begin == math.inf:
            raise RunError(
                f"no client that trains is available at {now:,.0f} s of virtual time or later: "
                "devices.trace leaves none"
            )
        return begin

    # --- resuming -----------------------------------------------------------------------------

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain values and tensors for a checkpoint."""
        return {"clock": self.now}, {}

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `saved` gave."""
        self.now = float(values["clock"])


def untrained(start: Payload) -> Payload:
    """What a client would send that has not moved: of the form of what it will send."""
    factors = start.low_rank()
    if factors is None or start.parametrisation(torch.float32, torch.device("cpu")) is not None:
        return start
    return start.trained(factors)


def without(current: TrainingRound, missed: Sequence[Missed]) -> TrainingRound:
    """A round without the clients whose results do not arrive; they are charged and listed.

    Args:
        current: the round of all that were asked.
        missed: these clients.
    """
    out = {m.visit.client: m for m in missed}
    jobs = {i: job for i, job in current.jobs.items() if i not in out}
    absent = {i: Failure(current.jobs[i].client, m.kind, _why(m)) for i, m in sorted(out.items())}
    charged = {i: (m.charge.bytes_down, m.charge.bytes_up) for i, m in out.items()}
    account = replace(current.account, charged=charged)
    return replace(current, jobs=jobs, account=account, absent=absent)


def _why(missed: Missed) -> str:
    needs, after = missed.visit.seconds, missed.after
    if missed.kind == AWAY:
        why = f"it went away {after:,.1f} s after it was asked and needs {needs:,.1f} s"
    else:
        why = f"it needs {needs:,.1f} s, and the server went on after {after:,.1f} s"
    return f"{why} (virtual time {missed.at:,.1f} s)"
