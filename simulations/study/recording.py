"""What `--record` writes: the archive of the complete runs, and the results as JSON, of all that is
there, here or in the archive, whether or not the study is complete."""

from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from simulations.study.analysis import Analysis, analyse
from simulations.study.archive import Packed, read_archive, write_archive
from simulations.study.choice import Tuned
from simulations.study.parts import complete, halts_of, pack, take
from simulations.study.plan import RUNS, TUNING, Planned
from simulations.study.record import record_of, write_record
from simulations.study.results import Recorded, check_costs, check_metrics, recorded
from simulations.study.runner import Progress, State, progress_of
from simulations.study.spec import Study
from simulations.study.stages import choice, reported


def archive_file(place: Path, study: Study) -> Path:
    """Where the runs of a study are packed.

    Args:
        place: the folder of recorded results.
        study: the study.
    """
    return place / f"study-{study.name}-runs.zip"


def complete_runs(study: Study, standing: Sequence[Progress]) -> list[Recorded]:
    """The complete runs read back, those without an evaluation left out."""
    done = [one for one in standing if one.state is State.DONE]
    runs = [recorded(one.run, one.folder, study.metrics) for one in done]
    return [one for one in runs if one.rows]


def analysed(study: Study, runs: Sequence[Recorded], tuned: Sequence[Tuned]) -> Analysis:
    """The statistics of the complete runs.

    Raises:
        ConfigError: if the study asks for a metric that no evaluation has.
    """
    check_metrics(list(study.metrics), runs, f"study {study.name}: metrics")
    check_costs([*study.budgets, *study.equal], runs, f"study {study.name}: budgets")
    return analyse(study, runs, tuned)


def record(
    study: Study,
    tuning: Sequence[Planned],
    folder: Path,
    paths: Sequence[str],
    place: Path,
    command: str,
) -> list[str]:
    """Pack the complete runs beside those that the archive has, and write the results of all.

    Args:
        study: the study.
        tuning: the runs of its tuning stage.
        folder: of the study.
        paths: words that tell Hydra of further folders of configuration.
        place: the folder of recorded results.
        command: that does the study.

    Returns:
        Sentences that say what was written.

    Raises:
        ConfigError: if the archive that is there cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, halts = archive_file(place, study), halts_of(study)
    with FileLock(folder / "record.lock"):  # processes that do parts of the study record in turn
        old = read_archive(file, study.name) if file.is_file() else {}
        take(old, TUNING, tuning, folder, halts)
        found = choice(study, tuning, folder)
        tuned = [] if found is None else found[1]
        runs = [] if found is None else reported(study, tuned, paths)
        take(old, "", runs, folder, halts)
        lines, merged, own = [], dict(old), 0
        for run in (*tuning, *runs):
            one = complete(run, folder, halts)
            packed = pack(run, one.folder, _metrics(study)) if one else ""
            if isinstance(packed, Packed):
                own += merged.get(packed.key) != packed
                merged[packed.key] = packed
            elif packed:
                lines.append(f"not recorded: {run.label}: {packed}")
        if merged:
            size = write_archive(file, study.name, merged)
            lines.append(f"recorded: {file}: {len(merged)} runs, {own} of them new, {size} bytes")
        if study.metrics and (merged or found is not None):
            standing = progress_of(runs, folder)
            own_folder = [Progress(run, folder / RUNS / run.name) for run in tuning]
            tried = [complete(one.run, folder, halts) or one for one in own_folder]
            there = complete_runs(study, standing)
            analysis = analysed(study, there, tuned) if there else Analysis([], {}, tuned)
            content = record_of(study, analysis, tried, standing, command)
            if found is None:
                done = sum(one.state is State.DONE for one in tried)
                said = f"{done} of {len(tuning)} tuning runs are complete; nothing is chosen yet"
                content["missing"].insert(0, said)
            elif not there:
                content["missing"].append("no run is complete")
            lines.append(f"recorded: {write_record(place, content)}")
    return lines or [f"nothing is recorded: no run of study {study.name} is complete"]


def _metrics(study: Study) -> list[str]:
    return [*study.metrics, *([study.tuning.metric] if study.tuning else [])]
