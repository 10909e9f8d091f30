"""One evaluation of the global model: its clients, its adapters and its record."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fedlora.algebra.state import Kept, State
from fedlora.core.metric import Metric
from fedlora.core.payload import Payload
from fedlora.core.types import Client, EvaluateJob, EvaluatePlan, Evaluation, Failure, Ranks
from fedlora.evaluation.summary import summarise
from fedlora.run.tracking import Tracker, read_jsonl
from fedlora.server.claims import REJECTED, not_numbers
from fedlora.server.method import Method
from fedlora.server.training_round import Shared, same_payload, variant_key
from fedlora.server.validation import check_evaluation


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

    ``metrics`` are the client's own values, ``weights`` what each is a mean over, ``counts`` the
    tables ``[true class, predicted class, examples]`` that some are computed from. A client that
    failed has ``failure`` and ``message`` instead.
    """
    group, _, adapter = tag.partition(":")

    def measured(result: Evaluation | Failure) -> dict[str, object]:
        if isinstance(result, Failure):
            return {"failure": result.kind, "message": result.message}
        named = result.metrics.items()
        tables = {name: m.counts.counts for name, m in named if m.counts}
        return {
            "metrics": {name: m.scalar for name, m in named},
            "weights": {name: m.weight for name, m in named},
            **({"counts": tables} if tables else {}),
        }

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


def evaluated_pairs(folder: Path, round: int) -> set[tuple[str, str]]:
    """The (group, adapter) pairs of a round that a run folder's metrics.jsonl already holds."""
    records = read_jsonl(folder / "metrics.jsonl")
    mine = (r for r in records if r.get("kind") == "evaluate" and r.get("round") == round)
    return {(str(r.get("group")), str(r.get("adapter"))) for r in mine}


def validate_evaluations(found: Iterable[Evaluation | Failure]) -> list[Evaluation | Failure]:
    """The results, with a failure in the place of each evaluation whose metrics cannot be combined
    with those of the others.

    How a metric is combined over clients is what most clients say of it. A value that is no finite
    number is the model's fault if most clients send one, and is left out of means; else it is the
    client's.
    """
    results = [_rejected(r, check_evaluation) for r in found]
    said = defaultdict[str, Counter[Combination]](Counter)
    finite = defaultdict[str, Counter[bool]](Counter)
    for result in results:
        if isinstance(result, Evaluation):
            for name, m in result.metrics.items():
                said[name][combination(m)] += 1
                finite[name][math.isfinite(m.value)] += 1
    agreed = {name: kinds.most_common(1)[0][0] for name, kinds in said.items()}
    diverged = frozenset(name for name, seen in finite.items() if seen[False] > seen[True])
    results = [_agreeing(r, agreed) for r in results]
    return [_rejected(r, lambda e: not_numbers(e.metrics, diverged)) for r in results]


def _rejected(
    result: Evaluation | Failure, wrong_with: Callable[[Evaluation], str]
) -> Evaluation | Failure:
    wrong = wrong_with(result) if isinstance(result, Evaluation) else ""
    return Failure(result.client, REJECTED, wrong) if wrong else result


class Combination(NamedTuple):
    """How a metric is combined over clients, on which they must agree."""

    over_clients: str
    interval: bool
    worst: str
    classes: int
    """Number of classes in the metric's table; 0: it has none."""


def combination(metric: Metric) -> Combination:
    """How a metric is combined, as it says itself."""
    classes = metric.counts.classes if metric.counts else 0
    return Combination(metric.over_clients, metric.interval, metric.worst, classes)


def _agreeing(
    result: Evaluation | Failure, agreed: Mapping[str, Combination]
) -> Evaluation | Failure:
    if isinstance(result, Failure):
        return result
    for name, m in result.metrics.items():
        if (mine := combination(m)) != agreed[name]:
            why = f"its metric {name} is combined as {_said(mine)}, that of most clients as "
            return Failure(result.client, REJECTED, why + _said(agreed[name]))
    return result


def _said(how: Combination) -> str:
    """``mean (interval=True, worst='lowest', classes=0)``"""
    rest = ", ".join(f"{k}={v!r}" for k, v in how._asdict().items() if k != "over_clients")
    return f"{how.over_clients} ({rest})"


def evaluation_record(
    tag: str,
    found: Sequence[Evaluation | Failure],
    *,
    round: int,
    seconds: float,
    trained: Collection[int] = (),
) -> dict[str, float | int | str]:
    """The record of one group and adapter; failed clients are only counted.

    Args:
        tag: ``<group>:<adapter>``.
        found: one result per client, in any order.
        round: after which it is.
        seconds: since the evaluation began.
        trained: ids of the clients that keep a model of their own, which they use for ``own``.
    """
    group, _, adapter = tag.partition(":")
    known = trained if adapter == "own" else ()
    good = sorted((r for r in found if isinstance(r, Evaluation)), key=lambda r: r.client.id)
    return {
        **(summarise(good, trained=known) if good else {"clients": 0.0}),
        "kind": "evaluate",
        "round": round,
        "group": group,
        "adapter": adapter,
        "failed": len(found) - len(good),
        "round/evaluate_seconds": seconds,
    }


def recorded(
    tracker: Tracker,
    tag: str,
    arrived: Sequence[Evaluation | Failure],
    emit: Callable[[str], None],
    round: int,
    seconds: float,
    trained: Collection[int],
) -> dict[str, float | int | str]:
    """Validate the results of one group and adapter, write rows and record, say what failed.

    Args:
        tracker: of the run.
        tag: ``<group>:<adapter>``.
        arrived: one per client.
        emit: shows one line.
        round: after which they were evaluated.
        seconds: that the evaluation has taken.
        trained: ids of the clients that keep a state.
    """
    found = validate_evaluations(arrived)
    failed = [r for r in found if isinstance(r, Failure)]
    for f in failed[:3]:
        emit(f"round {round}: evaluating client {f.client.id} failed: {f.kind}: {f.message}")
    if len(failed) == len(found):
        group = tag.partition(":")[0]
        emit(f"round {round}: evaluation of {group} gave nothing: all clients failed")
    record = evaluation_record(tag, found, round=round, seconds=seconds, trained=trained)
    tracker.evaluated(evaluation_rows(tag, found, round=round))
    tracker.round(record)
    return record
