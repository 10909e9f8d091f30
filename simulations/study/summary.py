"""The summary run of a study in a tracker such as W&B: its tables and figures beside its runs."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from fedlora.core.config import build
from fedlora.run.tracking import Findings, Silent, Tracking
from simulations.app.compose import load
from simulations.study.analysis import Analysis
from simulations.study.figures import png
from simulations.study.plan import Planned
from simulations.study.spec import Study
from simulations.study.tables import csv_table
from simulations.study.tracked import SUMMARY


def tracking_of(study: Study, runs: Sequence[Planned]) -> Tracking:
    """Where the summary goes: to the tracker of the first run, into the same group.

    Args:
        study: the study.
        runs: the reported ones.
    """
    if not runs or not runs[0].labels:
        return Silent()
    node = load(runs[0].words).tracking
    own = {"group": node.get("group") or study.name, "job_type": SUMMARY}
    for key in own.keys() & node.keys():
        node[key] = own[key]
    return build(node, Tracking, "tracking")  # type: ignore[type-abstract]


def write_summary(
    study: Study,
    tracking: Tracking,
    folder: Path,
    analysis: Analysis,
    figures: Sequence[tuple[str, Figure]],
) -> str:
    """Write the summary run; a sentence with what went wrong, empty if nothing did: a study ends
    well without its tracker.

    Args:
        study: the study.
        tracking: of `tracking_of`.
        folder: of the study, where the tracker keeps its files.
        analysis: of the complete runs.
        figures: with their names.
    """
    if isinstance(tracking, Silent):
        return ""
    columns, rows = csv_table(study, analysis)
    at = columns.index("metric")
    found = Findings(
        {
            "study": study.name,
            "axes": {axis: list(levels) for axis, levels in study.axes.items()},
            "seeds": list(study.all_seeds()),
            "base": list(study.base),
            "reference": dict([study.reference]) if study.reference else {},
        },
        {metric: (columns, [r for r in rows if r[at] == metric]) for metric in study.metrics},
        {name: png(figure) for name, figure in figures},
    )
    try:
        tracking.summarise(folder, f"study-{study.name}", found)
    except Exception as error:
        return f"no summary of the study is tracked: {type(error).__name__}: {error}"
    return ""
