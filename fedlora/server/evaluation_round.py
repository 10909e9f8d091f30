"""One evaluation of the global model: its clients, its adapters and its record."""

from collections.abc import Callable, Sequence

from fedlora.algebra.state import Kept, State
from fedlora.core.payload import Payload
from fedlora.core.types import Client, EvaluateJob, EvaluatePlan, Evaluation, Failure, Ranks
from fedlora.evaluation.summary import summarise
from fedlora.server.method import Method
from fedlora.server.training_round import Shared, same_payload, variant_key


def evaluation_jobs(
    method: Method,
    state: State,
    clients: Sequence[Client],
    adapter: str,
    plan: EvaluatePlan,
    *,
    max_ranks: Ranks,
    seed: int,
    round: int,
    kept: Callable[[int], Kept | None] = lambda _: None,
) -> list[EvaluateJob]:
    """One job per client.

    Args:
        method: the method of the run.
        state: the state after the round.
        clients: as they stand in the population.
        adapter: ``full``, ``largest`` or ``own`` (`fedlora.server.schedule.EvaluationSchedule`);
            clients of one variant that keep nothing share their ``own``.
        plan: what is measured.
        max_ranks: of the population, for ``largest``.
        seed: of the draw of each client's examples.
        round: the round before the evaluation.
        kept: returns what a client of this id keeps.
    """
    whole = {"full": None, "largest": max_ranks}
    check = adapter == "own" and round.bit_count() <= 1
    shared = Shared[Payload](same_payload, check)
    jobs = []
    for client in clients:
        enlisted = method.enlist(state, client)
        mine = kept(client.id) if adapter == "own" else None
        key = variant_key(method, state, enlisted, mine) if adapter == "own" else None

        def made(client: Client = client, mine: Kept | None = mine) -> Payload:
            if adapter == "own":
                return method.technique.payload(method.personal_update(state, client, mine))
            return method.technique.payload(method.global_update(state, whole[adapter]))

        jobs.append(EvaluateJob(seed, round, enlisted, shared.get(key, client, made), plan))
    return jobs


def evaluation_record(
    tag: str, found: Sequence[Evaluation | Failure], *, round: int, seconds: float
) -> dict[str, float | int | str]:
    """The record of one group and adapter; failed clients are only counted.

    Args:
        tag: ``<group>:<adapter>``.
        found: one result per client, in any order.
        round: after which it is.
        seconds: since the evaluation began.
    """
    group, _, adapter = tag.partition(":")
    good = sorted((r for r in found if isinstance(r, Evaluation)), key=lambda r: r.client.id)
    return {
        "kind": "evaluate",
        "round": round,
        "group": group,
        "adapter": adapter,
        "failed": len(found) - len(good),
        "round/evaluate_seconds": seconds,
        **(summarise(good) if good else {"clients": 0.0}),
    }
