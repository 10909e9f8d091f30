"""Figures and tables of runs on devices (docs/devices.md); None where no time was recorded."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from simulations.reporting.budgets import (
    NAMES,
    SECONDS,
    Curve,
    cost_row,
    curve,
    quality_row,
    robust_text,
    robustness,
)
from simulations.reporting.drawing import by_round, framed, line, pens, stack
from simulations.reporting.run_folder import Run
from simulations.reporting.run_tables import Cell, Table, colour

PARTS = (0.25, 0.5, 0.75, 1.0)
"""Budgets as fractions of what all runs of a page have spent."""
GAINS = (0.5, 0.8, 0.95)
"""Targets as fractions of the way from the first evaluation to the best."""
_UNITS: Mapping[str, float] = {"s": 1.0, "min": 60.0, "h": 3600.0, "days": 86400.0}


def timed(run: Run) -> bool:
    """Whether a run has a virtual clock."""
    return bool(run.series("time/virtual")[0])


def quality_by_time(runs: Sequence[Run]) -> Figure | None:
    """The quality of the first group against virtual time: evaluations, and the best so far."""
    found = [(run, curve(run)) for run in runs if timed(run)]
    curves = {run.name: c for run, c in found if c is not None and len(c.points) > 1}
    if not curves:
        return None
    most = max(c.spent(SECONDS) or 0.0 for c in curves.values())
    unit = [name for name, size in _UNITS.items() if most >= 2 * size or size == 1][-1]

    def draw(ax: Axes) -> None:
        for run, pen in pens(runs):
            if (c := curves.get(run.name)) is None:
                continue
            times = [p.spent[SECONDS] / _UNITS[unit] for p in c.points]
            style = {"linestyle": "-", "linewidth": 1.0, "alpha": 0.6}
            line(ax, (times, [p.quality for p in c.points]), "evaluations", **pen(0) | style)
            style = {"linestyle": "--", "drawstyle": "steps-post", "dots": 0}
            line(ax, (times, _best_so_far(c)), "best so far", **pen(1) | style)
        if all(run.classifies for run in runs):
            ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        first = next(iter(curves.values()))
        ax.set_title("Quality by virtual time")
        ax.set_xlabel(f"virtual time, {unit}")
        ax.set_ylabel(f"{first.metric.replace('_', ' ')}, {first.label}")

    return framed(draw)


def _best_so_far(found: Curve) -> list[float]:
    best: list[float] = []
    for p in found.points:
        best.append(p.quality if not best or found.better(p.quality, best[-1]) else best[-1])
    return best


def outcomes(run: Run) -> Figure | None:
    """What became of the clients that each round asked."""
    x, late = run.series("device/late")
    if not x:
        return None
    trained, away = run.series("clients")[1], run.series("device/away")[1]
    failed = [
        a + b for a, b in zip(*(run.series(k)[1] for k in ("failed", "rejected")), strict=True)
    ]
    parts = {"result in time": trained, "late": late, "went away": away, "failed": failed}
    shown = {name: values for name, values in parts.items() if any(values)}

    def draw(ax: Axes) -> None:
        if len(x) > 60:
            ax.stackplot(x, *shown.values(), labels=list(shown), alpha=0.85)
        else:
            stack(ax, x, shown)
        by_round(ax, "Clients that a round asked", "clients")

    return framed(draw) if shown else None


def round_times(runs: Sequence[Run]) -> Figure | None:
    """The virtual time at the end of each round."""

    def draw(ax: Axes) -> None:
        for run, pen in pens(runs):
            line(ax, run.series("time/virtual"), "", **pen(0))
        ax.set_ylim(bottom=0)
        by_round(ax, "Virtual clock", "s")

    return framed(draw) if any(timed(run) for run in runs) else None


def staleness(run: Run) -> Figure | None:
    """How old the changes were of which each version was made."""
    means, most = run.series("staleness/mean"), run.series("staleness/max")

    def draw(ax: Axes) -> None:
        line(ax, means, "mean")
        line(ax, most, "oldest", linestyle="--")
        by_round(ax, "Staleness of the averaged changes", "versions")

    return framed(draw) if any(most[1]) else None


def budget_table(runs: Sequence[Run]) -> Table | None:
    """Quality under budgets that all runs of the page have spent."""
    curves = _curves(runs)
    if not curves:
        return None
    rows = []
    for kind in NAMES:
        spent = [c.spent(kind) for c in curves.values()]
        ends = [x for x in spent if x]
        if len(ends) < len(spent):
            continue
        for part in PARTS:
            for i, run in enumerate(runs):
                if run.name in curves:
                    cells = quality_row(curves[run.name], kind, part * min(ends))
                    rows.append([_name(run, i, runs), *_cells(cells)])
    heads = ["run", "budget", "at most", "best", "round"]
    what = next(iter(curves.values()))
    note = f"Best {what.metric.replace('_', ' ')} of {what.label} that cost no more."
    return Table("Quality under a budget", rows, _heads(heads), note) if rows else None


def cost_table(runs: Sequence[Run]) -> Table | None:
    """What each run had spent when it reached the same targets."""
    curves = _curves(runs)
    if not curves:
        return None
    found = list(curves.values())
    ends = [p.quality for c in found if (p := c.best(SECONDS)) is not None]
    first, best = found[0].points[0].quality, max(ends) if found[0].higher else min(ends)
    rows = []
    for gain in GAINS:
        target = first + gain * (best - first)
        for i, run in enumerate(runs):
            if run.name in curves:
                cells = _cells(cost_row(curves[run.name], target))
                rows.append([_name(run, i, runs), *cells])
    heads = ["run", "target", *NAMES.values()]
    percents = ", ".join(f"{g:.0%}" for g in GAINS)
    note = f"Targets: {percents} of the way from the first evaluation to the best of the page."
    return Table("Cost to a target", rows, _heads(heads), note)


def robust_table(runs: Sequence[Run]) -> Table | None:
    """Runs on devices less the one without."""
    plain = [run for run in runs if not timed(run)]
    rows = [
        [_name(run, i, runs), Cell(robust_text(robustness(run, plain[0]), plain[0].name))]
        for i, run in enumerate(runs)
        if plain and timed(run)
    ]
    return Table("Against the run without devices", rows) if rows else None


def _curves(runs: Sequence[Run]) -> dict[str, Curve]:
    """The curves of the runs that have a clock."""
    found = {run.name: curve(run) for run in runs if timed(run)}
    return {name: c for name, c in found.items() if c is not None and c.points}


def _name(run: Run, index: int, runs: Sequence[Run]) -> Cell:
    return Cell(run.name, "key", colour=colour(index) if len(runs) > 1 else "")


def _cells(texts: Sequence[str]) -> list[Cell]:
    return [Cell(texts[0]), *(Cell(t, "n") for t in texts[1:])]


def _heads(names: Sequence[str]) -> list[Cell]:
    return [Cell(names[0]), Cell(names[1]), *(Cell(n, "n") for n in names[2:])]
