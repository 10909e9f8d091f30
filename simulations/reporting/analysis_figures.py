"""The figures of a run's analyses (docs/analyses.md); None where nothing was recorded."""

from collections.abc import Iterable, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from fedlora.algebra.spectrum import REST, range_label
from fedlora.core.metric import TIER
from simulations.reporting.drawing import COLOURS, by_round, framed, line, pens
from simulations.reporting.run_folder import Run, number

ENERGY = "spectrum/energy_"
FAINT = 1e-4
"""The smallest share of the energy that has a colour of its own."""
Band = tuple[int, int]


def energy_map(run: Run) -> Figure | None:
    """The share of the global update's energy in each range of rank indices, over the rounds."""
    bands = _bands(run)
    rounds, _ = run.series(ENERGY + REST)
    if len(rounds) < 2 or not bands:
        return None
    step = int(np.diff(rounds).min())
    columns = list(range(rounds[0], rounds[-1] + 1, step))
    beyond = any(run.series(ENERGY + REST)[1])
    names = [range_label(*band) for band in bands] + ([REST] if beyond else [])
    shares = np.full((len(names), len(columns)), np.nan)
    for i, name in enumerate(names):
        found = dict(zip(*run.series(ENERGY + name), strict=True))
        shares[i] = [found.get(n, np.nan) for n in columns]
    ranks = held_ranks(run)

    def draw(ax: Axes) -> None:
        ends = (columns[0] - step / 2, columns[-1] + step / 2)
        image = ax.imshow(
            np.ma.masked_invalid(np.maximum(shares, FAINT)),
            aspect="auto",
            interpolation="nearest",
            origin="lower",
            extent=(*ends, -0.5, len(names) - 0.5),
            cmap=mpl.colormaps["cividis"],
            norm=LogNorm(FAINT, 1),
        )
        ax.grid(visible=False)
        for i, (_, last) in enumerate(bands):
            if last in ranks and i + 1 < len(names):
                ax.axhline(i + 0.5, color="#fefefe", linewidth=1.2, linestyle=(0, (4, 2)))
        labels = [f"> {bands[-1][1]}" if name == REST else name for name in names]
        ax.set_yticks(range(len(names)), labels)
        by_round(ax, "Energy of the global update by rank index", "rank index")
        bar = ax.get_figure().colorbar(image, ax=ax)  # type: ignore[union-attr]
        bar.set_label("share of ‖ΔW‖²")
        bar.set_ticks(
            [1, 0.1, 0.01, 0.001, FAINT], labels=["1", "0.1", "0.01", "0.001", "≤ 0.0001"]
        )
        bar.ax.minorticks_off()

    return framed(draw, height=4.0)


def energy_by_tier(run: Run) -> Figure | None:
    """The energy in the indices between one rank of the population and the next."""
    bands, ranks = _bands(run), sorted(held_ranks(run))
    shares: dict[str, tuple[list[int], list[float]]] = {}
    for low, high in zip([0, *ranks], ranks, strict=False):
        parts = [run.series(ENERGY + range_label(*b)) for b in bands if low < b[0] and b[1] <= high]
        if parts and parts[0][0]:
            sums: NDArray[np.float64] = np.sum([values for _, values in parts], axis=0)
            shares[range_label(low + 1, high)] = parts[0][0], sums.tolist()
    if len(shares) < 2:
        return None

    def draw(ax: Axes) -> None:
        for i, (name, (x, y)) in enumerate(shares.items()):
            shown = [v if v > 0 else np.nan for v in y]
            line(
                ax,
                (x, shown),
                f"{'indices' if '-' in name else 'index'} {name}",
                color=COLOURS[i % len(COLOURS)],
            )
        ax.set_yscale("log")
        if ax.get_ylim()[0] < FAINT**2:
            ax.set_ylim(bottom=FAINT**2)
        ax.yaxis.set_major_formatter("{x:g}")
        low, high = ax.get_ylim()
        ax.yaxis.set_minor_formatter("{x:.2g}" if high < 20 * low else NullFormatter())
        by_round(ax, "Energy in the indices of each rank", "share of ‖ΔW‖²")

    return framed(draw)


def ranks(runs: Sequence[Run]) -> Figure | None:
    """Effective and stable rank of the global update."""
    keys = {"effective": "spectrum/effective_rank", "stable": "spectrum/stable_rank"}

    def draw(ax: Axes) -> None:
        for run, pen in pens(runs):
            for i, (name, key) in enumerate(keys.items()):
                line(ax, run.series(key), name, **pen(i))
        ax.set_ylim(bottom=0)
        by_round(ax, "Rank of the global update", "mean over modules")

    return framed(draw) if any(r.series(k)[0] for r in runs for k in keys.values()) else None


def lost(run: Run) -> Figure | None:
    """What a tier's clients do not get of the global update, and what they cannot get."""
    found = {tier: run.series(f"{TIER}{tier}/lost") for tier in tiers(run)}
    found = {tier: pair for tier, pair in found.items() if pair[0]}

    def draw(ax: Axes) -> None:
        for i, (tier, pair) in enumerate(found.items()):
            line(ax, pair, tier, color=COLOURS[i % len(COLOURS)])
            least = run.series(f"{TIER}{tier}/truncation_error")
            name = "" if i else "the best of its rank"
            line(ax, least, name, dots=0, color="#888888", linestyle=":")
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        by_round(ax, "Lost of the global update, by tier", "‖ΔW − received‖ / ‖ΔW‖")

    return framed(draw) if found else None


def drift_norm(run: Run) -> Figure | None:
    """How far the clients of a tier move in a round."""
    return _by_tier(run, "norm", "How far clients move, by tier", "‖ΔWₖ‖", low=0.0)


def drift_cosine(run: Run) -> Figure | None:
    """How much the clients of a tier move in the direction of the mean."""
    return _by_tier(run, "cosine", "Do clients move with the mean?", "cosine to the mean change")


def _by_tier(run: Run, of: str, title: str, unit: str, low: float | None = None) -> Figure | None:
    """Means of a client's number, with a band of one standard deviation, by tier."""
    keys = {tier: f"{TIER}{tier}/drift_{of}" for tier in tiers(run)}
    keys = {tier: key for tier, key in keys.items() if run.series(key)[0]}
    keys |= {"all": f"drift/{of}"} if run.series(f"drift/{of}")[0] else {}

    def draw(ax: Axes) -> None:
        for i, (tier, key) in enumerate(keys.items()):
            x, y = run.series(key)
            whole = tier == "all"
            colour = "#555555" if whole and len(keys) > 1 else COLOURS[i % len(COLOURS)]
            line(ax, (x, y), tier, color=colour, linestyle="--" if whole and i else "-")
            spread = dict(zip(*run.series(f"{key}_std"), strict=True))
            if not whole or len(keys) == 1:
                lower = [v - spread.get(n, 0.0) for n, v in zip(x, y, strict=True)]
                upper = [v + spread.get(n, 0.0) for n, v in zip(x, y, strict=True)]
                ax.fill_between(x, lower, upper, color=colour, alpha=0.14, linewidth=0)
        if low is not None:
            ax.set_ylim(bottom=low)
        by_round(ax, title, unit)

    return framed(draw) if keys else None


def diversity(runs: Sequence[Run]) -> Figure | None:
    """Gradient diversity: how much larger clients' changes are than what is left in their mean."""
    key = "drift/diversity"

    def draw(ax: Axes) -> None:
        for run, pen in pens(runs):
            line(ax, run.series(key), "", **pen(0))
        ax.set_ylim(bottom=min(1.0, ax.get_ylim()[0]))
        ax.yaxis.set_major_locator(MaxNLocator(5))
        by_round(ax, "Diversity of the clients' changes", "Σ p ‖ΔWₖ‖² / ‖Σ p ΔWₖ‖²")

    return framed(draw) if any(r.series(key)[0] for r in runs) else None


def tiers(run: Run, more: Iterable[str] = ()) -> list[str]:
    """The tiers, in the order of the configuration where it is known.

    Args:
        run: whose records name some.
        more: further ones.
    """
    named = [str(t) for t in run.population.get("tiers", {})]
    rows = (*run.rounds, *run.evaluations)
    found = dict.fromkeys(
        key.removeprefix(TIER).partition("/")[0]
        for row in rows
        for key in row
        if key.startswith(TIER)
    ) | dict.fromkeys(more)
    return [t for t in named if t in found] + sorted(t for t in found if t not in named)


def held_ranks(run: Run) -> set[int]:
    """The ranks of the population's clients, of any module."""
    labels = run.population.get("ranks", {})
    return {int(r) for label in labels for r in str(label).split("/") if r.isdigit()}


def _bands(run: Run) -> list[Band]:
    """The ranges of rank indices on record, in order."""
    found = []
    for row in run.rounds:
        for key in row:
            first, _, last = key.removeprefix(ENERGY).partition("-")
            if key.startswith(ENERGY) and first.isdigit() and number(row[key]) is not None:
                found.append((int(first), int(last or first)))
    return sorted(set(found))
