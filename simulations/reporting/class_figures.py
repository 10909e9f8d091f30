"""The figures of a classification: accuracy over rounds and over clients, labels of clients."""

import itertools
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from simulations.reporting.drawing import (
    COLOURS,
    by_round,
    framed,
    group_names,
    line,
    pens,
)
from simulations.reporting.run_folder import Run, number

ROWS = 300
"""Clients of which the labels are drawn."""


def accuracy(runs: Sequence[Run]) -> Figure | None:
    """Fraction of all examples that are predicted right; the band reaches down to the mean of the
    worst tenth of the clients."""
    runs = [run for run in runs if run.evaluated("accuracy_weighted") and run.classifies]
    groups = group_names(runs)

    def draw(ax: Axes) -> None:
        for run, pen in pens(runs):
            worst = run.evaluated("accuracy_worst_tenth")
            for group, (x, y) in run.evaluated("accuracy_weighted").items():
                i = groups.index(group)
                line(ax, (x, y), group, **pen(i))
                if group in worst and worst[group][0] == x and (i == 0 or len(runs) == 1):
                    ax.fill_between(x, worst[group][1], y, color=pen(i)["color"], alpha=0.14, lw=0)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        by_round(ax, "Accuracy", "of all examples")

    return framed(draw) if runs else None


def client_accuracy(run: Run) -> Figure | None:
    """The distribution of accuracy over the clients of the last evaluation."""
    shown = {}
    for group, rows in run.last_clients().items() if run.classifies else ():
        values = [v for r in rows if (v := number(r["metrics"].get("accuracy"))) is not None]
        if values:
            shown[group] = values

    def draw(ax: Axes) -> None:
        for (group, values), colour in zip(shown.items(), itertools.cycle(COLOURS), strict=False):
            ax.ecdf(values, label=f"{group} ({len(values):,})", color=colour)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0))
        ax.set_title("Accuracy by client, last evaluation")
        ax.set_xlabel("accuracy")
        ax.set_ylabel("clients with at most this")

    return framed(draw) if shown else None


def label_counts(run: Run) -> Figure | None:
    """How many training examples of each label each client holds."""
    names, held = run.labels.get("labels", []), run.labels.get("train", [])
    if not names or not held:
        return None
    counts = np.zeros((min(ROWS, len(held)), len(names)))
    for client, row in enumerate(held[:ROWS]):
        for label, examples in row:
            counts[client, label] = examples

    def draw(ax: Axes) -> None:
        colours = mpl.colormaps["cividis"].with_extremes(bad="#f2f4f7")
        image = ax.imshow(
            np.ma.masked_equal(counts, 0),
            aspect="auto",
            interpolation="nearest",
            cmap=colours,
            norm=LogNorm(1, max(2, counts.max())),
        )
        ax.grid(visible=False)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        part = "" if len(held) <= ROWS else f", first {ROWS:,} of {len(held):,} clients"
        ax.set_title(f"Training examples by client and label{part}")
        ax.set_xlabel(f"label (of {len(names)})")
        ax.set_ylabel("client")
        ax.get_figure().colorbar(image, ax=ax, label="examples")  # type: ignore[union-attr]

    return framed(draw)
