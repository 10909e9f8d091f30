"""A matrix of runs from one YAML file: methods, settings, seeds.

fedlora study smoke                        # conf/study/smoke.yaml
fedlora study mine.yaml --jobs 4           # a file of your own, four runs at a time
fedlora study smoke rounds=2               # overrides of every run
fedlora study smoke --list                 # the runs, and what is done; nothing is started
fedlora study tuned prune=[2,4]            # of the study itself: end worse values early
fedlora study smoke --record               # results as JSON into docs/results
fedlora study smoke --only seed=0          # a part of the runs, without results
fedlora study smoke --from --record        # go on from the runs that were recorded, record again
fedlora study smoke --list --record        # record what is complete; nothing is started
fedlora study smoke --sweep-yaml           # the same study as a sweep of Weights & Biases

Results are in outputs/study-<name>. The same command continues a study that was stopped: complete
runs are kept, half ones go on from their checkpoints, and what has changed is done anew.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from fedlora.core import variables
from fedlora.core.errors import ConfigError, RunFolderError
from fedlora.core.files import claim, write_file
from fedlora.core.package import ROOT
from fedlora.run.tracking import Silent, Tracking
from simulations.app.own_modules import find_own_modules
from simulations.app.words import SEARCH_PATH, absolute, with_search_path
from simulations.reporting.run_folder import RecordError
from simulations.run import INTERRUPTED, interrupts
from simulations.study.analysis import Analysis
from simulations.study.archive import read_archive
from simulations.study.board import Board
from simulations.study.choice import Tuned
from simulations.study.figures import FIGURES, all_figures, pdf
from simulations.study.page import PAGE, report_html
from simulations.study.parts import halts_of, take
from simulations.study.plan import TUNING, Planned, command, label, plan, tuning_plan, write_plan
from simulations.study.recording import analysed, archive_file, complete_runs, record
from simulations.study.results import PARQUET, write_parquet
from simulations.study.runner import Progress, Start, State, do_all, progress_of, start_process
from simulations.study.spec import Study, read_study
from simulations.study.stages import (
    choice,
    chosen_before,
    label_of,
    reported,
    tune,
    warnings,
)
from simulations.study.summary import tracking_of, write_summary
from simulations.study.sweep import selected, sweep_yaml
from simulations.study.tables import WRITERS
from simulations.study.tuning_tables import TUNING_CSV, tuning_csv

NO_TRACKING = Silent()
RESULTS = ROOT / "docs" / "results"
Take = Callable[[str, Sequence[Planned]], None]
"""Takes the runs of a stage from an archive, as far as it has them."""


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
        folder = absolute(os.environ.get(variables.OUTPUT, "outputs")) / f"study-{study.name}"
        tuning = tuning_plan(study, paths)
        plan(study, paths)  # mistakes show before anything is started
        from_archive = _taker(study, folder, given.source)
        if given.record is not None and (file := archive_file(given.record, study)).is_file():
            read_archive(file, study.name)  # so do those of the archive
        from_archive(TUNING, tuning)
        did = shlex.join(["fedlora", "study", study.name, *(w for w in words if w not in paths)])
        if given.sweep_yaml is not None:
            stages = known_runs(study, tuning, folder, paths)
            name = given.study if study.name == given.study else str(absolute(given.study))
            _write_or_print(given.sweep_yaml, sweep_yaml(study, stages[-1], name, words))
            return 0
        if given.list or given.only:
            code = _part(study, tuning, folder, paths, from_archive, given, start)
        else:
            with interrupts(), claim(folder):
                code = _done(study, tuning, folder, given.jobs, start, paths, from_archive)
        if given.record is not None:
            print("\n".join(record(study, tuning, folder, paths, given.record, did)))
        return code
    except (ConfigError, RunFolderError, RecordError) as error:
        print(f"fedlora study: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fedlora study: interrupted; the same command continues it", file=sys.stderr)
        return INTERRUPTED


def _taker(study: Study, folder: Path, source: Path | None) -> Take:
    """Takes what an archive has; without an archive, nothing."""
    if source is None:
        return lambda stage, runs: None
    file = archive_file(RESULTS, study) if source == Path() else source
    archive = read_archive(file, study.name)

    def from_archive(stage: str, runs: Sequence[Planned]) -> None:
        if runs:
            what = f"{file}, {stage}" if stage else str(file)
            print("\n".join(take(archive, stage, runs, folder, halts_of(study)).lines(what)))

    return from_archive


def _part(
    study: Study,
    tuning: Sequence[Planned],
    folder: Path,
    paths: Sequence[str],
    from_archive: Take,
    given: argparse.Namespace,
    start: Start,
) -> int:
    """List the runs, or do some of them."""
    stages = known_runs(study, tuning, folder, paths)
    from_archive("", [run for run in chain(*stages) if not run.stage])
    if given.list:
        return _listed(study, tuning, folder, paths)
    with interrupts():
        code, done = 0, set[str]()
        while runs := [
            run for run in selected(study, [*chain(*stages)], given.only) if run.name not in done
        ]:
            code |= _some(study, runs, folder, given.jobs, start)
            done |= {run.name for run in runs}
            if runs[0].stage:  # perhaps these were all that the choice waited for
                stages = known_runs(study, tuning, folder, paths)
                from_archive("", [run for run in chain(*stages) if not run.stage])
        return code


def _done(
    study: Study,
    tuning: Sequence[Planned],
    folder: Path,
    jobs: int,
    start: Start,
    paths: Sequence[str],
    from_archive: Take,
) -> int:
    """Do what is missing, then write the results; the exit code."""
    if tuning and chosen_before(folder, tuning) is None:
        write_plan(folder, study, tuning)
    tried, tuned = tune(study, tuning, folder, jobs, start, Board())
    runs = reported(study, tuned, paths)
    write_plan(folder, study, [*tuning, *runs], [one.record() for one in tuned])
    from_archive("", runs)
    standing, board = progress_of(runs, folder), Board()
    try:
        do_all(standing, jobs, start, board.show)
    finally:
        board.finish(standing)
        for line in warnings(tuned):
            print(line)
        print(f"study folder: {folder}", flush=True)
    write_results(study, standing, folder, tuned, tracking_of(study, runs))
    failed = any(one.state is State.FAILED for one in (*tried, *standing))
    return int(failed or any(one.chosen is None for one in tuned))


def write_results(
    study: Study,
    standing: Sequence[Progress],
    folder: Path,
    tuned: Sequence[Tuned] = (),
    tracking: Tracking = NO_TRACKING,
) -> Analysis | None:
    """Write results.parquet, tables, figures and report.html from the complete runs, and the
    summary run of a tracker.

    Returns:
        The statistics; None if there is no complete run, or the study has no metrics.

    Raises:
        ConfigError: if the study asks for a metric that no evaluation has.
    """
    files = [folder / name for name in (PARQUET, TUNING_CSV, *WRITERS, PAGE)]
    for old in (*files, *(folder / FIGURES).glob("*.pdf")):
        old.unlink(missing_ok=True)  # of other runs, if the study has changed
    if study.tuning is not None:
        write_file(folder / TUNING_CSV, tuning_csv(study, tuned))
    runs = complete_runs(study, standing)
    if not runs:
        return None
    write_parquet(folder / PARQUET, runs, list(study.axes))
    if not study.metrics:
        return None
    analysis = analysed(study, runs, tuned)
    for name, text_of in WRITERS.items():
        write_file(folder / name, text_of(study, analysis))
    figures = list(all_figures(study, runs, analysis))
    (folder / FIGURES).mkdir(exist_ok=True)
    for name, figure in figures:
        write_file(folder / FIGURES / f"{name}.pdf", pdf(figure))
    write_file(folder / PAGE, report_html(study, analysis, figures))
    if problem := write_summary(study, tracking, folder, analysis, figures):
        print(problem)
    return analysis


def known_runs(
    study: Study, tuning: Sequence[Planned], folder: Path, paths: Sequence[str]
) -> list[Sequence[Planned]]:
    """The runs of each stage whose words are known: reported ones have none before the choice."""
    found = choice(study, tuning, folder)
    tuned = None if found is None else found[1]
    runs = [] if tuned is None else reported(study, tuned, paths)
    return [stage for stage in (tuning, runs) if stage]


def _some(study: Study, runs: Sequence[Planned], folder: Path, jobs: int, start: Start) -> int:
    """Do some runs of a study, which other processes may also do a part of."""
    tuning = [run for run in runs if run.stage]
    tried, _ = tune(study, tuning, folder, jobs, start, Board())
    standing, board = progress_of([run for run in runs if not run.stage], folder), Board()
    try:
        do_all(standing, jobs, start, board.show)
    finally:
        board.finish(standing)
    return int(any(one.state is State.FAILED for one in (*tried, *standing)))


def _write_or_print(file: str, text: str) -> None:
    """Write a text into a file, or print it where the file is ``-``."""
    if file == "-":
        print(text, end="")
    else:
        write_file(absolute(file), text)


def _listed(study: Study, tuning: Sequence[Planned], folder: Path, paths: Sequence[str]) -> int:
    """Print the runs with their commands; what awaits its tuning has none yet."""
    known = choice(study, tuning, folder)
    tuned = None if known is None else known[1]
    runs = [*tuning, *(reported(study, tuned, paths) if tuned is not None else [])]
    for one in progress_of(runs, folder):
        print(f"{one.state.value:<8} {command(one.run)}")
    if tuned is None:
        for cell in study.cells():
            for seed in study.seeds_of(cell):
                print(f"after tuning: {label(cell)}, seed {seed}")
    for found in tuned or ():
        chosen = label_of(found.chosen.values) if found.chosen else "nothing"
        print(f"chosen for {label(found.group) or 'all cells'}: {chosen}")
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
        "--only",
        nargs="+",
        metavar="KEY=VALUE",
        help="do these runs alone: levels of axes, tuned values, seed=0, run=NAME; no results",
    )
    parser.add_argument(
        "--sweep-yaml",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print the file for `wandb sweep` that does the same runs, or write it",
    )
    parser.add_argument(
        "--record", type=Path, nargs="?", const=RESULTS, metavar="FOLDER",
        help="write results (JSON) and runs (zip) into docs/results, or into another folder",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="source", type=Path, nargs="?", const=Path(), metavar="FILE",
        help="take the runs of an archive that --record wrote; by default that of docs/results",
    )  # fmt: skip
    parser.add_argument(
        "--config-dir", type=lambda p: f"--config-dir={p}", nargs=1, default=[],
        help="a further folder of configuration",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
