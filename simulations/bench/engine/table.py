"""The results of the engine benchmark, as text and as a picture."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulations.bench.engine.measure import (
    cores,
    fastest,
    limit,
    rate,
)
from simulations.bench.engine.sides import ENGINES
from simulations.bench.engine.sweeps import clock_of
from simulations.reporting.drawing import COLOURS

ROWS = (
    ("trainer", 1),
    ("peft loop", 1),
    ("peft loop", 2),
    *((engine, processes) for engine in ENGINES for processes in (1, 2)),
)
NAMES = {
    "trainer": "one Trainer per client",
    "peft loop": "plain PEFT loop",
    "sequential": "sequential engine",
    "padded": "fused, padded",
    "ragged": "fused, ragged, refill",
}
HEAD = (
    f"{'':<24}{'proc':>5}{'thr':>4}{'tokens/s':>10}{'(best)':>9}{'ms wall':>9}{'ms CPU':>8}"
    f"{'clients/s':>10}{'limit':>7}{'MB':>7}{'padding':>8}{'x loop':>8}{'d loss':>9}"
    f"{'d adapter':>10}"
)


def table(name: str, record: Mapping[str, Any]) -> str:
    """One row per side; the time of a client in ms, medians of the repeats."""
    lines = [
        f"{name}: {record['clients']} clients, {record['tokens']:,} tokens, "
        f"{record['flop'] / record['tokens'] / 1e6:.2f} MFLOP per token",
        HEAD,
    ]
    loop = fastest(record, "peft loop")
    for side, processes in ROWS:
        entry = fastest(record, side, processes)
        if entry is not None:
            lines.append(_row(record, entry, rate(loop) if loop else None))
    for side in dict.fromkeys(e["side"] for e in record["entries"].values()):
        error = next(e["error"] for e in record["entries"].values() if e["side"] == side)
        if error:
            lines.append(f"{NAMES[side]}: NOT MEASURED, {error}")
    peak = max(record["gemm_peaks"]) / 1e9
    for n in sorted({cores(e) for e in record["entries"].values()}):
        lines.append(
            f"{'physical limit':<24}{n:>5}{1:>4}{limit(record, n):>10.0f}"
            f"     {peak:.0f} GFLOP/s per core, {record['config']['dtype']}"
        )
    return "\n".join([*lines, *_scaling(record)])


def _row(record: Mapping[str, Any], entry: Mapping[str, Any], loop: float | None) -> str:
    n, found = entry["clients"], entry["repeats"]
    wall, cpu = (statistics.median(r[key] for r in found) for key in ("wall_s", "cpu_s"))
    share = rate(entry) / limit(record, cores(entry))
    note = "" if n == record["clients"] else f"  ({n} clients stand for all)"
    return (
        f"{NAMES[entry['side']]:<24}{entry['processes']:>5}{entry['threads']:>4}"
        f"{rate(entry):>10.0f}{rate(entry, best=True):>9.0f}{wall / n * 1e3:>9.2f}"
        f"{cpu / n * 1e3:>8.2f}{n / wall:>10.1f}{share:>7.1%}"
        f"{_or_dash(entry['peak_growth_mb'], '.0f'):>7}{_or_dash(entry['padding_share'], '.1%'):>8}"
        f"{_or_dash(loop and rate(entry) / loop, '.2f'):>8}"
        f"{_or_dash(entry['loss_difference'], '.0e'):>9}"
        f"{_or_dash(entry['adapter_difference'], '.0e'):>10}{note}"
    )


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _scaling(record: Mapping[str, Any]) -> list[str]:
    """What a second process brings."""
    lines = []
    for side in ("peft loop", *ENGINES):
        one, two = (fastest(record, side, n) for n in (1, 2))
        if one and two and one["threads"] == 1:
            best = rate(two, best=True) / rate(one, best=True)
            lines.append(
                f"{NAMES[side]}: two processes {rate(two) / rate(one):.2f}x one "
                f"({best:.2f}x by the best repeats)"
            )
    return lines


def write_plot(path: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Each case's sides as bars, on the scale of what the cores could do."""
    figure = Figure(figsize=(9, 0.6 + 2.1 * len(records)), layout="constrained")
    axes = figure.subplots(len(records), 1, squeeze=False, sharex=True)[:, 0]
    for ax, (name, record) in zip(axes, records.items(), strict=True):
        _bars(ax, name, record)
    axes[-1].set_xlabel("share of the physical limit (real tokens per second in the bars)")
    save(figure, path)


def _bars(ax: Axes, name: str, record: Mapping[str, Any]) -> None:
    found = [fastest(record, side, processes) for side, processes in reversed(ROWS)]
    entries = [e for e in found if e is not None]
    labels = [f"{NAMES[e['side']]}, {e['processes']} x {e['threads']}" for e in entries]
    shares = [rate(e) / limit(record, cores(e)) for e in entries]
    order = list(NAMES)
    colours = [COLOURS[order.index(e["side"])] for e in entries]
    bars = ax.barh(labels, shares, color=colours)
    ax.bar_label(bars, [f"{rate(e):,.0f}" for e in entries], padding=3, fontsize=7)
    ax.set_xlim(0, 1.08)
    ax.axvline(1, color="#444", linewidth=1)
    ax.set_title(name, loc="left", fontsize=9)
    ax.tick_params(labelsize=7)


def write_curves(path: Path, sweeps: Mapping[str, Mapping[str, Any]]) -> None:
    """Each sweep's sides as lines of speed over its points."""
    figure = Figure(figsize=(9, 2.8 * -(-len(sweeps) // 2)), layout="constrained")
    axes = figure.subplots(-(-len(sweeps) // 2), min(2, len(sweeps)), squeeze=False).ravel()
    for ax, (name, points) in zip(axes, sweeps.items(), strict=False):
        _curves(ax, name, points, clock_of(name))
    for ax in axes[len(sweeps) :]:
        ax.remove()
    save(figure, path)


def _curves(ax: Axes, name: str, points: Mapping[str, Any], clock: str) -> None:
    ways = dict.fromkeys(label for record in points.values() for label in record["entries"])
    for colour, way in zip(COLOURS, ways, strict=False):
        shares = [_share(record, way, clock) for record in points.values()]
        ax.plot(list(points), shares, marker="o", color=colour, label=way)
    ax.set_title(name, loc="left", fontsize=9)
    ax.set_ylim(0, 1)
    ax.set_ylabel("share of the limit", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=7)


def _share(record: Mapping[str, Any], way: str, clock: str) -> float:
    """Speed over the limit; not a number where it was not measured."""
    entry = record["entries"].get(way)
    if not entry or not entry["repeats"]:
        return float("nan")
    return rate(entry, clock=clock) / limit(record, cores(entry))


def save(figure: Figure, path: Path) -> None:
    """A small PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"font.family": "sans-serif"}):
        figure.savefig(path, format="png", dpi=90)
