"""Metrics of many clients as the scalars of one record."""

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from fedlora.core.confusion import added
from fedlora.core.metric import (
    EXP_MEAN,
    LOWEST,
    MACRO_F1,
    TIER,
    TOTAL,
    TRAINED,
    UNTRAINED,
    Metric,
    exponential,
)
from fedlora.core.seeding import generator
from fedlora.core.types import Evaluation


def summarise(
    evaluations: Sequence[Evaluation],
    seed: int = 0,
    resamples: int = 1000,
    trained: Collection[int] = (),
) -> dict[str, float]:
    """Combine what was measured on clients, as each metric says (`fedlora.core.metric.Metric`).

    ``<name>`` is the plain mean over clients, ``<name>_weighted`` that of all their examples (or
    tokens) together: clients are weighted by the metric's weight. Means of an ``exp_mean`` metric
    are taken before the exponential: the weighted one is the perplexity of all tokens together. Of
    a ``macro_f1`` it is the score of the summed counts. A ``total`` is summed. ``<name>_low`` and
    ``<name>_high`` bound a mean at 95 % by bootstrapping clients where the metric asks for it.

    Where a metric says which clients are worst off, ``<name>_worst_tenth`` is the mean over the
    worst tenth of the clients (at least one), ``<name>_std`` the standard deviation over clients,
    ``<name>_p10`` and ``<name>_p90`` are the quantiles, ``<name>_gini`` and ``<name>_jain`` the
    indices of `gini` and `jain` where no value is negative, and ``tier/<tier>/<name>`` is the
    weighted value of each tier, if there are several, and ``<name>_tier_gap`` the largest of them
    minus the smallest.

    Args:
        evaluations: in any order, one per client; values that are not finite are left out.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        trained: ids of the clients that use a model of their own. If there are any, the weighted
            values of these and of all others follow as ``trained/<name>`` and ``untrained/<name>``.
    """
    ordered = sorted(evaluations, key=lambda e: e.client.id)
    totals: dict[str, float] = {"clients": len(ordered)}
    means: dict[str, float] = {}
    bounds: dict[str, float] = {}
    for name, metrics in _by_name(ordered).items():
        if metrics[0].over_clients == TOTAL:
            totals[name] = math.fsum(m.value for m in metrics)
            continue
        found = [m for m in metrics if math.isfinite(m.value)]
        means |= _means(name, found)
        if found and found[0].interval:
            low, high = bootstrap([m.value for m in found], seed, resamples)
            bounds |= {f"{name}_low": low, f"{name}_high": high}
        if found and found[0].worst:
            bounds |= _distribution(name, [m.value for m in found], found[0].worst)
    return totals | means | bounds | _by_tier(ordered) | _by_history(ordered, trained)


def _by_name(evaluations: Sequence[Evaluation]) -> dict[str, list[Metric]]:
    """The metrics of the clients on which each was measured."""
    found: dict[str, list[Metric]] = {}
    for evaluation in evaluations:
        for name, metric in evaluation.metrics.items():
            found.setdefault(name, []).append(metric)
    return found


def _means(name: str, metrics: Sequence[Metric]) -> dict[str, float]:
    """The plain and the weighted mean of one metric; without clients none, without weight one."""
    if not metrics:
        return {}
    shown = exponential if metrics[0].over_clients == EXP_MEAN else float
    means = {name: shown(math.fsum(m.value for m in metrics) / len(metrics))}
    total = math.fsum(m.weight for m in metrics)
    if total > 0 and metrics[0].over_clients == MACRO_F1:
        means[f"{name}_weighted"] = added(m.counts for m in metrics if m.counts).macro_f1
    elif total > 0:
        weighted = math.fsum(m.value * m.weight for m in metrics) / total
        means[f"{name}_weighted"] = shown(weighted)
    return means


def _distribution(name: str, values: Sequence[float], worst: str) -> dict[str, float]:
    """How far clients are apart, of finite values, one per client."""
    ordered = sorted(values, reverse=worst != LOWEST)
    tenth = ordered[: -(-len(ordered) // 10)]
    low, high = np.quantile(values, [0.1, 0.9])
    return {
        f"{name}_worst_tenth": math.fsum(tenth) / len(tenth),
        f"{name}_std": float(np.std(sorted(values))),
        f"{name}_p10": float(low),
        f"{name}_p90": float(high),
        **(
            {f"{name}_gini": gini(values), f"{name}_jain": jain(values)} if min(values) >= 0 else {}
        ),
    }


def gini(values: Sequence[float]) -> float:
    """Gini's coefficient ``Σ_i Σ_j |x_i - x_j| / (2 n Σ_i x_i)``: 0 if all are equal or none has
    anything, ``(n - 1) / n`` if one has everything.

    Args:
        values: at least one, none negative.
    """
    ordered, n = sorted(values), len(values)
    total = math.fsum(ordered)
    if total == 0:
        return 0.0
    return max(0.0, math.fsum((2 * i - n + 1) * x for i, x in enumerate(ordered)) / (n * total))


def jain(values: Sequence[float]) -> float:
    """Jain's fairness index ``(Σ_i x_i)² / (n Σ_i x_i²)`` (Jain, Chiu and Hawe, 1984): 1 if all are
    equal, ``1 / n`` if one has everything; 1 if all have nothing.

    Args:
        values: at least one, none negative.
    """
    top = max(values)
    if top == 0:
        return 1.0
    shares = [x / top for x in values]  # whose squares neither overflow nor vanish
    return math.fsum(shares) ** 2 / (len(shares) * math.fsum(x * x for x in shares))


def _by_tier(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """The number of clients and the weighted values of every tier, of metrics that say which
    clients are worst off; nothing if all clients are of one tier."""
    tiers: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        tiers.setdefault(evaluation.client.tier, []).append(evaluation)
    values: dict[str, float] = {}
    for tier in sorted(tiers) if len(tiers) > 1 else ():
        described = {}
        for name, metrics in _by_name(tiers[tier]).items():
            found = [m for m in metrics if m.worst and math.isfinite(m.value)]
            if f"{name}_weighted" in (means := _means(name, found)):
                described[f"{TIER}{tier}/{name}"] = means[f"{name}_weighted"]
        if described:
            values |= {f"{TIER}{tier}/clients": len(tiers[tier])} | described
    return values | _tier_gaps(values)


def _tier_gaps(values: Mapping[str, float]) -> dict[str, float]:
    """How far the best and the worst tier are apart, of each metric that several have."""
    by_metric: dict[str, list[float]] = {}
    for key, value in values.items():
        by_metric.setdefault(key.rpartition("/")[2], []).append(value)
    return {
        f"{name}_tier_gap": max(found) - min(found)
        for name, found in by_metric.items()
        if name != "clients" and len(found) > 1
    }


def _by_history(evaluations: Sequence[Evaluation], trained: Collection[int]) -> dict[str, float]:
    """Numbers and weighted values of the clients that have trained and of those that never have;
    nothing if no client keeps a model of its own."""
    values: dict[str, float] = {}
    for start, has in ((TRAINED, True), (UNTRAINED, False)) if trained else ():
        group = [e for e in evaluations if (e.client.id in trained) == has]
        values[f"{start}clients"] = len(group)
        for name, metrics in _by_name(group).items():
            finite = [m for m in metrics if m.over_clients != TOTAL and math.isfinite(m.value)]
            if f"{name}_weighted" in (means := _means(name, finite)):
                values[f"{start}{name}"] = means[f"{name}_weighted"]
    return values


def bootstrap(values: Sequence[float], seed: int, resamples: int = 1000) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of the mean under resampling with replacement."""
    sample = np.asarray(values, dtype=np.float64)
    random = generator(seed, "bootstrap", len(sample))
    means = sample[random.integers(0, len(sample), (resamples, len(sample)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
