"""report.html of a study: one file, no server, tables that sort and filter, figures as SVG."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from fedlora.core.package import places
from simulations.reporting.drawing import svg
from simulations.reporting.report import TEMPLATES
from simulations.study.analysis import FINAL, Analysis
from simulations.study.spec import Study
from simulations.study.stages import warnings
from simulations.study.tables import (
    interval,
    missing_lines,
    p_text,
    seeds_text,
)
from simulations.study.tuning_tables import NOTHING, basis, score_text

PAGE = "report.html"


@dataclass(frozen=True)
class Entry:
    """A table's cell: what it shows, and what it sorts by."""

    text: str
    key: str


def report_html(study: Study, analysis: Analysis, figures: Sequence[tuple[str, Figure]]) -> str:
    """The page.

    Args:
        study: the study.
        analysis: of its complete runs.
        figures: with their names, as `simulations.study.figures.all_figures` draws them.
    """
    environment = Environment(
        loader=FileSystemLoader(list(places(TEMPLATES))),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    values: dict[str, Any] = {
        "title": f"study {study.name}",
        "name": study.name,
        "heads": [*study.axes, "metric", "what", "seeds", "mean", "difference", "p", "p (Holm)"],
        "rows": _rows(analysis),
        "final": FINAL,
        "metrics": list(study.metrics),
        "reference": " ".join(study.reference) if study.reference else "",
        "rankings": [_ranking(metric, analysis) for metric in analysis.rankings],
        "missing": [*missing_lines(analysis), *warnings(analysis.tuned)],
        "tuning": _tuning(study, analysis),
        "figures": [(name, themed(svg(figure), name)) for name, figure in figures],
    }
    return environment.get_template("study.html").render(values)


def _rows(analysis: Analysis) -> list[list[Entry]]:
    rows = []
    for line in analysis.lines:
        mean, apart, unit = line.estimate, line.difference, line.quantity.unit
        names = [level for _, level in line.cell] + [line.quantity.metric, line.quantity.what]
        shown = interval(apart.estimate, unit, signed=True) if apart else NOTHING
        rows.append(
            [
                *(Entry(name, name) for name in names),
                Entry(seeds_text(line), str(line.complete)),
                Entry(interval(mean, unit), str(mean.mean) if mean else ""),
                Entry(shown, str(apart.estimate.mean) if apart else ""),
                *(
                    Entry(p_text(p), "" if p is None else str(p))
                    for p in (apart.p if apart else None, line.p_holm)
                ),
            ]
        )
    return rows


def _tuning(study: Study, analysis: Analysis) -> dict[str, Any] | None:
    """The table of what was tried: a row for each group and its values."""
    if study.tuning is None:
        return None
    axes = [axis for axis in study.axes if axis in study.tuning.per]
    rows = []
    for one in analysis.tuned:
        for candidate in one.candidates:
            chosen = "chosen" if candidate is one.chosen else ""
            values = [*(level for _, level in one.group), *(v for _, v in candidate.values)]
            rows.append(([*values, score_text(candidate), chosen], bool(chosen)))
    heads = [*axes, *study.tuning.grid, f"{study.tuning.metric}, validation", ""]
    return {"basis": basis(study.tuning), "heads": heads, "rows": rows}


def _ranking(metric: str, analysis: Analysis) -> dict[str, Any]:
    found = analysis.rankings[metric]
    critical = NOTHING if found.critical is None else f"{found.critical:.2f}"
    ordered = sorted(found.ranks.items(), key=lambda pair: pair[1])
    return {
        "metric": metric,
        "ranks": ", ".join(f"{name} {mean:.2f}" for name, mean in ordered),
        "critical": critical,
        "p": p_text(found.p),
        "blocks": f"{found.blocks}, {found.left_out} left out",
    }


_INK = {"#ffffff": "var(--card)", "#000000": "var(--ink)", "#444444": "var(--ink)"} | {
    "#555555": "var(--soft)",
    "#bbbbbb": "var(--line)",
    "#e9e9ee": "var(--line)",
    "#7a5195": "var(--violet)",
}
"""Colours of figures that follow the page's, light or dark."""


def themed(text: str, name: str) -> str:
    """An SVG for inside a page: without its XML head, with ids of its own, and with text, axes and
    background in the colours of the page.

    Args:
        text: of the file.
        name: of the figure, different from those of the others.
    """
    found = text[text.index("<svg") :]
    prefix = re.sub(r"[^A-Za-z0-9]+", "_", name)
    found = re.sub(r'\bid="', f'id="{prefix}-', found)
    found = re.sub(r'((?:xlink:)?href=")#', rf"\1#{prefix}-", found)
    found = found.replace("url(#", f"url(#{prefix}-")
    found = re.sub(r'<g id="([^"]*text_\d+)">', r'<g id="\1" style="fill: var(--ink)">', found)
    return re.sub(r"#[0-9a-f]{6}\b", lambda m: _INK.get(m[0], m[0]), found)
