"""The live table of a study: a row for each cell, a column for each seed, progress and ETA."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from fedlora.run.progress import clock
from simulations.study.plan import label
from simulations.study.runner import Progress, State

REDRAWN_S = 1.0


def table(runs: Sequence[Progress]) -> list[str]:
    """Lines: the axes' levels, then how the run of each seed stands."""
    axes = [axis for axis, _ in runs[0].run.cell]
    seeds = sorted({one.run.seed for one in runs})
    cells = dict.fromkeys(one.run.cell for one in runs)
    found = {(one.run.cell, one.run.seed): one for one in runs}
    rows = [[*axes, *(f"seed {seed}" for seed in seeds)]]
    for cell in cells:
        levels = [level for _, level in cell]
        rows.append([*levels, *(_standing(found.get((cell, seed))) for seed in seeds)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{text:<{w}}" for text, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _standing(one: Progress | None) -> str:
    if one is None:
        return "-"
    state = str(one.state.value)
    if one.state is State.FAILED or (one.state is State.DONE and one.run.wanted == one.run.rounds):
        return state
    return f"{state}, {one.rounds}/{one.run.rounds}" if one.rounds else state


def summary(runs: Sequence[Progress], elapsed: float) -> str:
    """One line: how many runs are in which state, and the time left at the speed so far.

    Args:
        runs: all of the study.
        elapsed: seconds since this attempt began.
    """
    count = {state: sum(one.state is state for one in runs) for state in State}
    stage = f"{runs[0].run.stage} " if runs[0].run.stage else ""
    line = f"{count[State.DONE]} of {len(runs)} {stage}runs done"
    for state in (State.RUNNING, State.PRUNED, State.FAILED):
        line += f", {count[state]} {state.value}" if count[state] else ""
    open_runs = [one for one in runs if one.state in (State.RUNNING, State.WAITING)]
    left = sum(max(0, one.run.wanted - one.rounds) for one in open_runs)
    done = sum(one.rounds - one.before for one in runs)
    line += f"   elapsed {clock(elapsed)}"
    return line + (f"   ETA {clock(elapsed * left / done)}" if open_runs and done else "")


def failures(runs: Sequence[Progress]) -> list[str]:
    """A line for each failed run: which, and why."""
    return [f"FAILED {one.run.label}: {one.why}" for one in runs if one.state is State.FAILED]


def missing(runs: Sequence[Progress]) -> list[str]:
    """A line for each cell that lacks runs."""
    lines = []
    for cell in dict.fromkeys(one.run.cell for one in runs):
        of_cell = [one for one in runs if one.run.cell == cell]
        done = (State.DONE, State.PRUNED)
        lacking = [one.run.seed for one in of_cell if one.state not in done]
        if lacking:
            lines.append(f"missing {label(cell)}: seed {', '.join(map(str, lacking))}")
    return lines


def anew(runs: Sequence[Progress]) -> list[str]:
    """A line for each run of an archive that could not be continued."""
    return [
        f"done anew {one.run.label}: of the archive's {one.anew} rounds there is no checkpoint"
        for one in runs
        if one.anew
    ]


@dataclass
class Board:
    """Shows a study while it goes on: one table that is redrawn on a terminal, and elsewhere a line
    for each run that begins or ends."""

    out: TextIO = field(default_factory=lambda: sys.stdout)
    now: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._began, self._last = self.now(), float("-inf")
        self._drawn = 0
        self._states: dict[str, State] = {}

    def show(self, runs: Sequence[Progress]) -> None:
        """Show how the runs stand."""
        if not self._states:  # what an earlier attempt has done is no news
            self._states = {o.run.name: o.state for o in runs if o.state is State.DONE}
        changed = [o for o in runs if self._states.get(o.run.name, State.WAITING) is not o.state]
        self._states = {o.run.name: o.state for o in runs}
        if not self.out.isatty():
            elapsed = self.now() - self._began
            for one in [o for o in changed if o.state is not State.WAITING]:
                why = f": {one.why}" if one.why else ""
                said = f"{one.state.value} {one.run.label}{why}"
                self.out.write(f"{said}   ({summary(runs, elapsed)})\n")
            self.out.flush()
        elif changed or self.now() - self._last >= REDRAWN_S:
            self._last = self.now()
            self._draw([*table(runs), summary(runs, self.now() - self._began)])

    def finish(self, runs: Sequence[Progress]) -> None:
        """Show the last table with what failed and what is missing."""
        if not runs:
            return
        lines = [*table(runs), summary(runs, self.now() - self._began)]
        self._draw([*lines, *anew(runs), *failures(runs), *missing(runs)])
        self._drawn = 0

    def _draw(self, lines: Sequence[str]) -> None:
        up = f"\x1b[{self._drawn}F\x1b[J" if self._drawn else ""
        self.out.write(up + "\n".join(lines) + "\n")
        self.out.flush()
        self._drawn = len(lines)
