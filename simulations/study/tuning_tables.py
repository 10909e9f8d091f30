"""What a study says of its tuning stage: what was chosen, among what, and how much it matters."""

import csv
import io
from collections.abc import Iterator, Sequence

from simulations.reporting.tables import markdown
from simulations.study.choice import Candidate, Tuned, as_number, better_first
from simulations.study.spec import Study
from simulations.study.stages import label_of, warnings
from simulations.study.tuning import Tuning
from simulations.study.values import Cell

TUNING_CSV = "tuning.csv"
NOTHING = "–"
Sensitivity = dict[Cell, dict[str, Candidate]]
"""By group and value of one key: the best candidate with that value."""


def basis(tuning: Tuning) -> str:
    """On what values are chosen, in words."""
    better = "highest" if tuning.higher else "lowest"
    seeds = ", ".join(map(str, tuning.seeds))
    return (
        f"the {better} {tuning.metric} of the validation split, mean over tuning seeds {seeds}; "
        "of equal ones the first of the grid"
    )


def tuning_sections(study: Study, tuned: Sequence[Tuned]) -> Iterator[str]:
    """Sections of table.md: the choice, warnings, the sensitivity to each key."""
    if study.tuning is None:
        return
    axes = [axis for axis in study.axes if axis in study.tuning.per]
    head = [*axes, "chosen", study.tuning.metric, "among"]
    rows = [
        [*(level for _, level in one.group), *_choice(one), _among(one, study.tuning)]
        for one in tuned
    ]
    yield f"## Tuned values\n\nChosen by {basis(study.tuning)}.\n\n{markdown(head, rows)}"
    if lines := warnings(tuned):
        yield "\n".join(f"- {line}" for line in lines)
    for key in study.tuning.grid:
        yield _sensitivity_md(key, axes, study.tuning, tuned)


def _choice(one: Tuned) -> list[str]:
    if one.chosen is None:
        return [NOTHING, NOTHING]
    edge = " (edge of the grid)" if one.edges() else ""
    return [label_of(one.chosen.values) + edge, score_text(one.chosen)]


def _among(one: Tuned, tuning: Tuning) -> str:
    grid = tuning.grid_of(one.group)
    return "; ".join(f"{key}: {', '.join(values)}" for key, values in grid.items())


def score_text(candidate: Candidate) -> str:
    """``0.612 ± 0.010 (2)``: mean, standard deviation and number of tuning seeds."""
    if candidate.mean is None:
        return "failed"
    spread = "" if candidate.spread is None else f" ± {candidate.spread:.3f}"
    ended = f", ended after round {candidate.pruned}" if candidate.pruned else ""
    return f"{candidate.mean:.3f}{spread} ({len(candidate.scores)}{ended})"


def sensitivity(key: str, tuning: Tuning, tuned: Sequence[Tuned]) -> Sensitivity:
    """By group and value of a key: the best candidate with that value, those that ended early
    last; a value whose candidates all failed has one of them."""
    found: Sensitivity = {}
    for one in tuned:
        of_value: dict[str, Candidate] = {}
        for value in tuning.grid_of(one.group)[key]:
            same = [c for c in one.candidates if dict(c.values)[key] == value]
            whole = better_first(tuning, [c for c in same if c.eligible])
            of_value[value] = [*whole, *better_first(tuning, same), *same][0]
        found[one.group] = of_value
    return found


def values_of(found: Sensitivity) -> list[str]:
    """All values of a key, numbers in their order."""
    values = list(dict.fromkeys(value for row in found.values() for value in row))
    if all(as_number(value) is not None for value in values):
        values.sort(key=float)
    return values


def _sensitivity_md(key: str, axes: Sequence[str], tuning: Tuning, tuned: Sequence[Tuned]) -> str:
    found = sensitivity(key, tuning, tuned)
    values = values_of(found)
    rows = []
    for one in tuned:
        best = dict(one.chosen.values)[key] if one.chosen else None
        texts = []
        for value in values:
            candidate = found[one.group].get(value)
            text = score_text(candidate) if candidate else NOTHING
            texts.append(f"**{text}**" if value == best else text)
        rows.append([*(level for _, level in one.group), *texts])
    others = ", other keys at their best" if len(tuning.grid) > 1 else ""
    return (
        f"### Sensitivity to {key}\n\n{tuning.metric} of the validation split{others}: mean ± "
        f"standard deviation (tuning seeds); the chosen one in bold, {NOTHING} not in the group's "
        f"grid.\n\n{markdown([*axes, *values], rows)}"
    )


def tuning_csv(study: Study, tuned: Sequence[Tuned]) -> str:
    """tuning.csv: a row for each group, values and tuning seed, numbers in full."""
    assert study.tuning is not None
    axes = [axis for axis in study.axes if axis in study.tuning.per]
    keys = list(study.tuning.grid)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*axes, *keys, "seed", study.tuning.metric, "chosen", "pruned", "left_out"])
    for one in tuned:
        for candidate in one.candidates:
            for seed in study.tuning.seeds:
                score = candidate.scores.get(seed)
                writer.writerow(
                    [
                        *(level for _, level in one.group),
                        *(value for _, value in candidate.values),
                        seed,
                        "" if score is None else repr(score),
                        int(candidate is one.chosen),
                        candidate.pruned or "",
                        "; ".join(candidate.left_out),
                    ]
                )
    return out.getvalue()
