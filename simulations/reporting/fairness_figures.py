"""The figures of fairness and of quality for bytes (docs/analyses.md); None where nothing was
recorded.

Values of single clients are those of evaluations.jsonl, so that every metric of a run has them.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fedlora.evaluation.summary import gini, jain
from fedlora.run.tracking import read_jsonl
from simulations.reporting.analysis_figures import tiers
from simulations.reporting.drawing import COLOURS, by_round, byte_scale, framed, line, pens
from simulations.reporting.run_folder import Record, Run, number

Points = dict[int, float]
"""Round -> value."""


def measured(run: Run) -> str:
    """The metric by which clients are compared."""
    return "accuracy" if run.classifies else run.eval_loss


def clients_by_round(run: Run) -> dict[int, list[Record]]:
    """The clients of each evaluation of the first group and adapter, without those that failed or
    have no such metric."""
    found: dict[int, list[Record]] = defaultdict(list)
    first: tuple[object, object] | None = None
    for row in read_jsonl(run.folder / "evaluations.jsonl"):
        first = first or (row.get("group"), row.get("adapter"))
        if (row.get("group"), row.get("adapter")) == first and _value(run, row) is not None:
            found[int(row["round"])].append(row)
    return dict(found)


def tier_quality(run: Run) -> Figure | None:
    """The quality for each tier over the rounds, and for the worst tenth of the clients."""
    rounds = clients_by_round(run)
    curves: dict[str, Points] = defaultdict(dict)
    for n, rows in rounds.items():
        for tier in {str(r.get("tier", "")) for r in rows}:
            curves[tier][n] = _pooled(run, [r for r in rows if str(r.get("tier", "")) == tier])
        values = sorted((_value(run, r) or 0.0 for r in rows), reverse=not run.classifies)
        tenth = values[: math.ceil(len(values) / 10)]
        curves["worst tenth"][n] = math.fsum(tenth) / len(tenth)
    if not rounds:
        return None
    order = [t for t in tiers(run, curves) if t in curves and t != "worst tenth"]

    def draw(ax: Axes) -> None:
        for i, tier in enumerate(order):
            line(ax, _pair(curves[tier]), tier or "all", color=COLOURS[i % len(COLOURS)])
        line(ax, _pair(curves["worst tenth"]), "worst tenth", color="#555555", linestyle="--")
        what = measured(run).replace("loss_response", "loss")
        if run.classifies:
            ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        unit = "of all examples of a tier" if run.classifies else run.unit
        by_round(ax, f"Evaluation {what} by tier", unit)

    return framed(draw)


def inequality(run: Run) -> Figure | None:
    """How unequal clients are: Gini's coefficient, and what Jain's index lacks of 1."""
    rounds = clients_by_round(run)
    curves: dict[str, Points] = {"Gini": {}, "1 − Jain": {}}
    for n, rows in rounds.items():
        values = [v for r in rows if (v := _value(run, r)) is not None and v >= 0]
        if values:
            curves["Gini"][n], curves["1 − Jain"][n] = gini(values), 1 - jain(values)

    def draw(ax: Axes) -> None:
        for i, (name, points) in enumerate(curves.items()):
            line(ax, _pair(points), name, color=COLOURS[i])
        ax.set_ylim(bottom=0)
        what = measured(run).replace("loss_response", "loss")
        by_round(ax, f"Inequality of the clients' {what}", "0: all alike")

    return framed(draw) if curves["Gini"] else None


def quality_by_bytes(runs: Sequence[Run]) -> Figure | None:
    """Accuracy, or ROUGE-L, of the first group against all bytes sent and received until then."""
    scale, unit = byte_scale(runs)
    curves = [(run, *_by_bytes(run)) for run in runs]

    def draw(ax: Axes) -> None:
        for (_, pen), (_, total, sent) in zip(pens(runs), curves, strict=True):
            for i, (name, points) in enumerate((("up and down", total), ("up alone", sent))):
                pairs = [(b / scale, v) for b, v in points]
                style = {"linestyle": ("-", "--")[i]}
                line(ax, ([b for b, _ in pairs], [v for _, v in pairs]), name, **pen(0) | style)
        names = {"accuracy" if run.classifies else "ROUGE-L" for run, total, _ in curves if total}
        if all(run.classifies for run in runs):
            ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_title("Quality by traffic")
        ax.set_xlabel(f"so far, all clients, {unit}")
        ax.set_ylabel(", ".join(sorted(names)))

    return framed(draw) if any(total for _, total, _ in curves) else None


def _by_bytes(run: Run) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """``(bytes, quality)`` of the evaluations: of all bytes, and of those sent up."""
    found = run.evaluated("accuracy_weighted" if run.classifies else "rouge_l")
    rounds, values = next(iter(found.values()), ([], []))
    x, up = run.series("wire/up_bytes")
    _, down = run.series("wire/down_bytes")
    if not x or len(up) != len(down):
        return [], []
    so_far = zip(accumulate(up), accumulate(down), strict=True)
    spent = {0: (0.0, 0.0)} | dict(zip(x, so_far, strict=True))
    points = [(*spent[n], v) for n, v in zip(rounds, values, strict=True) if n in spent]
    return [(u + d, v) for u, d, v in points], [(u, v) for u, _, v in points]


def _value(run: Run, row: Record) -> float | None:
    metrics = row.get("metrics", {})
    return number(metrics.get(measured(run))) if isinstance(metrics, Mapping) else None


def _pooled(run: Run, rows: Sequence[Record]) -> float:
    """The mean of all examples or tokens of some clients together."""
    weights = [number(r.get("weights", {}).get(measured(run))) or 0.0 for r in rows]
    if not any(weights):
        weights = [1.0] * len(rows)
    values = [_value(run, r) or 0.0 for r in rows]
    return math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)


def _pair(points: Points) -> tuple[list[int], list[float]]:
    return list(points), list(points.values())
