"""The tuning stage of a study as its file says it: which values, by which metric, for which groups.

tuning:
  grid: {client.lr: [5e-4, 2e-3, 8e-3]}    # of several keys all combinations
  metric: {accuracy_weighted: higher}      # of the validation split
  seeds: [100, 101]                        # none of the reported ones
  per: [method, ranks]                     # a group is one level of each; each has its own best
  at: {spread: alpha_0.1}                  # levels of the other axes; default: all
  words: [rounds=6]                        # of tuning runs alone
  grid_for: [{cells: {method: fedavg}, grid: {client.lr: [0.1, 0.5, 2]}}]
  prune: {rounds: [2, 4], keep: 0.5}       # after these rounds this fraction of a group goes on;
                                           # [2, 4] is the same
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from fedlora.core.errors import ConfigError
from simulations.study.values import (
    OURS,
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

SPLIT = "evaluate.plan.split"
"""The key that says on which split clients are evaluated."""
VALIDATION = f"{SPLIT}=eval"
"""The word of every tuning run."""
KEYS = ("grid", "metric", "seeds", "per", "at", "words", "grid_for", "prune")
FIXED = ("rounds", "federation", "evaluate", "tracking", "runtime", "report")
"""Keys and groups that no grid may have: runs of a group must be comparable."""
Grid = Mapping[str, tuple[str, ...]]
"""By key: its values."""


@dataclass(frozen=True)
class Prune:
    """Successive halving (Jamieson and Talwalkar, AISTATS 2016): all values of a group do so many
    rounds, and the better ones go on."""

    rounds: tuple[int, ...]
    """After which the values of a group are compared, rising."""
    keep: float
    """The fraction of them that goes on; at least one does."""

    def kept(self, count: int) -> int:
        """How many of so many go on."""
        return max(1, math.ceil(self.keep * count))


@dataclass(frozen=True)
class Tuning:
    """A checked tuning stage."""

    grid: Grid
    metric: str
    higher: bool
    """Whether higher is better."""
    seeds: tuple[int, ...]
    per: tuple[str, ...]
    """Axes whose combinations are tuned separately."""
    at: Where
    """Levels of other axes at which is tuned; of an axis that is not named, all."""
    words: tuple[str, ...]
    """Words of tuning runs alone."""
    grid_for: tuple[tuple[Where, Grid], ...] = ()
    """Grids of some groups; the last one that fits counts."""
    prune: Prune | None = None

    def group(self, cell: Cell) -> Cell:
        """The group whose best values a cell has."""
        return tuple((axis, level) for axis, level in cell if axis in self.per)

    def grid_of(self, group: Cell) -> Grid:
        """The values that are tried for a group."""
        fitting = [grid for where, grid in self.grid_for if matches(where, group)]
        return fitting[-1] if fitting else self.grid

    def candidates(self, group: Cell) -> Iterator[Cell]:
        """Keys with values, in the order of the grid: the first key changes slowest."""
        grid = self.grid_of(group)
        for values in product(*grid.values()):
            yield tuple(zip(grid, values, strict=True))

    def cells(self, all_cells: Sequence[Cell], group: Cell) -> list[Cell]:
        """The cells in which a group is tuned."""
        return [c for c in all_cells if self.group(c) == group and matches(self.at, c)]


def key_words(values: Cell) -> tuple[str, ...]:
    """Values of tuned keys as words of a run."""
    return tuple(f"{key}={value}" for key, value in values)


def read_tuning(
    found: Any, axes: Mapping[str, Mapping[str, Any]], reported: Sequence[int], where: str
) -> Tuning | None:
    """The tuning stage of a file; None if it has none.

    Args:
        found: what the file says.
        axes: of the study.
        reported: seeds of the study.
        where: of the file, for messages.

    Raises:
        ConfigError: for a mistake, and for a seed that is a reported one.
    """
    if found is None:
        return None
    given = mapping(found, KEYS, where)
    for key in ("grid", "metric", "seeds", "per"):
        if key not in given:
            raise ConfigError(f"{where}: {key} is missing; a tuning stage has one")
    better = metrics(given["metric"], f"{where}.metric")
    if len(better) != 1:
        raise ConfigError(f"{where}.metric is {given['metric']!r}; it must be one metric")
    ((metric, higher),) = better.items()
    per = given["per"]
    if not isinstance(per, list) or not all(axis in axes for axis in per):
        raise ConfigError(f"{where}.per is {per!r}; it must be a list of axes: {', '.join(axes)}")
    grid = _grid(given["grid"], axes, f"{where}.grid")
    at = cells(given["at"], axes, f"{where}.at") if "at" in given else {}
    for axis in at:
        if axis in per:
            raise ConfigError(f"{where}.at names {axis!r}, whose levels are tuned one by one")
    return Tuning(
        grid,
        metric,
        higher,
        _own_seeds(given["seeds"], reported, f"{where}.seeds"),
        tuple(per),
        at,
        _tuning_words(given.get("words", []), f"{where}.words"),
        tuple(_grids(given.get("grid_for", []), axes, per, grid, f"{where}.grid_for")),
        _prune(given.get("prune"), f"{where}.prune"),
    )


def _own_seeds(found: Any, reported: Sequence[int], where: str) -> tuple[int, ...]:
    own = seeds(found, where)
    for seed in own:
        if seed in reported:
            raise ConfigError(
                f"{where} has {seed}, which is a reported seed; values are chosen on seeds that no "
                "reported run has"
            )
    return own


def _tuning_words(found: Any, where: str) -> tuple[str, ...]:
    given = words(found, where)
    for word in given:
        if word.lstrip("+~").startswith(f"{SPLIT}=") and word.lstrip("+") != VALIDATION:
            raise ConfigError(
                f"{where} has {word!r}; values are chosen on the validation split, {VALIDATION}"
            )
    return given


def _grid(found: Any, axes: Mapping[str, Any], where: str) -> dict[str, tuple[str, ...]]:
    if not isinstance(found, Mapping) or not found:
        raise ConfigError(f"{where} is {found!r}; it must be keys with lists of values")
    read: dict[str, tuple[str, ...]] = {}
    for key, values in found.items():
        if key in axes or key in OURS or str(key).split(".")[0] in FIXED:
            raise ConfigError(f"{where} has {key!r}, which is an axis or fixed for a study's runs")
        scalars = isinstance(values, list) and not any(isinstance(v, list | dict) for v in values)
        if not scalars or not values or len(set(map(scalar, values))) < len(values):
            raise ConfigError(f"{where}.{key} is {values!r}; it must be a list of different values")
        read[str(key)] = tuple(map(scalar, values))
    words(list(key_words(tuple((key, values[0]) for key, values in read.items()))), where)
    return read


def _grids(
    found: Any, axes: Mapping[str, Mapping[str, Any]], per: Sequence[str], grid: Grid, where: str
) -> Iterator[tuple[Where, Grid]]:
    """Grids of some groups, of the same keys as the grid of all."""
    tuned = {axis: axes[axis] for axis in per}
    for entry in entries(found, where):
        given = mapping(entry, ("cells", "grid"), where)
        for key in ("cells", "grid"):
            if key not in given:
                raise ConfigError(f"{where}: {key} is missing in {dict(given)!r}")
        other = _grid(given["grid"], axes, f"{where}.grid")
        if other.keys() != grid.keys():
            raise ConfigError(
                f"{where}.grid has the keys {', '.join(other)}; it must have those of grid: "
                f"{', '.join(grid)}"
            )
        yield cells(given["cells"], tuned, f"{where}.cells"), {key: other[key] for key in grid}


def with_prune(tuning: Tuning | None, given: Sequence[str], where: str) -> Tuning | None:
    """The stage with the pruning that words of the command line ask for, the last one of them.

    Args:
        tuning: of the file.
        given: ``prune=false``, ``prune=4``, ``prune=[2,4]``, ``prune={rounds:[2,4],keep:0.3}``.
        where: of the file, for messages.

    Raises:
        ConfigError: for another value, and if there is no tuning stage.
    """
    for word in given:
        if tuning is None:
            raise ConfigError(
                f"{where}: {word!r} ends values of a tuning stage early, and there is no such stage"
            )
        found: Any = word.partition("=")[2]
        with suppress(HydraException):
            read = OverridesParser.create().parse_override(word)
            found = found if read.is_sweep_override() else read.value()
        tuning = replace(tuning, prune=_prune(found, f"{where}: prune"))
    return tuning


def _prune(found: Any, where: str) -> Prune | None:
    if found is None or found is False:
        return None
    if isinstance(found, list) or type(found) is int:
        found = {"rounds": found}
    given = mapping(found, ("rounds", "keep"), where)
    rounds = numbers(given.get("rounds"), f"{where}.rounds")
    rising = all(a < b for a, b in pairwise(rounds))
    if not rising or any(r < 1 or r != int(r) for r in rounds):
        raise ConfigError(
            f"{where}.rounds is {given.get('rounds')!r}; it must be rising whole numbers from 1 up"
        )
    (keep,) = numbers(given.get("keep", 0.5), f"{where}.keep")[:1]
    if not 0 < keep < 1:
        raise ConfigError(f"{where}.keep is {keep:g}; it must be above 0 and below 1")
    return Prune(tuple(map(int, rounds)), keep)
