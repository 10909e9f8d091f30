"""The figures of a study: curves with bands over seeds, and final values with their intervals.

Colours are those of `simulations.reporting.drawing`, which people with any kind of colour vision
tell apart; levels beyond them differ in the style of their lines.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulations.reporting.drawing import COLOURS, by_round, framed
from simulations.study.analysis import FINAL, Analysis, Quantity
from simulations.study.choice import Tuned, as_number
from simulations.study.plan import label
from simulations.study.results import COSTS, Recorded
from simulations.study.spec import Study
from simulations.study.statistics import Ranking, estimate
from simulations.study.tuning import Tuning
from simulations.study.tuning_tables import Sensitivity, sensitivity, values_of
from simulations.study.values import Cell

FIGURES = "figures"
"""Their folder."""
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BAND = "#e9e9ee"
"""A colour that pages replace in their dark scheme."""
_AXES = {"bytes": "MiB sent and received, all clients", "seconds": "seconds"}


def all_figures(
    study: Study, runs: Sequence[Recorded], analysis: Analysis
) -> Iterator[tuple[str, Figure]]:
    """File names without ending, and figures: for each metric and setting the curves over each
    cost, for each metric the final values and the mean ranks, and what was tuned."""
    for metric in study.metrics:
        name = re.sub(r"[^\w.-]", "_", metric)
        yield f"{name}-final", final(study, metric, analysis)
        ranking = analysis.rankings.get(metric)
        if ranking is not None and ranking.critical is not None and study.compared:
            yield f"{name}-ranks", mean_ranks(metric, ranking, list(study.axes[study.compared]))
        for number, (setting, cells) in enumerate(settings(study).items()):
            for cost in COSTS:
                title = f"{metric}: {label(setting)}" if setting else metric
                figure = curves(title, cost, metric, cells, runs)
                if figure is not None:
                    yield f"{name}-by-{cost}-{number}", figure
    yield from sensitivities(study, analysis)


def settings(study: Study) -> dict[Cell, dict[str, Cell]]:
    """By setting of the other axes: the levels of the compared axis with their cells. Without a
    reference all cells are compared in one setting."""
    found: dict[Cell, dict[str, Cell]] = {}
    for cell in study.cells():
        if study.compared is None:
            found.setdefault((), {})[", ".join(level for _, level in cell)] = cell
            continue
        rest = tuple(pair for pair in cell if pair[0] != study.compared)
        found.setdefault(rest, {})[dict(cell)[study.compared]] = cell
    return found


def pen(index: int) -> dict[str, Any]:
    """Colour and style of the i-th level; a line that another one hides shows by its markers."""
    style = STYLES[index // len(COLOURS) % len(STYLES)]
    size = 4 if len(STYLES) <= index else 7 - index
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": style} | {
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": size,
    }


def curves(
    title: str, cost: str, metric: str, cells: Mapping[str, Cell], runs: Sequence[Recorded]
) -> Figure | None:
    """Mean over seeds by cost, with the interval as a band; None if there is nothing to draw.

    Evaluations are averaged round by round, over the seeds that have the round; so are their costs.
    """
    found = {name: _points(cost, metric, cell, runs) for name, cell in cells.items()}
    if not any(found.values()):
        return None

    def draw(ax: Axes) -> None:
        for index, (name, points) in enumerate(found.items()):
            if points:
                x, y, low, high = zip(*points, strict=True)
                ax.plot(x, y, label=name, **pen(index) | ({} if len(x) <= 30 else {"marker": ""}))
                ax.fill_between(x, low, high, color=pen(index)["color"], alpha=0.15, linewidth=0)
        if cost == "round":
            by_round(ax, title, metric)
            return
        ax.set_title(title)
        ax.set_xlabel(_AXES[cost])
        ax.set_ylabel(metric)

    return framed(draw, most=len(found))


def _points(
    cost: str, metric: str, cell: Cell, runs: Sequence[Recorded]
) -> list[tuple[float, float, float, float]]:
    """Mean cost, mean, low and high end of the interval, round by round."""
    by_round_: dict[float, dict[int, tuple[float, float]]] = {}
    for one in runs:
        if one.run.cell == cell:
            rounds, values = one.curve("round", metric)
            costs, _ = one.curve(cost, metric)
            for at, c, v in zip(rounds, costs, values, strict=True):
                by_round_.setdefault(at, {})[one.run.seed] = (c, v)
    scale = 2**20 if cost == "bytes" else 1
    points = []
    for _, pairs in sorted(by_round_.items()):
        got = estimate({seed: v for seed, (_, v) in pairs.items()})
        spent = estimate({seed: c / scale for seed, (c, _) in pairs.items()}).mean
        low = got.mean if got.low is None else got.low
        points.append((spent, got.mean, low, got.mean if got.high is None else got.high))
    return points


def final(study: Study, metric: str, analysis: Analysis) -> Figure:
    """A row for each cell: the mean at the end with its interval."""
    lines = [line for line in analysis.lines if line.quantity == Quantity(metric, FINAL)]
    levels = list(study.axes[study.compared]) if study.compared else []

    def draw(ax: Axes) -> None:
        for row, line in enumerate(lines):
            if line.estimate is None:
                continue
            mean, low, high = line.estimate.mean, line.estimate.low, line.estimate.high
            level = dict(line.cell).get(study.compared or "")
            colour = pen(levels.index(level) if level in levels else 0)["color"]
            ax.plot([mean], [row], "o", color=colour)
            if low is not None and high is not None:
                ax.plot([low, high], [row, row], "-", color=colour)
        ax.set_yticks(range(len(lines)), [", ".join(at for _, at in o.cell) for o in lines])
        ax.set_ylim(len(lines) - 0.5, -0.5)
        ax.set_title(f"{metric} at the end")
        ax.set_xlabel("mean and 95 % interval over seeds")

    return framed(draw, height=max(2.0, 0.9 + 0.28 * len(lines)))


def mean_ranks(metric: str, ranking: Ranking, levels: Sequence[str]) -> Figure:
    """The mean rank of each level of the compared axis, the best first; a band has those that
    Nemenyi's critical difference does not tell from it.

    Args:
        metric: that is ranked.
        ranking: with a critical difference.
        levels: in the order of their colours.
    """
    ordered = sorted(ranking.ranks.items(), key=lambda pair: pair[1])
    best, right = ordered[0][1], len(ordered) + 0.25

    def draw(ax: Axes) -> None:
        if ranking.critical is not None:
            ax.axvspan(best, min(best + ranking.critical, right), color=BAND, zorder=0)
        for row, (name, mean) in enumerate(ordered):
            ax.plot([mean], [row], "o", markersize=7, color=pen(levels.index(name))["color"])
        ax.set_yticks(range(len(ordered)), [name for name, _ in ordered])
        ax.set_ylim(len(ordered) - 0.5, -0.5)
        ax.set_xlim(0.75, right)
        ax.set_xticks(range(1, len(ordered) + 1))
        ax.set_title(f"{metric}: ranks")
        ax.set_xlabel(f"mean of {ranking.blocks} blocks, 1 is best; band: not told from the best")

    return framed(draw, height=max(2.0, 0.9 + 0.28 * len(ordered)))


def sensitivities(study: Study, analysis: Analysis) -> Iterator[tuple[str, Figure]]:
    """For each tuned key and setting of the groups' other axes: the metric by value, with standard
    deviations over tuning seeds; the chosen values are large."""
    if study.tuning is None:
        return
    for key in study.tuning.grid:
        found = sensitivity(key, study.tuning, analysis.tuned)
        settings: dict[Cell, dict[str, Tuned]] = {}
        for one in analysis.tuned:
            rest = tuple(pair for pair in one.group if pair[0] != study.compared)
            name = dict(one.group).get(study.compared or "", label(one.group) or "all cells")
            settings.setdefault(rest if rest != one.group else (), {})[name] = one
        for number, (setting, groups) in enumerate(settings.items()):
            name = f"sensitivity-{re.sub(r'[^A-Za-z0-9_.-]', '_', key)}-{number}"
            title = f"{key}: {label(setting)}" if setting else f"sensitivity to {key}"
            yield name, _by_value(title, key, study.tuning, groups, found)


def _by_value(
    title: str, key: str, tuning: Tuning, groups: Mapping[str, Tuned], found: Sensitivity
) -> Figure:
    values = values_of(found)
    numbers = [as_number(value) for value in values]
    known = [x for x in numbers if x is not None]
    plain = len(known) < len(values)  # words, at equal distances

    def draw(ax: Axes) -> None:
        for index, (name, one) in enumerate(groups.items()):
            of_group = found[one.group]
            points = [
                (float(values.index(v)) if plain else float(v), c.mean, c.spread or 0.0, c)
                for v, c in sorted(of_group.items(), key=lambda pair: values.index(pair[0]))
                if c.mean is not None
            ]
            if not points:
                continue
            x, y, spread, tried = zip(*points, strict=True)
            ax.errorbar(x, y, spread, label=name, capsize=3, **pen(index))
            best = [at for at, c in enumerate(tried) if c is one.chosen]
            large = {"linestyle": "", "markersize": 10}
            ax.plot([x[i] for i in best], [y[i] for i in best], **pen(index) | large)
        ax.set_title(title)
        ax.set_xlabel(key)
        ax.set_ylabel(f"{tuning.metric}, validation")
        if plain:
            ax.set_xticks(range(len(values)), values)
        elif min(known) > 0 and max(known) >= 4 * min(known):
            ax.set_xscale("log")
            ax.set_xticks(known, values)
            ax.minorticks_off()
        else:
            ax.set_xticks(known, values)

    return framed(draw, most=len(groups))


def png(figure: Figure) -> bytes:
    """A figure as a picture of 150 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def pdf(figure: Figure) -> bytes:
    """A figure as PDF, with the same bytes for the same records."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="pdf", metadata={"CreationDate": None})
    return buffer.getvalue()
