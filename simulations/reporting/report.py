"""A run, or several side by side, as one self-contained HTML file.

fedlora report outputs/RUN             # writes outputs/RUN/report.html
fedlora report outputs/A outputs/B     # and outputs/comparison.html

The pages are the templates beside this module, filled with the values of `run_tables` and the
figures of `figures`.
"""

import argparse
import base64
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from fedlora.core.package import places
from simulations.reporting import (
    analysis_figures,
    class_figures,
    class_tables,
    drawing,
    fairness_figures,
    figures,
    run_tables,
    time_figures,
)
from simulations.reporting.run_folder import RecordError, Run, read_run

TEMPLATES = "simulations/reporting/templates"

_BAND = "Of all examples together; the band reaches down to the worst tenth of the clients."
_MAP = "A row that grows dark: rank collapse. Dashed: the ranks that clients have."
_DRIFT = "Mean over the clients of the round; band: one standard deviation."
_PART = "Time of a client's part of a round, by rank"
_BOXES = "All rounds. Box: middle half; line: median; outliers hidden."


@dataclass(frozen=True)
class Card:
    """A figure as the page holds it."""

    title: str
    svg: str
    """The picture in base64."""
    caption: str


@dataclass(frozen=True)
class Section:
    """Figures under a heading."""

    title: str
    cards: Sequence[Card]


def write_report(folder: Path) -> Path:
    """Write ``report.html`` of a run folder, using only the files in it.

    Raises:
        RecordError: if the folder holds no run.
        jinja2.TemplateNotFound: if the package has lost its templates.
    """
    run = read_run(folder)
    return _write(folder / "report.html", "run.html", run_page(run))


def write_comparison(folders: Sequence[Path], file: Path) -> Path:
    """Write one page with the curves and final results of several runs.

    Raises:
        RecordError: if one of the folders holds no run.
        jinja2.TemplateNotFound: if the package has lost its templates.
    """
    runs = _distinct([read_run(folder) for folder in folders])
    return _write(file, "comparison.html", comparison_page(runs))


def run_page(run: Run) -> dict[str, Any]:
    """The content of ``run.html``."""
    only = [run]
    return {
        "title": run.name,
        "name": run.name,
        "facts": run_tables.facts(run),
        "message": str(run.status.get("message", "")),
        "failed": not run_tables.ended_early(run),
        "tiles": run_tables.tiles(run),
        "learning": _section(
            "Learning",
            (figures.loss(only), "Training loss is measured while the clients train."),
            (figures.rouge(only), "The band is a bootstrap over the evaluated clients."),
            (figures.accuracy(only), ""),
            (class_figures.accuracy(only), _BAND),
            (class_figures.client_accuracy(run), ""),
            (figures.quality_per_byte(only), "What the communication bought."),
            (fairness_figures.quality_by_bytes(only), ""),
        ),
        "fairness": _section(
            "Fairness",
            (
                fairness_figures.tier_quality(run),
                "First group. Each client counts by its examples.",
            ),
            (fairness_figures.inequality(run), "Over the clients of the first group."),
        ),
        "evaluation": run_tables.evaluation_table(run),
        "apart": class_tables.spread_table(run),
        "tiers": class_tables.tier_table(run),
        "classes": class_tables.class_table(run),
        "cost": _section(
            "Cost",
            (figures.traffic(only), "As a deployment would send it: each client its own adapter."),
            (figures.seconds(run), "Wall time of the simulation."),
        ),
        "devices": _devices(run),
        "budgets": [time_figures.budget_table(only), time_figures.cost_table(only)],
        "clients": _clients(run),
        "drift": _section(
            "Client drift",
            (analysis_figures.drift_cosine(run), _DRIFT),
            (analysis_figures.drift_norm(run), _DRIFT),
            (analysis_figures.diversity(only), "1: all clients do the same."),
        ),
        "aggregation": _section(
            "Aggregation",
            (analysis_figures.energy_map(run), _MAP),
            (analysis_figures.energy_by_tier(run), "A straight line decays at a constant rate."),
            (analysis_figures.ranks(only), ""),
            (figures.energy(run), "A curve that rises late: the update needs a high rank."),
            _loss_by_rank(run),
            (figures.exactness(only), "Averaging factors is not averaging their products."),
            (figures.update_norm(only), ""),
        ),
        "failures": run_tables.failure_table(run),
        "configuration": run_tables.config_table(run),
        "yaml": OmegaConf.to_yaml(OmegaConf.create(dict(run.config))) if run.config else "",
    }


def _devices(run: Run) -> Section:
    """Quality, clients and staleness by the virtual clock."""
    return _section(
        "Devices",
        (time_figures.quality_by_time([run]), "Nothing is known between two evaluations."),
        (time_figures.outcomes(run), "Late and absent clients are not trained."),
        (figures.by_rank(run, "device_seconds", _PART, "s", log=True), _BOXES),
        (time_figures.staleness(run), "Versions made since a change's client started."),
    )


def _loss_by_rank(run: Run) -> tuple[Figure | None, str]:
    """What each tier loses of the global update: measured where it is on record."""
    if (lost := analysis_figures.lost(run)) is not None:
        return lost, "Dotted: what even the best update of that rank would lose."
    return figures.truncation(run), ""


def _clients(run: Run) -> Section:
    return _section(
        "Clients",
        (figures.ranks(run), ""),
        (class_figures.label_counts(run), "White: no example of the label."),
        (figures.histogram(run, "loss", "Training loss by client", run.unit), ""),
        (figures.by_rank(run, "loss", "Training loss by rank", run.unit), _BOXES),
        (figures.by_rank(run, "seconds", "Training time by rank", "s"), _BOXES),
        (figures.examples(run), ""),
        (figures.by_rank(run, "delta_norm", "Size of the clients' updates", "‖ΔWₖ‖"), _BOXES),
    )


def comparison_page(runs: Sequence[Run]) -> dict[str, Any]:
    """The content of ``comparison.html``."""
    return {
        "title": f"{len(runs)} runs",
        "runs": [{"name": run.name, "colour": run_tables.colour(i)} for i, run in enumerate(runs)],
        "final": run_tables.comparison_table(runs),
        "learning": _section(
            "Learning",
            (figures.loss(runs), ""),
            (figures.rouge(runs), "Bands: bootstrap over the clients of the first group."),
            (figures.accuracy(runs), ""),
            (class_figures.accuracy(runs), _BAND),
            (figures.quality_per_byte(runs), ""),
            (fairness_figures.quality_by_bytes(runs), ""),
        ),
        "cost": _section(
            "Cost and aggregation",
            (figures.traffic(runs), ""),
            (figures.exactness(runs), ""),
            (analysis_figures.ranks(runs), ""),
            (analysis_figures.diversity(runs), ""),
            (figures.update_norm(runs), ""),
        ),
        "devices": _section(
            "Devices",
            (time_figures.quality_by_time(runs), "Nothing is known between two evaluations."),
            (time_figures.round_times(runs), ""),
        ),
        "budgets": [
            time_figures.budget_table(runs),
            time_figures.cost_table(runs),
            time_figures.robust_table(runs),
        ],
        "differences": run_tables.difference_table(runs),
    }


def _section(title: str, *shown: tuple[Figure | None, str]) -> Section:
    """The figures for which something was recorded."""
    return Section(title, [_card(figure, text) for figure, text in shown if figure is not None])


def _card(figure: Figure, caption: str) -> Card:
    svg = base64.b64encode(drawing.adaptive(drawing.svg(figure)).encode()).decode()
    return Card(figure.axes[0].get_title(loc="left"), svg, caption)


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """The runs, with the folder above added to names that more than one has."""
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.folder.resolve().parent.name}/{run.name}")
        if names.count(run.name) > 1
        else run
        for run in runs
    ]


def _write(file: Path, template: str, values: dict[str, Any]) -> Path:
    """Fill a template; whatever was recorded is escaped."""
    environment = Environment(
        loader=FileSystemLoader(list(places(TEMPLATES))),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    file.write_text(environment.get_template(template).render(values), encoding="utf-8")
    return file


def main(arguments: Sequence[str] | None = None, show: Callable[[str], object] = print) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="fedlora report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument(
        "--comparison",
        type=Path,
        help="the page for several runs; default: comparison.html in the folder above them all",
    )
    chosen = parser.parse_args(arguments)
    try:
        for folder in chosen.folders:
            show(f"{write_report(folder)}")
        if len(chosen.folders) > 1:
            above = Path(os.path.commonpath([f.resolve().parent for f in chosen.folders]))
            file = chosen.comparison or above / "comparison.html"
            show(f"{write_comparison(chosen.folders, file)}")
    except RecordError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
