"""The tables of a study: table.md to read, table.csv with everything, table.tex for a paper."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fedlora.run.progress import clock
from simulations.reporting.tables import markdown, traffic
from simulations.study.analysis import AT_EQUAL, FINAL, Analysis, Line, Quantity
from simulations.study.spec import Study
from simulations.study.statistics import LEVEL, Estimate
from simulations.study.tuning_tables import NOTHING, basis, tuning_sections

_TEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    NOTHING: "--",
}
CSV = (
    *("metric", "what", "unit", "mean", "low", "high", "seeds", "difference", "difference_low"),
    *("difference_high", "pairs", "p", "p_holm", "without", "missing"),
)


def value(x: float, unit: str = "") -> str:
    """A number in its unit: bytes, seconds, rounds, or that of a metric."""
    if unit == "bytes":
        return traffic(x / 2**20)
    if unit == "seconds":
        return clock(x)
    if unit == "rounds":
        return f"{x:.1f}"
    return f"{x:.3f}" if abs(x) < 100 else f"{x:.4g}"


def interval(estimate: Estimate | None, unit: str = "", signed: bool = False) -> str:
    """``mean [low, high]``; the mean alone for one seed."""
    if estimate is None:
        return NOTHING
    sign = "+" if signed and estimate.mean > 0 else ""
    mean = f"{sign}{value(estimate.mean, unit)}"
    if estimate.low is None or estimate.high is None:
        return mean
    return f"{mean} [{value(estimate.low, unit)}, {value(estimate.high, unit)}]"


def p_text(p: float | None) -> str:
    """A p-value."""
    if p is None:
        return NOTHING
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def seeds_text(line: Line) -> str:
    """``2 of 3`` seeds whose runs are complete."""
    return f"{line.complete} of {line.complete + len(line.missing)}"


# --- Markdown -------------------------------------------------------------------------------------


def table_md(study: Study, analysis: Analysis) -> str:
    """All tables in Markdown, and what is missing."""
    parts = [f"# Study {study.name}", *_md_sections(study, analysis)]
    return "\n\n".join(parts) + "\n"


def _md_sections(study: Study, analysis: Analysis) -> Iterator[str]:
    axes = list(study.axes)
    percent = f"{100 * LEVEL:g} %"
    yield f"Mean over seeds with {percent} interval; {NOTHING}: not measured, or not reached."
    yield _wide("At the end", axes, [q for q in _asked(analysis) if q.what == FINAL], analysis)
    for metric in study.metrics:
        of_metric = [q for q in _asked(analysis) if q.metric == metric]
        yield _wide(metric, axes, [q for q in of_metric if q.what != FINAL], analysis, titled=False)
        for quantity in of_metric if study.reference is not None else ():
            if quantity.what == FINAL or quantity.what.startswith(AT_EQUAL):
                yield _differences(study, quantity, analysis)
        if metric in analysis.rankings:
            yield _ranks(metric, analysis)
    yield from tuning_sections(study, analysis.tuned)
    if lines := list(missing_lines(analysis)):
        yield "## Missing\n\n" + "\n".join(f"- {line}" for line in lines)


def _asked(analysis: Analysis) -> list[Quantity]:
    return list(dict.fromkeys(line.quantity for line in analysis.lines))


def _wide(
    title: str,
    axes: Sequence[str],
    asked: Sequence[Quantity],
    analysis: Analysis,
    titled: bool = True,
) -> str:
    """A row for each cell, a column for each quantity, headed by its metric or by what it is."""
    found = {(line.cell, line.quantity): line for line in analysis.lines}
    rows = []
    for cell in dict.fromkeys(line.cell for line in analysis.lines):
        lines = [found[cell, q] for q in asked]
        texts = [interval(line.estimate, line.quantity.unit) for line in lines]
        rows.append([*(level for _, level in cell), seeds_text(lines[0]), *texts])
    heads = [q.metric if titled else q.what for q in asked]
    return f"## {title}\n\n{markdown([*axes, 'seeds', *heads], rows)}"


def _differences(study: Study, quantity: Quantity, analysis: Analysis) -> str:
    assert study.reference is not None
    axis, level = study.reference
    rows = []
    for line in analysis.lines:
        if line.quantity != quantity or dict(line.cell)[axis] == level:
            continue
        apart = line.difference
        told = [NOTHING, "0", NOTHING, NOTHING]
        if apart is not None:
            pairs = str(apart.estimate.seeds)
            told = [interval(apart.estimate, signed=True), pairs, p_text(apart.p)]
            told.append(p_text(line.p_holm))
        rows.append([*(at for _, at in line.cell), *told])
    names = [*study.axes, "difference", "pairs", "p", "p (Holm)"]
    when = "at the end" if quantity.what == FINAL else quantity.what
    head = f"### {quantity.metric} {when}, less that of {axis} {level}"
    return f"{head}\n\n{markdown(names, rows)}"


def _ranks(metric: str, analysis: Analysis) -> str:
    found = analysis.rankings[metric]
    ordered = sorted(found.ranks.items(), key=lambda pair: pair[1])
    rows = [[name, f"{mean:.2f}"] for name, mean in ordered]
    said = [f"{found.blocks} blocks of one seed and setting"]
    said += [f"{found.left_out} left out because a run is missing"] if found.left_out else []
    if found.critical is not None:
        said.append(f"critical difference {found.critical:.2f} (Nemenyi)")
    said += [f"p {p_text(found.p)} (Friedman)"] if found.p is not None else []
    table = markdown(["", "mean rank"], rows)
    return f"### {metric}: ranks\n\n{table}\n\n{'; '.join(said)}."


def missing_lines(analysis: Analysis) -> Iterator[str]:
    """A sentence for each cell that lacks runs, and for each quantity that complete runs lack."""
    for cell, seeds in dict.fromkeys((line.cell, line.missing) for line in analysis.lines):
        if seeds:
            at = ", ".join(f"{axis} {level}" for axis, level in cell)
            yield f"{at}: no complete run of seed {', '.join(map(str, seeds))}"
    for line in analysis.lines:
        if line.without:
            at = ", ".join(f"{axis} {level}" for axis, level in line.cell)
            seeds_ = ", ".join(map(str, line.without))
            yield f"{at}: {line.quantity.metric}, {line.quantity.what}: not in seed {seeds_}"


# --- CSV and LaTeX --------------------------------------------------------------------------------


def table_csv(study: Study, analysis: Analysis) -> str:
    """A row for each cell and quantity, numbers in full."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns, rows = csv_table(study, analysis)
    writer.writerows([columns, *rows])
    return out.getvalue()


def csv_table(study: Study, analysis: Analysis) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of table.csv: axes, tuned keys, then `CSV`."""
    keys = list(study.tuning.grid) if study.tuning else []
    rows: list[list[Any]] = []
    for line in analysis.lines:
        mean, apart = line.estimate, line.difference
        of = apart.estimate if apart else None
        rows.append(
            [
                *(level for _, level in line.cell),
                *analysis.values_of(study, line.cell).values(),
                *(line.quantity.metric, line.quantity.what, line.quantity.unit),
                *((mean.mean, mean.low, mean.high, mean.seeds) if mean else (None,) * 3 + (0,)),
                *((of.mean, of.low, of.high, of.seeds) if of else (None,) * 4),
                apart.p if apart else None,
                line.p_holm,
                " ".join(map(str, line.without)),
                " ".join(map(str, line.missing)),
            ]
        )
    return [*study.axes, *keys, *CSV], rows


def table_tex(study: Study, analysis: Analysis) -> str:
    """The metrics at the end for LaTeX with booktabs; a star marks p (Holm) below 0.05."""
    asked = [q for q in _asked(analysis) if q.what == FINAL]
    found = {(line.cell, line.quantity): line for line in analysis.lines}
    keys = list(study.tuning.grid) if study.tuning else []
    names = [tex(name) for name in (*study.axes, *keys, "seeds", *(q.metric for q in asked))]
    lines = [
        f"% Study {study.name}: mean and half-width of the {100 * LEVEL:g} \\% interval.",
        *_tex_tuning(study),
        f"\\begin{{tabular}}{{{'l' * (len(study.axes) + len(keys) + 1)}{'r' * len(asked)}}}",
        r"\toprule",
        _tex_row(names),
        r"\midrule",
    ]
    for cell in dict.fromkeys(line.cell for line in analysis.lines):
        of_cell = [found[cell, q] for q in asked]
        values_ = analysis.values_of(study, cell).values()
        names = [level for _, level in cell] + [value_ or NOTHING for value_ in values_]
        cells = [*map(tex, names), seeds_text(of_cell[0])]
        lines.append(_tex_row([*cells, *(_tex_value(line, study) for line in of_cell)]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _tex_tuning(study: Study) -> list[str]:
    """A comment on how values were chosen, and among which."""
    if study.tuning is None:
        return []
    grids = [study.tuning.grid, *(grid for _, grid in study.tuning.grid_for)]
    among = " or ".join(f"{key} {', '.join(v)}" for grid in grids for key, v in grid.items())
    return [f"% Tuned among {among}: {basis(study.tuning)}."]


def _tex_row(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _tex_value(line: Line, study: Study) -> str:
    """Mean and half-width; as wide with a star as without, so that columns stay aligned."""
    if line.estimate is None:
        return tex(NOTHING)
    star = r"^{\phantom{*}}" if study.reference else ""
    if line.p_holm is not None and line.p_holm < 1 - LEVEL:
        star = "^{*}"
    high = line.estimate.high
    spread = "" if high is None else f" \\pm {value(high - line.estimate.mean)}"
    return f"${value(line.estimate.mean)}{spread}{star}$"


def tex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(_TEX.get(c, c) for c in text)


WRITERS: dict[str, Callable[[Study, Analysis], str]] = {
    "table.md": table_md,
    "table.csv": table_csv,
    "table.tex": table_tex,
}
"""Files of a study's folder."""
