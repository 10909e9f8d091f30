"""A matrix of runs from one YAML file: methods, settings, seeds.

fedlora study smoke                        # conf/study/smoke.yaml
fedlora study mine.yaml --jobs 4           # a file of your own, four runs at a time
fedlora study smoke rounds=2               # overrides of every run
fedlora study smoke --list                 # the runs, and what is done; nothing is started

Results are in outputs/study-<name>. The same command continues a study that was stopped: complete
runs are kept, half ones go on from their checkpoints, and what has changed is done anew.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlora.core import variables
from fedlora.core.errors import ConfigError, RunFolderError
from fedlora.core.files import claim, write_file
from simulations.app.own_modules import find_own_modules
from simulations.app.words import SEARCH_PATH, absolute, with_search_path
from simulations.reporting.run_folder import RecordError
from simulations.run import INTERRUPTED, interrupts
from simulations.study.analysis import analyse
from simulations.study.board import Board
from simulations.study.figures import FIGURES, all_figures, pdf
from simulations.study.page import PAGE, report_html
from simulations.study.plan import Planned, command, plan, write_plan
from simulations.study.results import PARQUET, check_metrics, recorded, write_parquet
from simulations.study.runner import Progress, Start, State, do_all, progress_of, start_process
from simulations.study.spec import Study, read_study
from simulations.study.tables import WRITERS


def main(arguments: Sequence[str] | None = None, start: Start = start_process) -> int:
    """Do a study; 0 only if all of its runs have completed, 2 for a mistake.

    Args:
        arguments: of the command line.
        start: starts a run.
    """
    given = _parser().parse_intermixed_args(arguments)
    try:
        words = with_search_path([*given.overrides, *given.config_dir])
        paths = [word for word in words if word.startswith(SEARCH_PATH)]
        study = read_study(given.study, [word for word in words if word not in paths])
        find_own_modules()
        runs = plan(study, paths)
        folder = absolute(os.environ.get(variables.OUTPUT, "outputs")) / f"study-{study.name}"
        if given.list:
            return _listed(runs, folder)
        with interrupts(), claim(folder):
            write_plan(folder, study, runs)
            return _done(study, runs, folder, given.jobs, start)
    except (ConfigError, RunFolderError, RecordError) as error:
        print(f"fedlora study: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fedlora study: interrupted; the same command continues it", file=sys.stderr)
        return INTERRUPTED


def _done(study: Study, runs: Sequence[Planned], folder: Path, jobs: int, start: Start) -> int:
    """Do what is missing, then write the results; the exit code."""
    standing, board = progress_of(runs, folder), Board()
    try:
        do_all(standing, jobs, start, board.show)
    finally:
        board.finish(standing)
        print(f"study folder: {folder}", flush=True)
    write_results(study, standing, folder)
    return int(any(one.state is State.FAILED for one in standing))


def write_results(study: Study, standing: Sequence[Progress], folder: Path) -> None:
    """Write results.parquet, tables, figures and report.html from the complete runs.

    Raises:
        ConfigError: if the study asks for a metric that no evaluation has.
    """
    files = [folder / name for name in (PARQUET, *WRITERS, PAGE)]
    for old in (*files, *(folder / FIGURES).glob("*.pdf")):
        old.unlink(missing_ok=True)  # of other runs, if the study has changed
    runs = [recorded(one.run, one.folder) for one in standing if one.state is State.DONE]
    runs = [one for one in runs if one.rows]
    if not runs:
        return
    write_parquet(folder / PARQUET, runs, list(study.axes))
    if not study.metrics:
        return
    check_metrics(list(study.metrics), runs, f"study {study.name}: metrics")
    analysis = analyse(study, runs)
    for name, text_of in WRITERS.items():
        write_file(folder / name, text_of(study, analysis))
    figures = list(all_figures(study, runs, analysis))
    (folder / FIGURES).mkdir(exist_ok=True)
    for name, figure in figures:
        write_file(folder / FIGURES / f"{name}.pdf", pdf(figure))
    write_file(folder / PAGE, report_html(study, analysis, figures))


def _listed(runs: Sequence[Planned], folder: Path) -> int:
    """Print the runs with their commands."""
    for one in progress_of(runs, folder):
        print(f"{one.state.value:<8} {command(one.run)}")
    return 0


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fedlora study", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("study", help="a name in conf/study, or a YAML file")
    parser.add_argument("overrides", nargs="*", help="of every run: rounds=2")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=_jobs, default=cores, help=f"runs at a time ({cores})")
    parser.add_argument("--list", action="store_true", help="show the runs, start nothing")
    parser.add_argument(
        "--config-dir", type=lambda p: f"--config-dir={p}", nargs=1, default=[],
        help="a further folder of configuration",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
