r"""A round's secure sum as the server plans it, and its simulation.

    x_k ← each(adds(state, start_k, update_k)),   e_k = codes of w_k x_k,   w_k = n_k / max_j n_j
    state ← absorb(state, whole(decode(Σ_k e_k mod 2^b)), Σ_k w_k)

Weights are those of the cohort as it was asked, so that a client knows its own before anybody is
lost. Under privacy they are 1, clients shorten what they add (`fedlora.secagg.limit`), and the
server adds noise to the sum, whose denominator does not depend on who is in it. The simulation
rounds, loses clients, sums and counts bytes as the protocol does, without masks. Masks cancel
exactly, so it gives the same state.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from torch import Tensor

from fedlora.algebra.state import State
from fedlora.algebra.summand import Summands
from fedlora.core.errors import RunError
from fedlora.core.payload import Payload
from fedlora.core.types import Client, Failure, TrainJob, Update
from fedlora.secagg.config import VECTOR, SecAgg
from fedlora.secagg.cost import Traffic, summed, traffic
from fedlora.secagg.fixed import Codes
from fedlora.secagg.form import Form
from fedlora.secagg.graph import Graph, graph_of
from fedlora.secagg.limit import Limit
from fedlora.secagg.stages import Stages, simulated_stages
from fedlora.secagg.summed import Summed
from fedlora.server.combine import NUMERICAL, Combined, absorbed, added, unusable
from fedlora.server.method import Method
from fedlora.server.postprocess import Moment, Postprocessor
from fedlora.server.schedule import Rounds
from fedlora.server.training_round import Replies, TrainingRound, enough

LOST = "Lost"
"""The kind of a failure of a client that did not get into the sum."""


@dataclass(frozen=True)
class SumPlan:
    """What is fixed of a round's secure sum before anybody trains."""

    config: SecAgg
    method: Method
    state: State
    """From which the round began."""
    jobs: Mapping[int, TrainJob]
    """By client id: those of the clients that are asked."""
    postprocessors: Sequence[Postprocessor]
    now: Moment
    form: Form
    template: Summands
    """A summand of the round: its names, shapes and types are those of all."""
    weights: Mapping[int, float]
    """By client id; the largest is 1."""
    needed: int
    """``t``."""
    least: int
    """Clients that the round needs in its sum (`fedlora.server.training_round.fewest`)."""
    safe: str
    """What of the run is on disk, for messages."""
    job_bytes: Mapping[int, int]
    """Client id -> bytes of its start and of the state that its summand is made with."""
    aborted: Callable[[], None] = lambda: None
    """Told of a round that ends without a sum."""

    @classmethod
    def open(
        cls,
        config: SecAgg,
        method: Method,
        state: State,
        jobs: Sequence[TrainJob],
        postprocessors: Sequence[Postprocessor],
        ranks: Mapping[str, int],
        starts: Mapping[int, int],
        safe: str,
        least: int = 1,
        limit: Limit | None = None,
        aborted: Callable[[], None] = lambda: None,
    ) -> "SumPlan":
        """The plan of a round.

        Args:
            config: of the run.
            method: of the run; it needs no more than a sum.
            state: at the start of the round.
            jobs: of the clients that are asked, at least one.
            postprocessors: of the run.
            ranks: the largest rank of any client, by module path.
            starts: client id -> bytes of its start.
            safe: what of the run is on disk, for messages.
            least: clients that the round needs in its sum.
            limit: of privacy: weights are 1 and summands bounded; None: there is none.
            aborted: told of a round that ends without a sum.

        Raises:
            RunError: if the method needs the updates themselves, or the clients are too many or
                the numbers too coarse for a sum.
        """
        now = Moment(jobs[0].seed, jobs[0].round)
        still = [Update(j.client, untrained(j), j.client.num_examples) for j in jobs]
        template = added(method, state, jobs[0].start, still[0], now, ())
        weights = [1.0] * len(jobs) if limit else method.reference_weights(still)
        most = max(weights)
        own = sum(t.numel() * t.element_size() for t in method.adds_state(state).values())
        try:
            config.check_most(len(jobs))
            form = Form.of(config, template, ranks, now.seed, now.round, limit)
        except ValueError as error:
            aborted()
            raise RunError(f"round {now.round}: {error}. {safe}") from error
        return cls(
            config=config,
            method=method,
            state=state,
            jobs={j.client.id: j for j in jobs},
            postprocessors=postprocessors,
            now=now,
            form=form,
            template=template,
            weights={j.client.id: w / most for j, w in zip(jobs, weights, strict=True)},
            needed=config.shares_needed(len(jobs)),
            least=least,
            safe=safe,
            job_bytes={j.client.id: starts[j.client.id] + own for j in jobs},
            aborted=aborted,
        )

    @property
    def exchanges(self) -> int:
        """Instances of the protocol."""
        return self.form.sketch.exchanges

    def graph(self, clients: Collection[int], exchange: int) -> Graph:
        """Who shares secrets with whom, of those that sent keys."""
        seed, round = self.now.seed, self.now.round
        return graph_of(sorted(clients), self.config.degree, seed, round, exchange)

    def hidden(self, stages: Stages, exchange: int) -> str:
        """Why the sum of an exchange must stay masked; empty: it may be unmasked.

        A round that fails after its sum is known is repeated with other survivors, and the
        difference of the two sums is what the others sent. So is the difference between the two
        sums of a sketch of products, if fewer clients are in the second.
        """
        if len(stages.vector) < self.least:
            return (
                f"{len(stages.vector)} of {len(self.jobs)} clients are left after stage {VECTOR}, "
                f"and federation.min_success and federation.min_clients need {self.least}"
            )
        if exchange and (gone := sorted(stages.asked - stages.vector)):
            return (
                f"client {gone[0]} was lost between the two sums of secagg.sketch=two, and both "
                "together would show what it sent; secagg.sketch=one goes on without lost clients"
            )
        return ""

    def end(self, why: str) -> NoReturn:
        """End the round without its sum.

        Raises:
            RunError: always.
        """
        self.aborted()
        raise RunError(f"round {self.now.round}: {why}. {self.safe}")

    def lost(self, client: int, exchange: int, stage: str) -> bool:
        """Whether a client is lost in a stage on purpose."""
        return self.config.lost(self.now.seed, self.now.round, client, exchange, stage)

    def failure(self, client: int, stage: str) -> Failure:
        """The failure of a client that was lost."""
        return failure(self.jobs[client].client, stage)


def failure(client: Client, stage: str) -> Failure:
    """The failure of a client that was lost in a stage."""
    return Failure(client, LOST, f"it was lost in stage {stage}")


@dataclass
class Tally:
    """The sum of a round as its exchanges go on."""

    plan: SumPlan

    def __post_init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.lost: dict[int, str] = {}
        self.parts: list[tuple[Stages, Graph, int, int]] = []
        self.cut = 0
        self.short: float | None = None

    @property
    def bases(self) -> Mapping[str, Tensor]:
        """What a second exchange begins with."""
        return self.plan.form.sketch.bases(self.sums) if self.parts else {}

    @property
    def members(self) -> list[int]:
        """The clients that are asked in the next exchange: those in the last sum."""
        return sorted(self.parts[-1][0].vector if self.parts else self.plan.jobs)

    def add(self, stages: Stages, graph: Graph, codes: Codes, cut: int) -> None:
        """Take in the sum of an exchange.

        Args:
            stages: of it.
            graph: over those that sent keys.
            codes: ``Σ e`` over those that sent vectors.
            cut: their numbers that were beyond ``±ρ``.
        """
        plan, exchange, bases = self.plan, len(self.parts), self.bases
        layout = plan.form.layout(plan.template, exchange, bases)
        clients = len(stages.vector)
        self.sums |= plan.form.decoded(codes, layout, clients)
        self.short = plan.form.short(codes, clients)
        self.cut += cut
        for i in stages.asked - stages.vector:
            self.lost.setdefault(i, stages.lost_in(i))
        sent = sum(8 * t.numel() for t in bases.values())
        self.parts.append((stages, graph, codes.nbytes, sent))

    def summed(self, seconds: Mapping[str, float] | None = None) -> Summed:
        """The result, after the last exchange."""
        plan, inside = self.plan, self.parts[-1][0].vector
        found: dict[int, Traffic] = {}
        for i in plan.jobs:
            parts = [
                traffic(
                    stages,
                    graph,
                    i,
                    vector=size,
                    job=0 if n else plan.job_bytes[i],
                    bases=bases,
                )
                for n, (stages, graph, size, bases) in enumerate(self.parts)
            ]
            found[i] = summed(parts)
        width = plan.form.fixed.dtype.itemsize
        return Summed(
            total=plan.form.summed(self.sums, plan.template),
            weights={i: plan.weights[i] for i in sorted(inside)},
            lost=self.lost,
            traffic=found,
            numbers=sum(size for _, _, size, _ in self.parts) // width,
            cut=self.cut,
            short=self.short,
            seconds=seconds or {},
        )


def untrained(job: TrainJob) -> Payload:
    """What a client would send that has not moved."""
    start, due = job.start, job.plan.technique.sends(job.start)
    factors = start.low_rank()
    if factors is None or (type(start) is due and start.base() is None):
        return start
    still = start.trained(factors)
    return still if type(still) is due else start


def simulate(plan: SumPlan, updates: Sequence[Update]) -> Summed:
    """The sum of a round as the protocol would give it.

    Args:
        plan: of the round.
        updates: accepted, sorted by client id.

    Raises:
        RunError: if too many clients are lost.
    """
    of = {u.client.id: u for u in updates}

    def term(i: int) -> Summands:  # of one client at a time: all of them may not fit into memory
        start = plan.jobs[i].start
        return added(plan.method, plan.state, start, of[i], plan.now, plan.postprocessors)

    tally = Tally(plan)
    for exchange in range(plan.exchanges):
        stages, graph, why = simulated_stages(
            tally.members,
            of,
            lambda ids, e=exchange: plan.graph(ids, e),  # type: ignore[misc]
            lambda i, stage, e=exchange: plan.lost(i, e, stage),  # type: ignore[misc]
            plan.needed,
        )
        if why := why or plan.hidden(stages, exchange):
            plan.end(why)
        total, cut, bases = np.zeros(0, plan.form.fixed.dtype), 0, tally.bases
        for i in sorted(stages.vector):
            codes, beyond = plan.form.codes(term(i), plan.weights[i], i, exchange, bases)
            total = codes if not total.size else total + codes
            cut += beyond
        tally.add(stages, graph, total, cut)
    return tally.summed()


def usable_sum(
    method: Method,
    state: State,
    current: TrainingRound,
    replies: Replies,
    summed: Summed | None,
    *,
    plan: Callable[[Sequence[TrainJob]], SumPlan],
    zero: Callable[[], Summands],
    now: Moment,
    rounds: Rounds,
    postprocessors: Sequence[Postprocessor],
    release: Postprocessor | None,
    safe: str,
) -> tuple[Combined, Replies, Summed]:
    """The next state from a secure sum, the replies of those in it, and the sum; the state as it
    was if too few clients could be asked.

    Args:
        method: absorbs the sum.
        state: from which the round began.
        current: the round.
        replies: its results, validated.
        summed: the sum; None: it is simulated here, and nothing if no client was asked.
        plan: of the sum over these jobs.
        zero: makes the summand of a client that did not move.
        now: seed and round.
        rounds: how many clients must succeed.
        postprocessors: of the run.
        release: adds noise to the sum first and knows its denominator; None: no privacy.
        safe: what of the run is on disk, for messages.

    Raises:
        RunError: if too few clients are in the sum, or no client could go on from the state.
    """
    if summed is None:
        asked = [j for i, j in current.jobs.items() if i in replies.asked]
        if asked:
            summed = simulate(plan(asked), replies.updates)
            replies = _without_lost(replies, summed, current)
        elif enough(current, replies, rounds):
            summed = Summed.empty(zero())
        else:
            return Combined(state, {}), replies, Summed.empty({})
    between = [*postprocessors, *([] if release is None else [release])]
    after = after_sum(method, state, summed, now, between, safe)
    return Combined(after, summed.influence), replies, summed


def _without_lost(replies: Replies, summed: Summed, current: TrainingRound) -> Replies:
    """The replies of the clients in a sum, and the others as failures."""
    had = {u.client.id for u in replies.updates}
    lost = [
        failure(current.jobs[i].client, stage)
        for i, stage in sorted(summed.lost.items())
        if i in had
    ]
    return replies.only(had - summed.lost.keys(), lost)


def after_sum(
    method: Method,
    state: State,
    summed: Summed,
    now: Moment,
    postprocessors: Sequence[Postprocessor],
    safe: str,
) -> State:
    """The state after a secure sum.

    Args:
        method: absorbs it.
        state: from which the round began.
        summed: the sum.
        now: seed and round.
        postprocessors: of the run.
        safe: what of the run is on disk, for messages.

    Raises:
        RunError: if no client could go on from the state: of a sum nobody can be left out.
    """
    try:
        after = absorbed(method, state, summed.total, summed.weight, now, postprocessors)
        wrong = unusable(method, after)
    except NUMERICAL as error:
        wrong = f"the average cannot be computed: {error}"
    if wrong:
        raise RunError(
            f"round {now.round}: {wrong}, and of a secure sum no client can be left out. {safe}"
        )
    return after
