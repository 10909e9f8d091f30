"""Metrics of many clients as the scalars of one record."""

import math
from collections.abc import Sequence

import numpy as np

from fedlora.core.metric import EXP_MEAN, TOTAL, Metric, exponential
from fedlora.core.seeding import generator
from fedlora.core.types import Evaluation


def summarise(
    evaluations: Sequence[Evaluation], seed: int = 0, resamples: int = 1000
) -> dict[str, float]:
    """Combine what was measured on clients, as each metric says (`fedlora.core.metric.Metric`).

    ``<name>`` is the plain mean over clients, ``<name>_weighted`` weights clients by the metric's
    weight. Means of an ``exp_mean`` metric are taken before the exponential: the weighted one is
    the perplexity of all tokens together. A ``total`` is summed. ``<name>_low`` and ``<name>_high``
    bound a mean at 95 % by bootstrapping clients where the metric asks for it.

    Args:
        evaluations: in any order, one per client; values that are not finite are left out.
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """
    rows = [e.metrics for e in sorted(evaluations, key=lambda e: e.client.id)]
    by_name: dict[str, list[Metric]] = {}
    for row in rows:
        for name, metric in row.items():
            by_name.setdefault(name, []).append(metric)
    totals: dict[str, float] = {"clients": len(rows)}
    means: dict[str, float] = {}
    bounds: dict[str, float] = {}
    for name, metrics in by_name.items():
        if metrics[0].over_clients == TOTAL:
            totals[name] = math.fsum(m.value for m in metrics)
            continue
        found = [m for m in metrics if math.isfinite(m.value)]
        means |= _means(name, found)
        if found and found[0].interval:
            low, high = bootstrap([m.value for m in found], seed, resamples)
            bounds |= {f"{name}_low": low, f"{name}_high": high}
    return totals | means | bounds


def _means(name: str, metrics: Sequence[Metric]) -> dict[str, float]:
    """The plain and the weighted mean of one metric; without clients none, without weight one."""
    if not metrics:
        return {}
    shown = exponential if metrics[0].over_clients == EXP_MEAN else float
    means = {name: shown(math.fsum(m.value for m in metrics) / len(metrics))}
    total = math.fsum(m.weight for m in metrics)
    if total > 0:
        weighted = math.fsum(m.value * m.weight for m in metrics) / total
        means[f"{name}_weighted"] = shown(weighted)
    return means


def bootstrap(values: Sequence[float], seed: int, resamples: int = 1000) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of the mean under resampling with replacement."""
    sample = np.asarray(values, dtype=np.float64)
    random = generator(seed, "bootstrap", len(sample))
    means = sample[random.integers(0, len(sample), (resamples, len(sample)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
