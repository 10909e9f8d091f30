"""The tables of a classification: distribution over clients, tiers, the worst classes."""

from collections.abc import Sequence

from fedlora.core.confusion import ClassScore, Confusion, added
from fedlora.core.metric import TIER
from simulations.reporting.run_folder import Record, Run
from simulations.reporting.run_tables import MEASURES, Cell, Table, show

WORST = 10
"""Classes that are shown."""
_SPREAD = {
    "_worst_tenth": "worst tenth",
    "_std": "standard deviation",
    "_p10": "10 % quantile",
    "_p90": "90 % quantile",
    "_gini": "Gini",
    "_jain": "Jain",
}


def spread_table(run: Run) -> Table | None:
    """How far clients are apart in the last evaluation of every group."""
    rows = []
    for label, records in run.groups().items():
        last = records[-1]
        for key in last:
            name = key.removesuffix("_worst_tenth")
            if name != key:
                cells = [Cell(label, "key"), Cell(MEASURES.get(name, name))]
                cells += [Cell(show(last.get(name + end)), "n") for end in ("", *_SPREAD)]
                rows.append(cells)
    names = [Cell("group"), Cell("metric"), *(Cell(n, "n") for n in ("mean", *_SPREAD.values()))]
    note = "Over the clients of the last evaluation; the worst tenth has at least one of them."
    return Table("Spread over clients", rows, names, note) if rows else None


def tier_table(run: Run) -> Table | None:
    """The last evaluation of every group by tier."""
    last = {label: records[-1] for label, records in run.groups().items()}
    found = {label: _by_tier(record) for label, record in last.items()}
    held = [values for tiers in found.values() for values in tiers.values()]
    metrics = [m for m in dict.fromkeys(m for values in held for m in values) if m != "clients"]
    order = list(run.population.get("tiers", {}))
    rows = []
    for label, tiers in found.items():
        for tier in sorted(tiers, key=lambda t: order.index(t) if t in order else len(order)):
            values = tiers[tier]
            clients = f"{values.pop('clients'):.0f}"
            cells = [Cell(text, "n") for text in (clients, *(show(values.get(m)) for m in metrics))]
            rows.append([Cell(label, "key"), Cell(tier), *cells])
    titles = ("clients", *(MEASURES.get(m, m) for m in metrics))
    names = [Cell("group"), Cell("tier"), *(Cell(title, "n") for title in titles)]
    return Table("By tier", rows, names, "Of all examples of a tier's clients.") if rows else None


def _by_tier(record: Record) -> dict[str, dict[str, float]]:
    """Tiers with their metrics by name."""
    tiers: dict[str, dict[str, float]] = {}
    for key, value in record.items():
        if key.startswith(TIER):
            tier, _, metric = key.removeprefix(TIER).rpartition("/")
            tiers.setdefault(tier, {})[metric] = value
    return tiers


def class_table(run: Run) -> Table | None:
    """The classes with the lowest F1 in the last evaluation of the first group that has counts."""
    names = [str(name) for name in run.labels.get("labels", ())]
    for label, rows in run.last_clients().items() if names else ():
        tables = [
            Confusion(len(names), tuple(map(tuple, counts)))
            for row in rows
            if (counts := row.get("counts", {}).get("macro_f1"))
        ]
        if tables:
            return _class_table(added(tables).by_class, names, label, rows[-1]["round"])
    return None


def _class_table(scores: Sequence[ClassScore], names: list[str], group: str, n: int) -> Table:
    worst = sorted(scores, key=lambda score: (score.f1, -score.true))[:WORST]
    rows = []
    for score in worst:
        mistaken = list(score.mistaken_for.items())[:3]
        values = [str(score.true), *map(show, (score.precision, score.recall, score.f1))]
        texts = ", ".join(f"{names[other]} ({count})" for other, count in mistaken)
        rows.append([Cell(names[score.label], "key"), *(Cell(v, "n") for v in values), Cell(texts)])
    heads = ("examples", "precision", "recall", "F1")
    note = f"Of {len(scores)} classes with test examples: {group}, round {n}, all clients together."
    columns = [Cell("class"), *(Cell(h, "n") for h in heads), Cell("most confused with (examples)")]
    return Table(f"The {len(worst)} worst classes", rows, columns, note)
