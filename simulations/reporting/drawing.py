"""What all figures have in common: style, axes, legends, and lines in the colours of runs.

Figures are built without pyplot, so nothing global is touched and any thread may draw.
"""

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator

from simulations.reporting.run_folder import Run

# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#555555")
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": "#444",
    "axes.edgecolor": "#bbb",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler("color", COLOURS),
    "grid.color": "#e9e9ee",
    "xtick.color": "#555",
    "ytick.color": "#555",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "svg.hashsalt": "fedlora",
    "svg.fonttype": "path",
}
Draw = Callable[[Axes], object]
Pen = Callable[[int], dict[str, Any]]


def svg(figure: Figure) -> str:
    """A figure as SVG text, with the same bytes for the same records."""
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


_INK = {"#000000": "ink", "#ffffff": "card", "#444444": "soft", "#555555": "soft"} | {
    "#bbbbbb": "line",
    "#e9e9ee": "grid",
    "#d6e6f2": "box",
    "#7a5195": "violet",
}
"""Colours of style `_STYLE` and of figures that follow the reader's scheme, light or dark."""
_SCHEMES = """<style>
:root { --ink: #000000; --card: #ffffff; --soft: #4a4a4a; --line: #bbbbbb; --grid: #e9e9ee;
  --box: #d6e6f2; --violet: #7a5195; fill: var(--ink); }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --card: #1b2029; --soft: #b4bccb;
  --line: #5a6372; --grid: #2a303b; --box: #23405a; --violet: #a884c6; } }
</style>"""


def adaptive(text: str) -> str:
    """An SVG in whose ink, axes and background follow the reader's colour scheme; data keep their
    colours where these are seen on either.

    Args:
        text: of `svg`.
    """
    start = text.index(">", text.index("<svg")) + 1
    body = re.sub(r"#[0-9a-f]{6}\b", _scheme_colour, text[start:])
    return text[:start] + _SCHEMES + body


def _scheme_colour(found: re.Match[str]) -> str:
    name = _INK.get(found[0])
    return f"var(--{name})" if name else found[0]


def framed(draw: Draw, width: float = 6.2, height: float = 3.6, most: int = 12) -> Figure:
    """Draw on new axes; the legend goes below them, where it hides nothing.

    Args:
        draw: draws.
        width: in inches.
        height: in inches, with a legend of few rows.
        most: entries of a legend; with more there is none.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        ax = figure.add_subplot()
        draw(ax)
        low, high = ax.dataLim.intervalx
        if low == high:
            ax.set_xlim(low - 0.5, low + 0.5)
        handles, labels = _keys(ax)
        if 1 < len(labels) <= most:
            points = sum(5.2 * len(label) + 42 for label in labels)  # of all in one row
            few = max(1, min(4, 64 // max(map(len, labels))))
            columns = len(labels) if points <= 72 * width else few
            rows = math.ceil(len(labels) / columns)
            figure.set_figheight(height + 0.19 * max(0, rows - 3))
            figure.legend(
                handles, labels, loc="outside lower center", ncols=columns, handlelength=2.6
            )
    return figure


def _keys(ax: Axes) -> tuple[list[Any], list[str]]:
    """The legend's entries: each label once, in grey where several runs' colours share it."""
    every, labels = ax.get_legend_handles_labels()
    first = dict(reversed(list(zip(labels, every, strict=True))))
    keys = {label: first[label] for label in dict.fromkeys(labels)}
    if len(keys) < len(labels):
        keys = {
            label: Line2D([], [], color="#666", linestyle=line.get_linestyle())
            for label, line in keys.items()
        }
    return list(keys.values()), list(keys)


def group_names(runs: Sequence[Run]) -> list[str]:
    """The evaluation groups of all runs; a group has the same style in all runs."""
    return list(dict.fromkeys(group for run in runs for group in run.groups()))


def pens(runs: Sequence[Run]) -> Iterator[tuple[Run, Pen]]:
    """Runs with how their i-th line is drawn.

    Colours tell the lines of one run apart. Among several runs colour is the run, which the page
    says once, and the legend tells line styles.
    """
    for index, run in enumerate(runs):
        if len(runs) == 1:
            yield run, lambda i: {"color": COLOURS[i % len(COLOURS)]}
        else:
            yield run, partial(_dashed, COLOURS[index % len(COLOURS)])


def _dashed(colour: str, i: int) -> dict[str, Any]:
    return {"color": colour, "linestyle": ("-", "--", ":", "-.")[i % 4], "dots": 2}


def line(
    ax: Axes,
    pair: tuple[Sequence[float], Sequence[float]],
    label: str,
    dots: int = 30,
    **pen: Any,
) -> None:
    """A line; its points are marked if there are at most so many."""
    x, y = pair
    if x:
        ax.plot(x, y, label=label, marker="o" if len(x) <= dots else "", **pen)


def byte_scale(runs: Sequence[Run]) -> tuple[float, str]:
    """A binary unit in which the traffic of all runs reads well."""
    most = max(
        (sum(run.series(f"wire/{w}_bytes")[1]) for run in runs for w in ("up", "down")), default=0
    )
    power = max((p for p in range(5) if most >= 1024**p), default=0)
    return 1024.0**power, ("B", "KiB", "MiB", "GiB", "TiB")[power]


def by_round(ax: Axes, title: str, unit: str) -> None:
    """Title and axes of a figure over the rounds."""
    ax.set_title(title)
    ax.set_xlabel("round")
    ax.set_ylabel(unit)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def categories(ax: Axes, labels: Sequence[str]) -> None:
    """Names along the horizontal axis, on their side if there are many."""
    crowded = len(labels) > 12
    ax.set_xticks(range(len(labels)), labels, rotation=60 if crowded else 0)
    ax.grid(visible=False, axis="x")


def stack(ax: Axes, x: Sequence[int], parts: Mapping[str, Sequence[float]]) -> None:
    """Stacked bars, one per round."""
    bottom = [0.0] * len(x)
    for name, values in parts.items():
        ax.bar(x, values, 0.7, bottom=bottom, label=name, alpha=0.85)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
