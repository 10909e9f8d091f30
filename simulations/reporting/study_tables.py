"""The tables of recorded studies (``docs/results/study-<name>.json``) in docs/results.md."""

from collections.abc import Mapping
from typing import Any

from fedlora.core.reading import json_in
from fedlora.run.progress import clock
from simulations.reporting.tables import FOLDERS, Records, code, markdown

NONE = "No study has been recorded yet."


def studies(records: Records) -> str:
    """All recorded studies: question, command, cost, a row for each cell, what is missing."""
    files = sorted((records.root / FOLDERS[0]).glob("study-*.json"))
    return "\n\n".join(_study(json_in(file, "the record of a study")) for file in files) or NONE


def _study(found: Mapping[str, Any]) -> str:
    parts = [f"### {found['study']}", found["question"], _cost(found), _table(found)]
    if found["reference"]:
        axis, level = found["reference"]
        star = (
            f"Mean over seeds [95 % interval]; \\*: differs from {axis} {level}, p (Holm) < 0.05."
        )
        parts.append(star)
    parts += [_ranks(metric, rank) for metric, rank in found["ranks"].items()]
    parts.append("\n".join(f"- {line}" for line in found["missing"]))
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


def _table(found: Mapping[str, Any]) -> str:
    heads = [*found["axes"], *found["tuned"], "seeds", *found["metrics"], "CPU s", "wall s"]
    rows = []
    for row in found["rows"]:
        cells = [*row["cell"].values(), *(row["values"].get(key, "") for key in found["tuned"])]
        cells.append(f"{row['complete']} of {row['seeds']}")
        cells += [_value(row["metrics"].get(metric)) for metric in found["metrics"]]
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
