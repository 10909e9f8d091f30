"""One evaluation of the global model: its clients, its adapters and its record."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from fedlora.algebra.state import Kept, State
from fedlora.core.payload import Payload
from fedlora.core.types import Client, EvaluateJob, EvaluatePlan, Evaluation, Failure, Ranks
from fedlora.evaluation.summary import summarise
from fedlora.server.method import Method
from fedlora.server.training_round import Shared, same_payload, variant_key
from fedlora.server.validation import check_evaluation

REJECTED = "RejectedEvaluation"
"""The kind of a failure whose metrics were refused."""


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


def evaluation_rows(
    tag: str, found: Sequence[Evaluation | Failure], *, round: int
) -> list[dict[str, object]]:
    """One row per client for evaluations.jsonl, by client id.

    ``metrics`` are the client's own values, ``weights`` what each is a mean over. A client that
    failed has ``failure`` and ``message`` instead.
    """
    group, _, adapter = tag.partition(":")

    def measured(result: Evaluation | Failure) -> dict[str, object]:
        if isinstance(result, Failure):
            return {"failure": result.kind, "message": result.message}
        values = {name: m.scalar for name, m in result.metrics.items()}
        return {"metrics": values, "weights": {n: m.weight for n, m in result.metrics.items()}}

    return [
        {
            "round": round,
            "group": group,
            "adapter": adapter,
            "client": r.client.id,
            "tier": r.client.tier,
            "rank": r.client.ranks.label,
            "examples": r.client.num_examples,
            **measured(r),
        }
        for r in sorted(found, key=lambda r: r.client.id)
    ]


def validate_evaluations(found: Iterable[Evaluation | Failure]) -> list[Evaluation | Failure]:
    """The results, with a failure in the place of each evaluation whose metrics cannot be combined
    with those of the others.

    How a metric is combined over clients is what most clients say of it.
    """
    results = [_checked(r) for r in found]
    said = defaultdict[str, Counter[tuple[str, bool]]](Counter)
    for result in results:
        if isinstance(result, Evaluation):
            for name, m in result.metrics.items():
                said[name][m.over_clients, m.interval] += 1
    agreed = {name: kinds.most_common(1)[0][0] for name, kinds in said.items()}
    return [_agreeing(r, agreed) for r in results]


def _checked(result: Evaluation | Failure) -> Evaluation | Failure:
    wrong = check_evaluation(result) if isinstance(result, Evaluation) else ""
    return Failure(result.client, REJECTED, wrong) if wrong else result


def _agreeing(
    result: Evaluation | Failure, agreed: Mapping[str, tuple[str, bool]]
) -> Evaluation | Failure:
    if isinstance(result, Failure):
        return result
    for name, m in result.metrics.items():
        if (m.over_clients, m.interval) != agreed[name]:
            over_clients, interval = agreed[name]
            why = (
                f"its metric {name} is combined as {m.over_clients} (interval={m.interval}), that "
                f"of most clients as {over_clients} (interval={interval})"
            )
            return Failure(result.client, REJECTED, why)
    return result


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
        **(summarise(good) if good else {"clients": 0.0}),
        "kind": "evaluate",
        "round": round,
        "group": group,
        "adapter": adapter,
        "failed": len(found) - len(good),
        "round/evaluate_seconds": seconds,
    }
