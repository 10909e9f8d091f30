"""The figures of a run, each a function of its records; None where there is nothing to draw."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from simulations.reporting.drawing import (
    COLOURS,
    by_round,
    byte_scale,
    categories,
    framed,
    group_names,
    line,
    pens,
    stack,
)
from simulations.reporting.run_folder import (
    Run,
    number,
    rank_order,
)


def loss(runs: Sequence[Run]) -> Figure | None:
    """Training loss and evaluation loss over the rounds."""
    groups = group_names(runs)

    def draw(ax: Axes) -> None:
        for run, pen in pens(runs):
            line(ax, run.series("train/loss"), "train", **pen(0))
            for group, pair in run.evaluated(run.eval_loss).items():
                line(ax, pair, group, **pen(1 + groups.index(group)))
        by_round(ax, "Loss", _units(runs))

    present = any(r.series("train/loss")[0] or r.evaluated(r.eval_loss) for r in runs)
    return framed(draw) if present else None


def rouge(runs: Sequence[Run]) -> Figure | None:
    """ROUGE-L of generated answers over the rounds, with the interval over clients."""
    groups = group_names(runs)

    def draw(ax: Axes) -> None:
        for run, pen in pens(runs):
            lows, highs = run.evaluated("rouge_l_low"), run.evaluated("rouge_l_high")
            for group, pair in run.evaluated("rouge_l").items():
                i = groups.index(group)
                line(ax, pair, group, **pen(i))
                if (
                    (i == 0 or len(runs) == 1)
                    and group in lows
                    and lows[group][0] == highs.get(group, ([], []))[0]
                ):
                    band = (*lows[group], highs[group][1])
                    ax.fill_between(*band, color=pen(i)["color"], alpha=0.14, linewidth=0)
        by_round(ax, "ROUGE-L of generated answers", "mean over clients, 95 % interval")

    return framed(draw) if any(r.evaluated("rouge_l") for r in runs) else None


def _units(runs: Sequence[Run]) -> str:
    return ", ".join(dict.fromkeys(run.unit for run in runs))


def accuracy(runs: Sequence[Run]) -> Figure | None:
    """Fraction of response tokens that the model predicts first."""
    runs = [run for run in runs if not run.classifies]
    groups = group_names(runs)

    def draw(ax: Axes) -> None:
        for run, pen in pens(runs):
            for group, pair in run.evaluated("accuracy").items():
                line(ax, pair, group, **pen(groups.index(group)))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        by_round(ax, "Next-token accuracy on responses", "")

    return framed(draw) if any(r.evaluated("accuracy") for r in runs) else None


def traffic(runs: Sequence[Run]) -> Figure | None:
    """Bytes that all clients together have sent and received so far."""
    scale, unit = byte_scale(runs)

    def draw(ax: Axes) -> None:
        for run, pen in pens(runs):
            for i, way in enumerate(("up", "down")):
                x, y = run.series(f"wire/{way}_bytes")
                sent = [v / scale for v in accumulate(y)]
                line(ax, (x, sent), way, **pen(i) | {"linestyle": ("-", "--")[i]})
        ax.set_ylim(bottom=0)
        by_round(ax, "Traffic so far, all clients", unit)

    return framed(draw) if any(r.series("wire/up_bytes")[0] for r in runs) else None


def quality_per_byte(runs: Sequence[Run]) -> Figure | None:
    """Evaluation loss against the bytes sent up until then: the benefit of communication."""
    scale, unit = byte_scale(runs)
    groups = group_names(runs)

    def draw(ax: Axes) -> None:
        for run, pen in pens(runs):
            x, y = run.series("wire/up_bytes")
            sent = {0: 0.0} | dict(zip(x, (v / scale for v in accumulate(y)), strict=True))
            for group, pair in run.evaluated(run.eval_loss).items():
                points = [(sent[n], v) for n, v in zip(*pair, strict=True) if n in sent]
                traffic_so_far, losses = [b for b, _ in points], [v for _, v in points]
                line(ax, (traffic_so_far, losses), group, **pen(groups.index(group)))
        ax.set_title("Evaluation loss by traffic")
        ax.set_xlabel(f"sent up so far, all clients, {unit}")
        ax.set_ylabel(_units(runs))

    present = any(r.evaluated(r.eval_loss) and r.series("wire/up_bytes")[0] for r in runs)
    return framed(draw) if present else None


def seconds(run: Run) -> Figure | None:
    """The time of each round by activity."""
    x, total = run.series("round/seconds")
    if not x:
        return None
    evaluating: dict[int, float] = defaultdict(float)
    for row in run.evaluations:
        evaluating[int(row["round"])] += number(row.get("round/evaluate_seconds")) or 0.0
    training, aggregating = (
        dict(zip(*run.series(f"round/{part}_seconds"), strict=True))
        for part in ("train", "aggregate")
    )
    rest = [
        max(0.0, t - training.get(n, 0) - aggregating.get(n, 0))
        for n, t in zip(x, total, strict=True)
    ]

    def draw(ax: Axes) -> None:
        parts = {
            "train": [training.get(n, 0.0) for n in x],
            "aggregate": [aggregating.get(n, 0.0) for n in x],
            "other": rest,
            "evaluate": [evaluating[n] for n in x],
        }
        parts = {name: values for name, values in parts.items() if max(values) > 0}
        if len(x) > 30:
            ax.stackplot(x, *parts.values(), labels=list(parts), alpha=0.85)
        else:
            stack(ax, x, parts)
        ax.set_ylim(bottom=0)
        by_round(ax, "Seconds per round", "s")

    return framed(draw)


def ranks(run: Run) -> Figure | None:
    """The ranks of all clients, and of those that took part."""
    held = Counter({str(k): int(v) for k, v in run.population.get("ranks", {}).items()})
    took = Counter(str(row["rank"]) for row in run.clients if "rank" in row)
    labels = sorted(held | took, key=rank_order)
    if not labels:
        return None

    def draw(ax: Axes) -> None:
        both = ((held, "held by clients"), (took, "trained by participants"))
        shown = [(counts, name) for counts, name in both if counts]
        width = 0.8 / len(shown)
        for i, (counts, name) in enumerate(shown):
            at = [j + (i - (len(shown) - 1) / 2) * width for j in range(len(labels))]
            total = sum(counts.values())
            bars = ax.bar(
                at, [counts[k] / total for k in labels], width * 0.92, label=f"{name} ({total:,})"
            )
            if len(labels) <= 10:
                texts = [f"{counts[k]:,}" for k in labels]
                ax.bar_label(bars, texts, fontsize=8, color="#555", padding=2)
        categories(ax, labels)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.set_title("Clients by LoRA rank")
        ax.set_xlabel("rank (in the order of the modules where they differ)")

    return framed(draw)


def by_rank(run: Run, key: str, title: str, unit: str, log: bool = False) -> Figure | None:
    """A metric of the clients over all rounds: one box per rank, outliers left out."""
    groups: dict[str, list[float]] = {}
    for row in run.clients:
        value = number(row.get(key))
        if value is not None:
            groups.setdefault(str(row.get("rank", "")), []).append(value)
    labels = sorted(groups, key=rank_order)
    if not labels:
        return None

    def draw(ax: Axes) -> None:
        boxes = ax.boxplot(
            [groups[k] for k in labels],
            positions=range(len(labels)),
            widths=0.55,
            showfliers=False,
            patch_artist=True,
            medianprops={"color": COLOURS[1], "linewidth": 1.8},
            whiskerprops={"color": "#888"},
            capprops={"color": "#888"},
            boxprops={"facecolor": "#d6e6f2", "edgecolor": COLOURS[0]},
        )
        assert len(boxes["boxes"]) == len(labels)
        categories(ax, labels)
        if log:
            ax.set_yscale("log")
        ax.set_title(title)
        ax.set_xlabel("rank")
        ax.set_ylabel(unit)

    return framed(draw)


def histogram(run: Run, key: str, title: str, unit: str) -> Figure | None:
    """The distribution of a metric over the clients of the first and of the last round."""
    rows = [(int(r["round"]), v) for r in run.clients if (v := number(r.get(key))) is not None]
    if not rows:
        return None
    ends = dict.fromkeys((min(n for n, _ in rows), max(n for n, _ in rows)))
    shown = {n: [v for m, v in rows if m == n] for n in ends}
    return _histogram({f"round {n}": column for n, column in shown.items()}, title, unit)


def examples(run: Run) -> Figure | None:
    """The distribution of the number of examples over the clients that took part."""
    held = {r["client"]: v for r in run.clients if (v := number(r.get("examples"))) is not None}
    title = "Training examples by client, each that took part once"
    return _histogram({"clients": list(held.values())}, title, "examples") if held else None


def _bins(column: Sequence[float], low: float, high: float) -> dict[str, Any]:
    """One bin for each whole number where there are few of them; else by the number of values."""
    if high - low < 30 and all(v == int(v) for v in (low, high, *column)):
        return {"bins": int(high - low) + 1, "range": (low - 0.5, high + 0.5), "rwidth": 0.9}
    inside = (low, high) if high > low else (low - 0.5, low + 0.5)
    return {"bins": min(30, max(8, len(column) // 3)), "range": inside}


def _histogram(shown: Mapping[str, Sequence[float]], title: str, unit: str) -> Figure:
    values = [v for column in shown.values() for v in column]

    def draw(ax: Axes) -> None:
        low, high = min(values), max(values)
        for name, column in shown.items():
            ax.hist(
                column,
                **_bins(column, low, high),
                alpha=0.55,
                label=f"{name} ({len(column):,})",
            )
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(title)
        ax.set_xlabel(unit)
        ax.set_ylabel("clients")

    return framed(draw)


def energy(run: Run) -> Figure | None:
    """The fraction of the global update's energy in its leading singular directions."""
    prefix = "aggregate/energy_at_rank_"
    labels = [label for label in run.suffixes(prefix) if label.isdigit()]
    rows = [r for r in run.rounds if any(number(r.get(prefix + k)) is not None for k in labels)]
    if not rows:
        return None
    picked = {r["round"]: r for r in (rows[0], rows[len(rows) // 2], rows[-1])}

    def draw(ax: Axes) -> None:
        for row in picked.values():
            pairs = [(int(k), v) for k in labels if (v := number(row.get(prefix + k))) is not None]
            x, y = zip(*pairs, strict=True)
            ax.plot(x, y, marker="o", label=f"round {row['round']}")
        ax.set_xscale("log", base=2)
        ax.set_xticks([int(k) for k in labels], labels)
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_title("Energy in the leading directions of the global update")
        ax.set_xlabel("rank")
        ax.set_ylabel("share of ‖ΔW‖²")

    return framed(draw)


def truncation(run: Run) -> Figure | None:
    """The error for a client of each rank when the global update is truncated to its rank."""
    prefix = "aggregate/truncation_error_"
    lines = {k: run.series(prefix + k) for k in run.suffixes(prefix)}
    lines = {k: pair for k, pair in lines.items() if pair[0]}

    def draw(ax: Axes) -> None:
        for i, (label, pair) in enumerate(lines.items()):
            line(ax, pair, f"rank {label}", color=COLOURS[i % len(COLOURS)])
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        by_round(ax, "Lost when the global update is cut to a client's rank", "‖ΔW − cut‖ / ‖ΔW‖")

    return framed(draw) if lines else None


def exactness(runs: Sequence[Run]) -> Figure | None:
    """The distance between the aggregate and the mean of the clients' updates."""
    key = "aggregate/exactness_gap_relative"
    plain = not any(r.series(key)[0] for r in runs)
    key = "aggregate/exactness_gap" if plain else key

    def draw(ax: Axes) -> None:
        for run, pen in pens(runs):
            line(ax, run.series(key), "", **pen(0))
        ax.set_ylim(bottom=0)
        if not plain:
            ax.set_ylim(top=max(ax.get_ylim()[1], 0.001))  # rounding noise is drawn as none
            ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        unit = "‖ΔW − Σ p ΔWₖ‖" + ("" if plain else " / ‖Σ p ΔWₖ‖")
        by_round(ax, "Distance of the aggregate from the exact mean", unit)

    return framed(draw) if any(r.series(key)[0] for r in runs) else None


def update_norm(runs: Sequence[Run]) -> Figure | None:
    """The size of the mean update."""
    key = "aggregate/update_norm"

    def draw(ax: Axes) -> None:
        for run, pen in pens(runs):
            line(ax, run.series(key), "", **pen(0))
        ax.set_ylim(bottom=0)
        by_round(ax, "Norm of the mean update", "‖Σ p ΔWₖ‖")

    return framed(draw) if any(r.series(key)[0] for r in runs) else None
