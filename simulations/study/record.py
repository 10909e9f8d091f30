"""A study's results as one JSON file of the repository, from which docs/results.md is made."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fedlora.core.files import write_file
from fedlora.run.environment import environment
from simulations.study.analysis import FINAL, Analysis
from simulations.study.cost import Cost, cost_of
from simulations.study.runner import Progress, State
from simulations.study.spec import FOLDER, Study
from simulations.study.stages import warnings
from simulations.study.tables import missing_lines

DIGITS = 6


def record_of(
    study: Study,
    analysis: Analysis,
    tried: Sequence[Progress],
    standing: Sequence[Progress],
    command: str,
) -> dict[str, Any]:
    """All that documents say of a study: its question, a row for each cell, what it cost.

    Args:
        study: the study.
        analysis: of its complete runs.
        tried: its tuning runs.
        standing: its reported runs.
        command: that did it.
    """
    costs = {one.run.name: cost_of(one.folder) for one in (*tried, *standing)}
    known = [cost for cost in costs.values() if cost is not None]
    where = {k: v for k, v in environment().items() if k not in ("executable", "host")}
    return {
        "study": study.name,
        "question": question(study.name),
        "command": command,
        "axes": list(study.axes),
        "tuned": list(study.tuning.grid) if study.tuning else [],
        "metrics": list(study.metrics),
        "reference": list(study.reference) if study.reference else None,
        "rows": list(_rows(study, analysis, standing, costs)),
        "ranks": {
            metric: {"ranks": rank.ranks, "critical": rank.critical, "blocks": rank.blocks}
            for metric, rank in analysis.rankings.items()
        },
        "missing": [*missing_lines(analysis), *warnings(analysis.tuned)],
        "tuning": [one.record() for one in analysis.tuned],
        "cost": {
            "runs": sum(one.state is State.DONE for one in standing),
            "tuning_runs": sum(one.state in (State.DONE, State.PRUNED) for one in tried),
            "counted": len(known),
            "cpu_s": round(sum(cost.cpu_s for cost in known)),
            "wall_s": round(sum(cost.wall_s for cost in known)),
            "machines": sorted({name for cost in known for name in cost.machines}),
            "load": max((cost.load for cost in known), default=None),
        },
        "environment": where,
    }


def _rows(
    study: Study,
    analysis: Analysis,
    standing: Sequence[Progress],
    costs: Mapping[str, Cost | None],
) -> list[dict[str, Any]]:
    """A row for each cell: what its metrics are at the end and at budgets, and a run's cost."""
    rows: dict[Any, dict[str, Any]] = {}
    for line in analysis.lines:
        is_last = line.quantity.what == FINAL
        if not is_last and not line.quantity.what.startswith("at "):
            continue
        of_cell = [one for one in standing if one.run.cell == line.cell]
        known = [cost for one in of_cell if (cost := costs[one.run.name]) is not None]
        row = rows.setdefault(
            line.cell,
            {
                "cell": dict(line.cell),
                "values": analysis.values_of(study, line.cell),
                "complete": line.complete,
                "seeds": line.complete + len(line.missing),
                "cpu_s": round(fmean(c.cpu_s for c in known), 1) if known else None,
                "wall_s": round(fmean(c.wall_s for c in known), 1) if known else None,
                "metrics": {},
                "budgets": {},
            },
        )
        found = line.estimate
        numbers = [found.mean, found.low, found.high] if found else [None] * 3
        place = row["metrics"] if is_last else row["budgets"]
        name = line.quantity.metric
        place[name if is_last else f"{name}, {line.quantity.what}"] = {
            "interval": [None if x is None else round(x, DIGITS) for x in numbers],
            "p_holm": None if line.p_holm is None else round(line.p_holm, DIGITS),
        }
    return list(rows.values())


def question(name: str) -> str:
    """The comment that a study's file begins with; empty for a file outside conf/study."""
    file = FOLDER / f"{name}.yaml"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    said = []
    for line in lines:
        if not line.startswith("#"):
            break
        said.append(line.lstrip("# ").rstrip())
    return " ".join(said)


def write_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write the record into the folder of results; the file."""
    file = folder / f"study-{record['study']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return file
