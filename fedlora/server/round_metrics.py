"""The training metrics of a round: losses, speed, engines, and the exactness of the average."""

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from fedlora.algebra.linalg import (
    exactness_gap,
    normalize,
    singular_value_energy,
    spectra,
    stack,
    truncation_error,
)
from fedlora.algebra.state import State
from fedlora.core.payload import Payload, plain_factors
from fedlora.core.types import (
    Factors,
    Failure,
    Setting,
    Update,
)
from fedlora.robust.rule import Rule
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

    losses = ("loss", "loss_first", "loss_last") if updates else ()
    return {
        "kind": "round",
        "round": round,
        "clients": len(updates),
        "failed": len(failures) - rejected,
        "rejected": rejected,
        **{f"train/{name}": mean(name) for name in losses},
        "train/tokens": tokens,
        "round/train_seconds": seconds,
        "round/clients_per_second": (len(updates) + len(failures)) / max(seconds, 1e-9),
    }


def influence_record(rule: Rule, influence: Mapping[int, float]) -> dict[str, float]:
    """How many clients are in a robust average, and the largest fraction of one; empty: there is no
    rule.

    Args:
        rule: of the run.
        influence: client id -> its fraction of what was absorbed.
    """
    if not rule.acts or not influence:
        return {}
    there = [v for v in influence.values() if v > 0]
    return {"robust/clients": len(there), "robust/largest": max(there, default=0.0)}


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
    method: Method,
    state: State,
    setting: Setting,
    updates: Sequence[Update],
    starts: Mapping[int, Payload],
) -> Mapping[str, float]:
    """How exact the aggregation was, for updates that are low-rank factors or changes of a whole
    base, and a method that makes a global model of them.

    Args:
        method: whose state it is.
        state: after the aggregation.
        setting: for the population's rank patterns.
        updates: the aggregated updates, at least one.
        starts: client id -> what it started the round from.
    """
    if method.private:
        return {}
    model = method.technique.payload(method.global_update(state))
    weights = method.reference_weights(updates)
    if model.base() is not None:
        return _gap_record(moved_gap(model, updates, starts, weights))
    adapter = plain_factors(model)
    if adapter is None or plain_factors(updates[0].payload) is None:
        return {}
    # A split client sends only the blocks that it holds: compare modules that all clients sent.
    sent = [p for p in adapter if all(p in u.adapter for u in updates)]
    if not sent:
        return {}
    adapter = {p: adapter[p] for p in sent}
    record = _gap_record(exactness_gap(updates, weights, adapter))
    values = spectra(adapter)
    patterns = setting.rank_patterns
    ranks = sorted({r for pattern in patterns for r in pattern.values()})
    for rank, energy in singular_value_energy(values, ranks).items():
        record[f"aggregate/energy_at_rank_{rank}"] = energy
    for label, error in truncation_error(values, patterns).items():
        record[f"aggregate/truncation_error_{label}"] = error
    return record


def _gap_record(found: Mapping[str, float]) -> dict[str, float]:
    if not found:
        return {}
    return {
        "aggregate/exactness_gap": found["gap"],
        "aggregate/exactness_gap_relative": found["relative"],
        "aggregate/update_norm": found["norm"],
    }


def moved_gap(
    model: Payload,
    updates: Sequence[Update],
    starts: Mapping[int, Payload],
    weights: Sequence[float],
) -> dict[str, float]:
    """How far a global model over a moved base is from the average of its clients' models.

    As `fedlora.algebra.linalg.exactness_gap`, of all that is added to the base's own weights: the
    move of each client's base and its factors. Matrices are dense and float64, module by module.

    Args:
        model: of the state after the aggregation.
        updates: at least one.
        starts: client id -> what it started from; an update of factors alone is over this base.
        weights: of the updates, not normalized.

    Returns:
        ``gap``, ``norm`` and ``relative``; nothing if some update is neither factors nor a base.
    """
    shifts: dict[str, Mapping[str, Tensor]] = {}
    shares: dict[str, float] = {}
    factors: list[tuple[float, Mapping[str, Factors]]] = []
    for update, p in zip(updates, normalize(weights), strict=True):
        start, low_rank = starts[update.client.id], update.payload.low_rank()
        base = update.payload.base() or start.base()
        if base is None or low_rank is None:
            return {}
        shifts[base.version] = base.shift  # clients on one base are added once
        shares[base.version] = shares.get(base.version, 0.0) + p
        factors.append((p, low_rank))
    whole, gaps, norms = model.base(), [], []
    assert whole is not None
    for path, shift in whole.shift.items():
        found = _with_factors(shift.double(), [(1.0, model.low_rank() or {})], path)
        moved = sum(shares[v] * x[path].double() for v, x in shifts.items())
        assert isinstance(moved, Tensor)
        mean = _with_factors(moved, factors, path)
        gaps.append(float((found - mean).norm()))
        norms.append(float(mean.norm()))
    gap, norm = math.hypot(*gaps), math.hypot(*norms)
    return {"gap": gap, "norm": norm, "relative": gap / norm if norm > 0 else 0.0}


def _with_factors(
    shift: Tensor, weighted: Sequence[tuple[float, Mapping[str, Factors]]], path: str
) -> Tensor:
    """``shift + Σ_k w_k s_k B_k A_k`` of the clients that have factors of a module."""
    own = [(w, adapter[path]) for w, adapter in weighted if path in adapter]
    if not own:
        return shift
    wide = [Factors(f.a.double(), f.b.double(), f.alpha) for _, f in own]
    b, a = stack(wide, [w for w, _ in own])
    return shift + b @ a
