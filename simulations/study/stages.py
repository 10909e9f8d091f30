"""The stages of a study, one after the other: tuning runs, the choice, reported runs."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simulations.study.board import Board
from simulations.study.choice import Tuned, choose, ended_after, tuned_from
from simulations.study.plan import PLAN, TUNING, Planned, label, plan
from simulations.study.runner import Progress, Start, State, do_all, progress_of
from simulations.study.spec import Study
from simulations.study.values import Cell


def tune(
    study: Study, runs: Sequence[Planned], folder: Path, jobs: int, start: Start, board: Board
) -> tuple[list[Progress], list[Tuned]]:
    """Do the tuning runs, as far as they matter, and choose.

    Args:
        study: the study; without a tuning stage nothing is done.
        runs: of the tuning stage, all or some. Values of a group end early only if all of its runs
            are among them; but all runs evaluate the rounds after which values are compared.
        folder: of the study.
        jobs: runs at a time.
        start: starts one.
        board: shows them.

    Returns:
        The tuning runs and what is chosen for each group.
    """
    return _tuned(study, runs, folder, lambda all_: do_all(all_, jobs, start, board.show), board)


class _WaitingError(Exception):
    """A run that the choice depends on is not complete."""


def choice(
    study: Study, runs: Sequence[Planned], folder: Path
) -> tuple[list[Progress], list[Tuned]] | None:
    """The tuning runs and what is chosen, if all runs that it depends on are complete; else None.
    Nothing is started.

    Args:
        study: the study.
        runs: of the tuning stage.
        folder: of the study.
    """

    def look(standing: Sequence[Progress]) -> None:
        if any(one.state is State.WAITING for one in standing):
            raise _WaitingError

    try:
        return _tuned(study, runs, folder, look, Board(io.StringIO()))
    except _WaitingError:
        before = chosen_before(folder, runs)  # what has failed then is no record
        return None if before is None else (progress_of(runs, folder), before)


def _tuned(
    study: Study,
    runs: Sequence[Planned],
    folder: Path,
    do: Callable[[list[Progress]], None],
    board: Board,
) -> tuple[list[Progress], list[Tuned]]:
    """`tune`, whatever brings the runs up to date."""
    if study.tuning is None:
        return [], []
    halts = study.tuning.prune.rounds if study.tuning.prune else ()
    whole, pruned = _whole_groups(study, runs), dict[Cell, int]()
    standing = {run.name: Progress(run, folder) for run in runs}
    try:
        for until in (*halts, 0):
            alive = [run for run in runs if run.cell not in pruned]
            failed = {name for name, one in standing.items() if one.state is State.FAILED}
            again = [replace(run, until=until) for run in alive if run.name not in failed]
            for one in progress_of(again, folder):
                one.anew = standing[one.run.name].anew
                standing[one.run.name] = one
            do(list(standing.values()))
            if until:
                compared = [standing[run.name] for run in alive]
                for cell in ended_after(study, compared, until):
                    if study.tuning.group(cell) in whole:
                        pruned[cell] = until
                for one in compared:
                    if one.run.cell in pruned and one.state is State.DONE:
                        one.state = State.PRUNED
    finally:
        board.finish(list(standing.values()))
    return list(standing.values()), choose(study, list(standing.values()), pruned)


def _whole_groups(study: Study, runs: Sequence[Planned]) -> set[Cell]:
    """The groups all of whose tuning runs are among these."""
    assert study.tuning is not None
    tuning, all_cells = study.tuning, list(study.cells())
    here = {(run.cell, run.seed) for run in runs}
    return {
        group
        for group in study.groups()
        if all(
            ((*cell, *values), seed) in here
            for cell in tuning.cells(all_cells, group)
            for values in tuning.candidates(group)
            for seed in tuning.seeds
        )
    }


def chosen_values(tuned: Sequence[Tuned]) -> dict[Cell, Cell]:
    """By group: the chosen values; groups without any are missing."""
    return {one.group: one.chosen.values for one in tuned if one.chosen is not None}


def reported(
    study: Study, tuned: Sequence[Tuned], search_path: Sequence[str] = ()
) -> list[Planned]:
    """The reported runs of the groups whose values are chosen."""
    return plan(study, search_path, chosen_values(tuned) if study.tuning else None)


def chosen_before(folder: Path, runs: Sequence[Planned]) -> list[Tuned] | None:
    """What an earlier attempt has chosen from these tuning runs; None if it has not yet.

    Args:
        folder: of the study.
        runs: of the tuning stage.
    """
    try:
        found: Mapping[str, Any] = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        before = [run["identity"] for run in found["runs"] if run.get("stage") == TUNING]
        if before != [run.identity for run in runs] or not found["tuning"]:
            return None
        return tuned_from(found["tuning"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def warnings(tuned: Sequence[Tuned]) -> list[str]:
    """Sentences that a reader of the results must know about the choice."""
    lines = []
    for one in tuned:
        group = label(one.group) or "all cells"
        for edge in one.edges():
            lines.append(
                f"{group}: the chosen {edge} is at the edge of the grid; a better value may lie "
                "beyond it"
            )
        for candidate in one.candidates:
            values = label_of(candidate.values)
            lines += [f"{group}: {values} left out: {why}" for why in candidate.left_out]
        if one.chosen is None:
            lines.append(f"{group}: no value has a whole set of runs, so nothing is reported")
    return lines


def label_of(values: Cell) -> str:
    """Tuned values in words."""
    return ", ".join(f"{key}={value}" for key, value in values)
