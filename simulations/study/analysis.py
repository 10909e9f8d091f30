"""What a study found: numbers of every run, then statistics over seeds and cells.

A *quantity* is one number of a complete run: a metric at the end, at a budget, its mean over the
rounds, or what it cost to reach a target. `analyse` takes each over the seeds of a cell, and seed
by seed against the cell with the reference level.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedlora.run.progress import clock, size
from simulations.study import statistics
from simulations.study.choice import Tuned
from simulations.study.results import Recorded
from simulations.study.spec import Study
from simulations.study.statistics import Difference, Estimate, Ranking
from simulations.study.values import Cell

FINAL, AREA = "final", "mean over rounds"
AT_EQUAL = "at equal "
UNITS = {"rounds": "round", "bytes": "bytes", "seconds": "seconds"}
"""Kinds of budgets, and the cost that each is compared with."""


@dataclass(frozen=True, order=True)
class Quantity:
    """What is measured of a run."""

    metric: str
    what: str
    """``final``, ``mean over rounds``, ``at 5 rounds``, ``at equal bytes, 1.2 MiB``, ``bytes to
    0.5``."""
    unit: str = ""
    """``bytes``, ``seconds`` or ``rounds`` of a cost; empty: that of the metric."""


@dataclass(frozen=True)
class Line:
    """A quantity in a cell."""

    cell: Cell
    quantity: Quantity
    estimate: Estimate | None
    """None if no run of the cell is complete, or a complete one has no such number."""
    without: tuple[int, ...]
    """Seeds whose run is complete and has no such number: a target that it does not reach."""
    complete: int
    """Complete runs."""
    missing: tuple[int, ...]
    """Seeds without a complete run."""
    difference: Difference | None = None
    """From the reference; None for the reference itself, and where there is no pair of runs."""
    p_holm: float | None = None
    """Adjusted over all differences of the quantity."""


@dataclass(frozen=True)
class Analysis:
    """The statistics of a study."""

    lines: Sequence[Line]
    rankings: Mapping[str, Ranking]
    """By metric: the levels of the compared axis, ranked at the end of the runs, a block being a
    seed and a setting of the other axes."""
    tuned: Sequence[Tuned] = ()
    """What was chosen for each group; empty without a tuning stage."""

    def values_of(self, study: Study, cell: Cell) -> dict[str, str]:
        """The tuned keys of a cell with their values; empty values if there is no choice."""
        if study.tuning is None:
            return {}
        group = study.tuning.group(cell)
        found = next((one.chosen for one in self.tuned if one.group == group), None)
        return dict(found.values) if found else dict.fromkeys(study.tuning.grid, "")


def analyse(study: Study, runs: Sequence[Recorded], tuned: Sequence[Tuned] = ()) -> Analysis:
    """All statistics that a study asks for, from its complete runs and what was tuned."""
    equal = equal_budgets(study, runs)
    found = {(one.run.cell, one.run.seed): dict(quantities(study, one, equal)) for one in runs}
    lines: list[Line] = []
    for quantity in dict.fromkeys(q for values in found.values() for q in values):
        lines += _lines(study, quantity, found)
    return Analysis(lines, dict(_rankings(study, found)), tuned)


def amount(cost: float, kind: str) -> str:
    """A budget in words."""
    if kind == "bytes":
        return size(cost)
    return clock(cost) if kind == "seconds" else f"{cost:g}"


Found = Mapping[tuple[Cell, int], Mapping[Quantity, float | None]]


def equal_budgets(study: Study, runs: Sequence[Recorded]) -> dict[str, float]:
    """By kind: the least that a complete run has spent by its last evaluation, so that all methods
    can be compared at that cost."""
    return {
        kind: min(float(one.rows[-1][UNITS[kind]]) for one in runs) for kind in study.equal if runs
    }


def quantities(
    study: Study, one: Recorded, equal: Mapping[str, float]
) -> Iterator[tuple[Quantity, float | None]]:
    """The numbers of a run; None for what it does not have.

    Args:
        study: what it asks for.
        one: the run.
        equal: of `equal_budgets`.
    """
    for metric, higher in study.metrics.items():
        rounds, values = one.curve("round", metric)
        yield Quantity(metric, FINAL), values[-1] if values else None
        yield Quantity(metric, AREA), statistics.area(rounds, values)
        for kind, budgets in study.budgets.items():
            costs, _ = one.curve(UNITS[kind], metric)
            for budget in budgets:
                unit = kind.removesuffix("s") if budget == 1 else kind
                yield (
                    Quantity(metric, f"at {budget:,g} {unit}"),
                    statistics.at_budget(costs, values, budget),
                )
        for kind, budget in equal.items():
            costs, _ = one.curve(UNITS[kind], metric)
            at = statistics.at_budget(costs, values, budget)
            yield Quantity(metric, f"{AT_EQUAL}{kind}, {amount(budget, kind)}"), at
        for target in study.targets.get(metric, ()):
            for kind, cost in UNITS.items():
                costs, _ = one.curve(cost, metric)
                yield (
                    Quantity(metric, f"{kind} to {target:g}", kind),
                    statistics.cost_to_target(costs, values, target, higher),
                )


def _lines(study: Study, quantity: Quantity, found: Found) -> list[Line]:
    """A quantity in all cells, with differences adjusted together."""
    cells = list(study.cells())
    values = {cell: _by_seed(cell, quantity, study.seeds_of(cell), found) for cell in cells}
    apart: dict[Cell, Difference] = {}
    for cell in cells:
        against = study.reference_of(cell)
        if against in values and against != cell:
            between = statistics.difference(values[cell], values[against])
            if between is not None:
                apart[cell] = between
    names = {str(i): cell for i, cell in enumerate(apart)}
    adjusted = statistics.holm({name: apart[cell].p for name, cell in names.items()})
    p_holm = {cell: adjusted[name] for name, cell in names.items()}
    lines = []
    for cell in cells:
        seeds = study.seeds_of(cell)
        complete = [seed for seed in seeds if (cell, seed) in found]
        without = tuple(seed for seed in complete if seed not in values[cell])
        whole = complete and not without
        lines.append(
            Line(
                cell,
                quantity,
                statistics.estimate(values[cell]) if whole else None,
                without,
                len(complete),
                tuple(seed for seed in seeds if seed not in complete),
                apart.get(cell),
                p_holm.get(cell),
            )
        )
    return lines


def _by_seed(
    cell: Cell, quantity: Quantity, seeds: Sequence[int], found: Found
) -> dict[int, float]:
    """The numbers that the complete runs of a cell have."""
    values = {seed: found.get((cell, seed), {}).get(quantity) for seed in seeds}
    return {seed: value for seed, value in values.items() if value is not None}


def _rankings(study: Study, found: Found) -> Iterator[tuple[str, Ranking]]:
    """The levels of the compared axis by metric, in the settings that have all of them."""
    if study.compared is None:
        return
    levels = list(study.axes[study.compared])
    settings: dict[Cell, dict[str, Cell]] = {}
    for cell in study.cells():
        rest = tuple(pair for pair in cell if pair[0] != study.compared)
        settings.setdefault(rest, {})[dict(cell)[study.compared]] = cell
    whole = [cells for cells in settings.values() if len(cells) == len(levels)]
    for metric, higher in study.metrics.items():
        blocks = [
            _block(Quantity(metric, FINAL), cells, seed, found)
            for cells in whole
            for seed in study.all_seeds()
            if all(seed in study.seeds_of(cell) for cell in cells.values())
        ]
        ranking = statistics.rank(levels, blocks, higher)
        if ranking is not None:
            yield metric, ranking


def _block(
    quantity: Quantity, cells: Mapping[str, Cell], seed: int, found: Found
) -> dict[str, float]:
    """What the levels of one setting have with one seed."""
    values = {level: found.get((cell, seed), {}).get(quantity) for level, cell in cells.items()}
    return {level: value for level, value in values.items() if value is not None}
