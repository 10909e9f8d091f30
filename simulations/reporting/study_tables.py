"""The tables of recorded studies (``docs/results/study-<name>.json``) in docs/results.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.core.reading import json_in
from fedlora.run.progress import clock
from simulations.reporting.tables import FOLDERS, Records, code, markdown

NONE = "No study has been recorded yet."
SHOWN = 8
"""Lines about what is missing that a document has."""


def studies(records: Records) -> str:
    """All recorded studies: question, command, cost, a row for each cell, what is missing."""
    files = sorted((records.root / FOLDERS[0]).glob("study-*.json"))
    return "\n\n".join(_study(json_in(file, "the record of a study")) for file in files) or NONE


def rank_collapse(records: Records) -> str:
    """Energy by rank index, measured and predicted (``simulations.bench.collapse``)."""
    if not records.has("collapse"):
        return f"Not recorded yet: {code('python -m simulations.bench.collapse')}."
    return collapse_table(records["collapse"])


def collapse_table(record: Mapping[str, Any]) -> str:
    """Ranges of rank indices as rows; what was measured and predicted after some rounds."""
    shares, rounds = record["found"], record["rounds"]
    heads = [f"{name}, {at}" for at in rounds for name in shares]
    labels = next(iter(shares.values()))
    rows = [
        [label, *(f"{of[label][i]:.1e}" for i in range(len(rounds)) for of in shares.values())]
        for label in labels
    ]
    return markdown(["rank index", *heads], rows)


def _study(found: Mapping[str, Any]) -> str:
    parts = [f"### {found['study']}", found["question"], _cost(found), _table(found)]
    if found["reference"]:
        axis, level = found["reference"]
        star = (
            f"Mean over seeds [95 % interval]; \\*: differs from {axis} {level}, p (Holm) < 0.05."
        )
        parts.append(star)
    parts += [_ranks(metric, rank) for metric, rank in found["ranks"].items() if rank["blocks"] > 1]
    parts += [_to_come(found["rows"]), "\n".join(f"- {line}" for line in _said(found))]
    return "\n\n".join(part for part in parts if part)


def _cost(found: Mapping[str, Any]) -> str:
    cost = found["cost"]
    runs = f"{cost['runs']} runs" + (
        f" after {cost['tuning_runs']} of tuning" if cost["tuning_runs"] else ""
    )
    if not cost["counted"]:
        return f"{code(found['command'])}: {runs}; their cost was not recorded."
    return (
        f"{code(found['command'])}: {runs}, {cost['cpu_s']:,} CPU seconds, {clock(cost['wall_s'])} "
        f"of wall time one after another, on {', '.join(cost['machines'])} at a load of up to "
        f"{cost['load']:.1f}."
    )


def _to_come(rows: Sequence[Mapping[str, Any]]) -> str:
    """How much of a study has not been run."""
    waiting = sum(not row["complete"] for row in rows)
    return f"{waiting} of {len(rows)} cells have no complete run yet." if waiting else ""


def _said(found: Mapping[str, Any]) -> list[str]:
    """What is missing in cells that have a complete run, its first lines."""
    cells = (row["cell"] for row in found["rows"] if not row["complete"])
    waiting = {", ".join(f"{axis} {level}" for axis, level in cell.items()) for cell in cells}
    lines = [line for line in found["missing"] if line.partition(": ")[0] not in waiting]
    more = [f"and {len(lines) - SHOWN} more in the record"] if len(lines) > SHOWN else []
    return lines[:SHOWN] + more


def _table(found: Mapping[str, Any]) -> str:
    metric = next(iter(found["metrics"]), "")
    budgets = list(dict.fromkeys(k for row in found["rows"] for k in row.get("budgets", {})))
    budgets = [k for k in budgets if k.startswith(f"{metric}, ")]
    heads = [*found["axes"], *found["tuned"], "seeds", *found["metrics"], *budgets]
    heads += ["CPU s", "wall s"]
    rows = []
    for row in found["rows"]:
        if not row["complete"]:
            continue
        cells = [*row["cell"].values(), *(row["values"].get(key, "") for key in found["tuned"])]
        cells.append(f"{row['complete']} of {row['seeds']}")
        cells += [_value(row["metrics"].get(metric)) for metric in found["metrics"]]
        cells += [_value(row.get("budgets", {}).get(budget)) for budget in budgets]
        cells += [_seconds(row["cpu_s"]), _seconds(row["wall_s"])]
        rows.append(cells)
    return markdown(heads, rows)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _value(found: Mapping[str, Any] | None) -> str:
    if found is None or found["interval"][0] is None:
        return "–"
    mean, low, high = found["interval"]
    spread = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    star = "\\*" if found["p_holm"] is not None and found["p_holm"] < 0.05 else ""
    return f"{mean:.3f}{star}{spread}"


def _ranks(metric: str, found: Mapping[str, Any]) -> str:
    ordered = sorted(found["ranks"].items(), key=lambda pair: pair[1])
    listed = ", ".join(f"{name} {rank:.2f}" for name, rank in ordered)
    critical = "" if found["critical"] is None else f"; critical difference {found['critical']:.2f}"
    return f"Mean ranks by {metric} over {found['blocks']} blocks{critical}: {listed}."
