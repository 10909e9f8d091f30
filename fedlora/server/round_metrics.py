"""The training metrics of a round: losses, speed, engines, and the exactness of the average."""

from collections.abc import Iterable, Mapping, Sequence

from fedlora.algebra.linalg import (
    exactness_gap,
    singular_value_energy,
    spectra,
    truncation_error,
)
from fedlora.algebra.state import State
from fedlora.core.payload import plain_factors
from fedlora.core.types import (
    Failure,
    Setting,
    Update,
)
from fedlora.server.method import Method


def training_record(
    round: int, updates: Sequence[Update], failures: Sequence[Failure], seconds: float
) -> dict[str, float | int | str]:
    """Numbers of clients, losses as means over tokens, and speed.

    Args:
        round: counted from 1.
        updates: accepted.
        failures: all other clients of the cohort.
        seconds: from the first message to the last reply.
    """
    rejected = sum(f.kind == "RejectedUpdate" for f in failures)
    tokens = sum(u.metrics.get("tokens", 0.0) for u in updates)

    def mean(name: str) -> float:
        weights = [u.metrics.get("tokens", 1.0) for u in updates]
        values = [u.metrics.get(name, 0.0) for u in updates]
        return sum(w * v for w, v in zip(weights, values, strict=True)) / (sum(weights) or 1)

    return {
        "kind": "round",
        "round": round,
        "clients": len(updates),
        "failed": len(failures) - rejected,
        "rejected": rejected,
        "train/loss": mean("loss"),
        "train/loss_first": mean("loss_first"),
        "train/loss_last": mean("loss_last"),
        "train/tokens": tokens,
        "round/train_seconds": seconds,
        "round/clients_per_second": (len(updates) + len(failures)) / max(seconds, 1e-9),
    }


def engine_record(updates: Sequence[Update], notes: Iterable[str]) -> dict[str, float | int | str]:
    """The engines' notes, and the fraction of clients that were trained together with others."""
    record: dict[str, float | int | str] = {}
    if said := sorted(notes):
        record["engine"] = "; ".join(said)
    fused = [u.metrics["fused"] for u in updates if "fused" in u.metrics]
    if fused:
        record["engine/fused_share"] = sum(fused) / len(fused)
    return record


def diagnosis(
    method: Method, state: State, setting: Setting, updates: Sequence[Update]
) -> Mapping[str, float]:
    """How exact the aggregation was, for updates that are low-rank factors and a method that makes
    a global model of them.

    Args:
        method: whose state it is.
        state: after the aggregation.
        setting: for the population's rank patterns.
        updates: the aggregated updates, at least one.
    """
    if method.private:
        return {}
    adapter = plain_factors(method.technique.payload(method.global_update(state)))
    if adapter is None or plain_factors(updates[0].payload) is None:
        return {}
    # A split client sends only the blocks that it holds: compare modules that all clients sent.
    sent = [p for p in adapter if all(p in u.adapter for u in updates)]
    if not sent:
        return {}
    adapter = {p: adapter[p] for p in sent}
    found = exactness_gap(updates, method.reference_weights(updates), adapter)
    record = {
        "aggregate/exactness_gap": found["gap"],
        "aggregate/exactness_gap_relative": found["relative"],
        "aggregate/update_norm": found["norm"],
    }
    values = spectra(adapter)
    patterns = setting.rank_patterns
    ranks = sorted({r for pattern in patterns for r in pattern.values()})
    for rank, energy in singular_value_energy(values, ranks).items():
        record[f"aggregate/energy_at_rank_{rank}"] = energy
    for label, error in truncation_error(values, patterns).items():
        record[f"aggregate/truncation_error_{label}"] = error
    return record
