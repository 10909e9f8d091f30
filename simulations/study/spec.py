"""The file of a study, read and checked: base words, axes, seeds.

    base: [experiment=smoke, rounds=1]     # words of every run, as `fedlora run` takes them
    axes:
      method:                              # an axis with a name: each level is one or several words
        fedit: strategy=fedit
        fedavg: [strategy=fedavg, client=sgd, client.lr=0.5]
      ranks: [uniform, homogeneous]        # an axis that is a key: each level is a value
    seeds: [0, 1, 2]
    seeds_for: [{cells: {ranks: uniform}, seeds: [0, 1, 2, 3, 4]}]      # other seeds of some cells
    only: [{ranks: uniform}, {method: fedit}]     # combinations that there are; default: all
    skip: [{method: fedavg, ranks: uniform}]      # combinations that are left out
    evaluation: {group: seen, adapter: auto}      # what the clients are evaluated on
    metrics: {accuracy_weighted: higher, loss_weighted: lower}     # and which way is better
    reference: {method: fedit}             # what the other levels of that axis are compared with
    budgets: {rounds: [5], bytes: equal}   # metrics are also reported at these costs
    targets: {accuracy_weighted: [0.5]}    # and what it costs to reach these values
    tuning: {...}                          # see `simulations.study.tuning`

A run is one level of each axis and one seed. Every mistake is one sentence that names the file, the
key, the value and what is allowed.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import yaml

from fedlora.core.errors import ConfigError
from fedlora.core.package import ROOT
from simulations.app.words import absolute
from simulations.study.tuning import Tuning, read_tuning, with_prune
from simulations.study.values import (
    Axes,
    Cell,
    Where,
    cells,
    entries,
    mapping,
    matches,
    metrics,
    numbers,
    scalar,
    seeds,
    words,
)

FOLDER = ROOT / "conf" / "study"
KEYS = (
    *("base", "axes", "seeds", "seeds_for", "only", "skip", "evaluation", "metrics", "reference"),
    *("budgets", "targets", "tuning"),
)
BUDGETS = ("rounds", "bytes", "seconds")
EQUAL = "equal"
"""A budget: what every complete run has spent by its end."""
PRUNE = "prune="
"""Begins the word of the command line that is the study's own, not one of its runs."""
COLUMNS = ("run", "seed", "group", "adapter", "round", "bytes", "bytes_up", "bytes_down", "seconds")
"""Columns of the results that no axis may take the name of."""
ADAPTERS = ("full", "largest", "own", "auto")
"""What clients are evaluated with; ``auto``: their own where a method has no global model."""


@dataclass(frozen=True)
class Evaluation:
    """What the clients of every run are evaluated on."""

    group: str = ""
    """One of ``evaluate.groups``; empty: the run's first."""
    adapter: str = ""
    """One of `ADAPTERS`; empty: the run's first."""


@dataclass(frozen=True)
class Study:
    """A checked study."""

    name: str
    base: tuple[str, ...]
    axes: Axes
    seeds: tuple[int, ...]
    skip: tuple[Where, ...] = ()
    metrics: Mapping[str, bool] = field(default_factory=dict)
    """Metrics of the evaluations, and whether higher is better."""
    reference: tuple[str, str] | None = None
    """An axis and the level that its other levels are compared with."""
    budgets: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By kind: rounds, bytes or seconds."""
    equal: tuple[str, ...] = ()
    """Kinds of which the least that a complete run has spent is a budget too."""
    targets: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By metric."""
    last: tuple[str, ...] = ()
    """Words of the command line, which win over all."""
    only: tuple[Where, ...] = ()
    """Combinations that there are; empty: all."""
    seeds_for: tuple[tuple[Where, tuple[int, ...]], ...] = ()
    """Other seeds of some cells; the last one that fits counts."""
    evaluation: Evaluation = Evaluation()
    tuning: Tuning | None = None

    @property
    def compared(self) -> str | None:
        """The axis whose levels are compared and ranked."""
        return self.reference[0] if self.reference else None

    def reference_of(self, cell: Cell) -> Cell | None:
        """The cell with the reference level and else the same levels; None without a reference."""
        if self.reference is None:
            return None
        axis, level = self.reference
        return tuple((a, level if a == axis else b) for a, b in cell)

    def cells(self) -> Iterator[Cell]:
        """Every combination of levels that is not left out, the last axis changing fastest."""
        for levels in product(*self.axes.values()):
            cell = tuple(zip(self.axes, levels, strict=True))
            wanted = not self.only or any(matches(kept, cell) for kept in self.only)
            if wanted and not any(matches(left_out, cell) for left_out in self.skip):
                yield cell

    def seeds_of(self, cell: Cell) -> tuple[int, ...]:
        """The seeds of a cell."""
        fitting = [some for where, some in self.seeds_for if matches(where, cell)]
        return fitting[-1] if fitting else self.seeds

    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of all cells together."""
        return tuple(sorted({seed for cell in self.cells() for seed in self.seeds_of(cell)}))

    def words(self, cell: Cell) -> tuple[str, ...]:
        """The words of a cell's runs, without those of the command line and the seed."""
        return (*self.base, *(word for axis, level in cell for word in self.axes[axis][level]))

    def groups(self) -> list[Cell]:
        """The groups of cells that are tuned separately; none without a tuning stage."""
        if self.tuning is None:
            return []
        return list(dict.fromkeys(self.tuning.group(cell) for cell in self.cells()))


def study_names() -> list[str]:
    """All of conf/study."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def read_study(name: str, more: Sequence[str] = ()) -> Study:
    """The study of that name.

    Args:
        name: of a file in conf/study, or the path of a YAML file.
        more: further words of every run; they win over those of the file's base.

    Raises:
        ConfigError: if there is no such file, or it holds no study.
    """
    file = absolute(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(
            f"study {name!r} is neither a YAML file nor one of conf/study: "
            f"{', '.join(study_names())}"
        )
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"study {file.name} cannot be read: {said}") from error
    return parse(file.stem, found, more)


def parse(name: str, found: Any, more: Sequence[str] = ()) -> Study:
    """A study from the content of its file.

    Raises:
        ConfigError: for whatever is no study.
    """
    where = f"study {name}"
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ConfigError(f"{where}: its file name must be letters, digits, '_', '.' and '-'")
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}: the file holds {found!r}, not the keys {', '.join(KEYS)}")
    mapping(found, KEYS, where)
    axes = _axes(found.get("axes", {}), where)
    own_seeds = seeds(found.get("seeds", [0]), f"{where}: seeds")
    seeds_for = tuple(_seeds_for(found.get("seeds_for", []), axes, f"{where}: seeds_for"))
    last = words(list(more), where)
    reported = [*own_seeds, *(seed for _, some in seeds_for for seed in some)]
    study = Study(
        name,
        words(found.get("base", []), f"{where}: base"),
        axes,
        own_seeds,
        _some(found.get("skip", []), axes, f"{where}: skip"),
        metrics(found.get("metrics", {}), f"{where}: metrics"),
        _reference(found.get("reference"), axes, where),
        *_budgets(found.get("budgets", {}), where),
        _targets(found.get("targets", {}), found.get("metrics", {}), where),
        tuple(word for word in last if not word.startswith(PRUNE)),
        _some(found.get("only", []), axes, f"{where}: only"),
        seeds_for,
        _evaluation(found.get("evaluation", {}), f"{where}: evaluation"),
        with_prune(
            read_tuning(found.get("tuning"), axes, reported, f"{where}: tuning"),
            [word for word in last if word.startswith(PRUNE)],
            where,
        ),
    )
    all_cells = list(study.cells())
    if not all_cells:
        raise ConfigError(f"{where}: only and skip leave no cell of the axes {', '.join(axes)}")
    if study.tuning is not None:
        for group in study.groups():
            if not study.tuning.cells(all_cells, group):
                at = ", ".join(f"{axis} {level}" for axis, level in group) or "the only group"
                raise ConfigError(f"{where}: tuning.at leaves no cell of {at}")
    return study


def _axes(found: Any, where: str) -> dict[str, dict[str, tuple[str, ...]]]:
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"{where}: axes is {found!r}; it must name axes, such as strategy: [a, b]"
        )
    for axis in found:
        if axis in COLUMNS:
            raise ConfigError(f"{where}: axes.{axis} is a column of the results; name it otherwise")
    axes = {str(axis): _levels(str(axis), levels, where) for axis, levels in found.items()}
    if not axes:
        raise ConfigError(f"{where}: axes names no axis; it must, such as strategy: [fedit]")
    return axes


def _levels(axis: str, found: Any, where: str) -> dict[str, tuple[str, ...]]:
    """The levels of an axis with their words."""
    here = f"{where}: axes.{axis}"
    if isinstance(found, Mapping) and found:
        return {str(level): words(some, f"{here}.{level}") for level, some in found.items()}
    if not isinstance(found, list) or not found or any(isinstance(v, list | dict) for v in found):
        raise ConfigError(
            f"{here} is {found!r}; it must be a list of values of the key {axis}, or levels with "
            "the words of each"
        )
    levels: dict[str, tuple[str, ...]] = {scalar(v): (f"{axis}={scalar(v)}",) for v in found}
    if len(levels) < len(found):
        raise ConfigError(f"{here} has a value twice: {found!r}")
    words([word for some in levels.values() for word in some], here)
    return levels


def _some(found: Any, axes: Axes, where: str) -> tuple[Where, ...]:
    """Combinations of levels, of axes and levels that there are."""
    return tuple(cells(entry, axes, where) for entry in entries(found, where))


def _seeds_for(found: Any, axes: Axes, where: str) -> Iterator[tuple[Where, tuple[int, ...]]]:
    for entry in entries(found, where):
        given = mapping(entry, ("cells", "seeds"), where)
        yield (
            cells(given.get("cells"), axes, f"{where}.cells"),
            seeds(given.get("seeds"), f"{where}.seeds"),
        )


def _evaluation(found: Any, where: str) -> Evaluation:
    given = mapping(found, ("group", "adapter"), where)
    adapter = str(given.get("adapter", ""))
    if adapter and adapter not in ADAPTERS:
        raise ConfigError(f"{where}.adapter is {adapter!r}; it must be {', '.join(ADAPTERS)}")
    return Evaluation(str(given.get("group", "")), adapter)


def _reference(found: Any, axes: Axes, where: str) -> tuple[str, str] | None:
    here = f"{where}: reference"
    if found is None:
        return None
    if not isinstance(found, Mapping) or len(found) != 1:
        raise ConfigError(f"{here} is {found!r}; it must be one axis with a level: {{axis: level}}")
    ((axis, levels),) = cells(found, axes, here).items()
    if len(levels) != 1:
        raise ConfigError(f"{here} is {found!r}; it must be one axis with a level: {{axis: level}}")
    return axis, levels[0]


def _budgets(found: Any, where: str) -> tuple[dict[str, tuple[float, ...]], tuple[str, ...]]:
    """Numbers by kind, and the kinds with an equal budget."""
    here = f"{where}: budgets"
    if not isinstance(found, Mapping) or not set(found) <= set(BUDGETS):
        raise ConfigError(f"{here} is {found!r}; it may have {', '.join(BUDGETS)}")
    budgets: dict[str, tuple[float, ...]] = {}
    equal = []
    for kind, values in found.items():
        listed = values if isinstance(values, list) else [values]
        rest = [value for value in listed if value != EQUAL]
        equal += [kind] if len(rest) < len(listed) else []
        if rest or not listed:
            budgets[kind] = numbers(rest, f"{here}.{kind}")
            if min(budgets[kind]) <= 0:
                least = min(budgets[kind])
                raise ConfigError(f"{here}.{kind} has {least:g}; a budget is more than 0")
    return budgets, tuple(equal)


def _targets(found: Any, metrics: Any, where: str) -> dict[str, tuple[float, ...]]:
    here = f"{where}: targets"
    if not isinstance(found, Mapping) or not set(found) <= set(metrics):
        listed = ", ".join(map(str, metrics)) or "none"
        raise ConfigError(f"{here} is {found!r}; it may have those of metrics: {listed}")
    return {str(name): numbers(values, f"{here}.{name}") for name, values in found.items()}
