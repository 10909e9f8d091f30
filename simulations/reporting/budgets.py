"""What a run reached for what it spent: virtual time, bytes and energy.

    python -m simulations.reporting.budgets RUN... --seconds 3600 --target 2.5
    python -m simulations.reporting.budgets RUN... --against RUN_WITHOUT_DEVICES

Quality under a budget is the best evaluation that cost no more; cost to a target is that of the
first evaluation that reaches it. Nothing is interpolated: between two evaluations nothing is known.
Robustness is the difference to the same run without devices, client by client. Protocols:
EdgeFlowerTune, arXiv:2605.08636.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora.evaluation.summary import bootstrap
from fedlora.run.progress import clock, size
from simulations.reporting.run_folder import RecordError, Run, number, read_run
from simulations.reporting.tables import markdown

SECONDS, BYTES, JOULES = "seconds", "bytes", "joules"
NAMES: Mapping[str, str] = {
    SECONDS: "virtual time",
    BYTES: "bytes up and down",
    JOULES: "energy of devices",
}
_SHOWN: Mapping[str, Callable[[float], str]] = {
    SECONDS: clock,
    BYTES: lambda n: size(int(n)),
    JOULES: lambda j: f"{j:,.0f} J",
}
_KEYS: Mapping[str, tuple[str, ...]] = {
    BYTES: ("wire/up_bytes", "wire/down_bytes"),
    JOULES: ("device/energy",),
}
NOT_REACHED = "not reached"


@dataclass(frozen=True)
class Point:
    """An evaluation, and what all rounds before it have spent."""

    round: int
    quality: float
    spent: Mapping[str, float]
    """By kind; kinds that were not recorded are missing."""


@dataclass(frozen=True)
class Curve:
    """The evaluations of a run's first group, in their order."""

    label: str
    """Group and adapter."""
    metric: str
    higher: bool
    """Whether higher is better."""
    points: tuple[Point, ...]

    def better(self, one: float, other: float) -> bool:
        """Whether one quality is better than another."""
        return one > other if self.higher else one < other

    def best(self, kind: str = SECONDS, budget: float = math.inf) -> Point | None:
        """The best evaluation within a budget, the first of equal ones; None: there is none.

        Args:
            kind: of the budget.
            budget: in its unit.
        """
        found: Point | None = None
        for point in self.points:
            if point.spent.get(kind, math.inf) > budget:
                continue
            if found is None or self.better(point.quality, found.quality):
                found = point
        return found

    def reaches(self, target: float) -> Point | None:
        """The first evaluation that is at least as good as a target; None: none is."""
        return next((p for p in self.points if not self.better(target, p.quality)), None)

    def spent(self, kind: str) -> float | None:
        """What the run had spent at its last evaluation; None: that was not recorded."""
        return self.points[-1].spent.get(kind) if self.points else None


def curve(run: Run) -> Curve | None:
    """The evaluations of a run with their cost; None: it has none.

    The quality is the mean over the clients of the first group: accuracy of a classifier, else the
    loss of responses.
    """
    metric = "accuracy" if run.classifies else run.eval_loss
    found = run.evaluated(metric)
    if not found:
        return None
    label, (rounds, values) = next(iter(found.items()))
    spent = _spent(run)
    points = [Point(n, v, spent[n]) for n, v in zip(rounds, values, strict=True) if n in spent]
    return Curve(label, metric, run.classifies, tuple(points))


def _spent(run: Run) -> dict[int, dict[str, float]]:
    """Round -> what had been spent by its end, by kind."""
    kinds = [k for k, keys in _KEYS.items() if any(run.series(key)[0] for key in keys)]
    timed = bool(run.series("time/virtual")[0])
    total = dict.fromkeys(kinds, 0.0)
    found = {0: total | ({SECONDS: 0.0} if timed else {})}
    for row in run.rounds:
        total = {k: total[k] + sum(number(row.get(key)) or 0.0 for key in _KEYS[k]) for k in kinds}
        now = number(row.get("time/virtual"))
        found[int(row["round"])] = total | ({} if now is None else {SECONDS: now})
    return found


@dataclass(frozen=True)
class Difference:
    """A run less its reference, over the clients that both evaluated last."""

    mean: float
    low: float
    """The 95 % interval of a bootstrap over clients."""
    high: float
    clients: int


def robustness(run: Run, reference: Run) -> Difference | None:
    """The difference of the last evaluations' quality, client by client; None: no client is in
    both.

    Args:
        run: on devices.
        reference: the same run without devices.
    """
    one, other = (_last(r) for r in (run, reference))
    both = sorted(one.keys() & other.keys())
    if not both:
        return None
    apart = [one[i] - other[i] for i in both]
    low, high = bootstrap(apart, seed=0)
    return Difference(math.fsum(apart) / len(apart), low, high, len(apart))


def _last(run: Run) -> dict[int, float]:
    """Client -> the quality of its last evaluation, in the first group."""
    metric = "accuracy" if run.classifies else run.eval_loss
    rows = next(iter(run.last_clients().values()), [])
    values = {int(r["client"]): number(r["metrics"].get(metric)) for r in rows}
    return {i: v for i, v in values.items() if v is not None}


# --- in words -------------------------------------------------------------------------------------


def shown(kind: str, cost: float) -> str:
    """A cost in words."""
    return _SHOWN[kind](cost)


def quality_row(found: Curve, kind: str, budget: float) -> list[str]:
    """A budget, the best quality within it, and the round of that."""
    best = found.best(kind, budget)
    quality = "–" if best is None else f"{best.quality:.3f}"
    return [NAMES[kind], shown(kind, budget), quality, "–" if best is None else str(best.round)]


def cost_row(found: Curve, target: float) -> list[str]:
    """A target, and what the run had spent when it reached it, by kind."""
    point = found.reaches(target)
    costs = {} if point is None else point.spent
    cells = [shown(k, costs[k]) if k in costs else "–" for k in NAMES]
    return [f"{target:.3f}", *(cells if point else [NOT_REACHED] * len(NAMES))]


def _report(runs: Sequence[Run], options: argparse.Namespace) -> list[str]:
    """What the command prints."""
    lines = []
    given = {SECONDS: options.seconds, BYTES: options.bytes, JOULES: options.joules}
    against = read_run(options.against) if options.against else None
    for run in runs:
        found = curve(run)
        if found is None or not found.points:
            lines.append(f"{run.name}: nothing was evaluated")
            continue
        lines.append(f"{run.name}: {found.metric.replace('_', ' ')} of {found.label}")
        rows = [quality_row(found, k, x) for k, budgets in given.items() for x in budgets or ()]
        if rows:
            lines += ["", markdown(["budget", "at most", "best", "round"], rows), ""]
        if options.target:
            heads = ["target", *NAMES.values()]
            lines += ["", markdown(heads, [cost_row(found, y) for y in options.target]), ""]
        if against is not None:
            lines.append(robust_text(robustness(run, against), against.name))
    return lines


def robust_text(found: Difference | None, reference: str) -> str:
    """A difference in words."""
    if found is None:
        return f"no client was evaluated both here and in {reference}"
    return (
        f"{found.mean:+.4f} (95 %: {found.low:+.4f} to {found.high:+.4f}) from {reference}, over "
        f"{found.clients} clients"
    )


def main(words: Sequence[str] | None = None, show: Callable[[str], object] = print) -> int:
    """The command; its exit code."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser("simulations.reporting.budgets", description=about)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--seconds", type=float, nargs="+", help="budgets of virtual time")
    parser.add_argument("--bytes", type=float, nargs="+", help="budgets of bytes up and down")
    parser.add_argument("--joules", type=float, nargs="+", help="budgets of energy")
    parser.add_argument("--target", type=float, nargs="+", help="qualities to be reached")
    parser.add_argument("--against", type=Path, help="the same run without devices")
    options = parser.parse_args(words)
    try:
        for line in _report([read_run(folder) for folder in options.runs], options):
            show(line)
    except RecordError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
