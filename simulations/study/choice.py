"""What the tuning stage chooses for each group, and among what: from recorded runs alone.

A value's score is the mean of the metric over the group's cells and tuning seeds, at the end of the
runs. The best score is chosen; of equal ones, the first in the order of the grid. A value of which
a run has failed, or has no such number, is left out, and a group without any value left has none.
With `Prune` the values of a group are compared after some rounds in the same way, and the worse
ones end.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from simulations.study.results import recorded
from simulations.study.runner import Progress, State
from simulations.study.spec import Study
from simulations.study.statistics import at_budget
from simulations.study.tuning import Tuning
from simulations.study.values import Cell


@dataclass(frozen=True)
class Candidate:
    """Values that were tried for a group."""

    values: Cell
    """Tuned keys with their values."""
    scores: Mapping[int, float]
    """By tuning seed: the metric, averaged over the cells of the group."""
    left_out: tuple[str, ...] = ()
    """Why the values could not be chosen: a line for each run that failed or has no number."""
    pruned: int = 0
    """The round after which they ended; 0: they did not."""

    @property
    def mean(self) -> float | None:
        """Over the seeds; None if a run is missing."""
        return fmean(self.scores.values()) if self.scores and not self.left_out else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None for fewer than two."""
        found = list(self.scores.values())
        return stdev(found) if len(found) > 1 and not self.left_out else None

    @property
    def eligible(self) -> bool:
        """Whether it can be chosen."""
        return self.mean is not None and not self.pruned


@dataclass(frozen=True)
class Tuned:
    """What was chosen for a group."""

    group: Cell
    candidates: Sequence[Candidate]
    """In the order of the grid."""
    chosen: Candidate | None
    """None if no value has a whole set of runs."""

    def edges(self) -> list[str]:
        """``client.lr=0.008``: chosen numbers that are the smallest or the largest of their grid, a
        better one may lie beyond. A key with one value has none."""
        found = []
        for key, value in self.chosen.values if self.chosen else ():
            tried = list(dict.fromkeys(dict(c.values)[key] for c in self.candidates))
            numbers = [as_number(text) for text in tried]
            at = as_number(value)
            known = [x for x in numbers if x is not None]
            if len(tried) > 1 and len(known) == len(tried) and at in (min(known), max(known)):
                found.append(f"{key}={value}")
        return found

    def record(self) -> dict[str, Any]:
        """What plan.json says of it."""
        return {
            "group": dict(self.group),
            "chosen": dict(self.chosen.values) if self.chosen else None,
            "edges": self.edges(),
            "candidates": [
                {
                    "values": dict(one.values),
                    "mean": one.mean,
                    "scores": {str(seed): score for seed, score in one.scores.items()},
                    **({"left_out": list(one.left_out)} if one.left_out else {}),
                    **({"pruned": one.pruned} if one.pruned else {}),
                }
                for one in self.candidates
            ],
        }


def tuned_from(found: Iterable[Mapping[str, Any]]) -> list[Tuned]:
    """What `Tuned.record` has written."""
    read = []
    for entry in found:
        candidates = [
            Candidate(
                tuple(one["values"].items()),
                {int(seed): score for seed, score in one["scores"].items()},
                tuple(one.get("left_out", ())),
                one.get("pruned", 0),
            )
            for one in entry["candidates"]
        ]
        wanted = tuple(entry["chosen"].items()) if entry["chosen"] else None
        chosen = next((one for one in candidates if one.values == wanted), None)
        read.append(Tuned(tuple(entry["group"].items()), candidates, chosen))
    return read


def as_number(text: str) -> float | None:
    """The number that a value is; None if it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def choose(study: Study, standing: Sequence[Progress], pruned: Mapping[Cell, int]) -> list[Tuned]:
    """What is best for each group.

    Args:
        study: with a tuning stage.
        standing: all tuning runs, none of which is to be done any more.
        pruned: by cell of a tuning run (axes and values), the round after which it ended.
    """
    assert study.tuning is not None
    tuning, found = study.tuning, []
    for group in study.groups():
        candidates = [
            score(study, standing, group, values, pruned) for values in tuning.candidates(group)
        ]
        eligible = [one for one in candidates if one.eligible]
        best = better_first(tuning, eligible)
        found.append(Tuned(group, candidates, best[0] if best else None))
    return found


def better_first(tuning: Tuning, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates that have a score, the best first; equal ones in their order."""
    sign = -1.0 if tuning.higher else 1.0
    scored = [(sign * one.mean, one) for one in candidates if one.mean is not None]
    return [one for _, one in sorted(scored, key=lambda pair: pair[0])]


def score(
    study: Study,
    standing: Sequence[Progress],
    group: Cell,
    values: Cell,
    pruned: Mapping[Cell, int],
    until: int = 0,
) -> Candidate:
    """The score of a group's values.

    Args:
        study: with a tuning stage.
        standing: all tuning runs.
        group: of which the values are.
        values: of the tuned keys.
        pruned: by cell of a tuning run, the round after which it ended.
        until: the last round that counts; 0: the end, or the round after which they ended.
    """
    assert study.tuning is not None
    cells = [(*cell, *values) for cell in study.tuning.cells(list(study.cells()), group)]
    at = next((pruned[cell] for cell in cells if cell in pruned), 0)
    numbers: dict[int, list[float]] = {}
    left_out = []
    for one in standing:
        if one.run.cell in cells:
            value, why = _number(one, study.tuning.metric, study.tuning.higher, until or at)
            if value is None:
                left_out.append(f"{one.run.label}: {why}")
            else:
                numbers.setdefault(one.run.seed, []).append(value)
    scores = {seed: fmean(found) for seed, found in numbers.items() if len(found) == len(cells)}
    return Candidate(values, scores, tuple(left_out), at)


def _number(one: Progress, metric: str, higher: bool, until: int) -> tuple[float | None, str]:
    """The metric of a run after so many rounds, or why there is none."""
    if one.state not in (State.DONE, State.PRUNED):
        return None, one.why or "not done"
    rounds, values = recorded(one.run, one.folder, {metric: higher}).curve("round", metric)
    if until and until not in rounds and any(at > until for at in rounds):
        return None, (
            f"not evaluated after round {until}, where values are compared; it was after rounds "
            f"{', '.join(f'{at:g}' for at in rounds)} (prune=false compares at the end alone)"
        )
    value = at_budget(rounds, values, until or one.run.rounds)
    return value, "" if value is not None else f"no finite {metric} at the validation split"


def ended_after(study: Study, standing: Sequence[Progress], until: int) -> set[Cell]:
    """The cells of tuning runs whose values end after a comparison: the worse ones of each group.

    Values with a failed run are no part of the comparison: they end too.

    Args:
        study: with a tuning stage that prunes.
        standing: the runs that were still to be compared, all of them done so far.
        until: the round after which they are compared.
    """
    tuning, ended = study.tuning, set()
    assert tuning is not None
    assert tuning.prune is not None
    alive = {one.run.cell for one in standing}
    for group in study.groups():
        cells = tuning.cells(list(study.cells()), group)
        compared = [
            score(study, standing, group, values, {}, until)
            for values in tuning.candidates(group)
            if any((*cell, *values) in alive for cell in cells)
        ]
        ordered = better_first(tuning, compared)
        kept = {one.values for one in ordered[: tuning.prune.kept(len(compared))]}
        for one in compared:
            if one.values not in kept:
                ended |= {(*cell, *one.values) for cell in cells}
    return ended
