"""The file of a study, read and checked: base words, axes, seeds.

    base: [experiment=smoke, rounds=1]     # words of every run, as `fedlora run` takes them
    axes:
      method:                              # an axis with a name: each level is one or several words
        fedit: strategy=fedit
        fedavg: [strategy=fedavg, client=sgd, client.lr=0.5]
      ranks: [uniform, homogeneous]        # an axis that is a key: each level is a value
    seeds: [0, 1, 2]
    skip: [{method: fedavg, ranks: uniform}]      # combinations that are left out
    metrics: {accuracy_weighted: higher, loss_weighted: lower}     # and which way is better
    reference: {method: fedit}             # what the other levels of that axis are compared with
    budgets: {rounds: [5], bytes: [1e8]}   # metrics are also reported at these costs
    targets: {accuracy_weighted: [0.5]}    # and what it costs to reach these values

A run is one level of each axis and one seed. Every mistake is one sentence that names the file, the
key, the value and what is allowed.
"""

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import yaml

from fedlora.core.errors import ConfigError
from fedlora.core.package import ROOT
from simulations.app.words import absolute

FOLDER = ROOT / "conf" / "study"
KEYS = ("base", "axes", "seeds", "skip", "metrics", "reference", "budgets", "targets")
BUDGETS = ("rounds", "bytes", "seconds")
BETTER = {"higher": True, "lower": False}
COLUMNS = ("run", "seed", "group", "adapter", "round", "bytes", "bytes_up", "bytes_down", "seconds")
"""Columns of the results that no axis may take the name of."""
OURS = ("seed", "name", "output_dir", "resume")
"""Keys that a study sets for each of its runs."""
Cell = tuple[tuple[str, str], ...]
"""Axis and level, for each axis in the order of the file."""
_WORD = re.compile(r"~[\w.@/-]+(=|$)|\+{0,2}[\w.@/-]+=")


@dataclass(frozen=True)
class Study:
    """A checked study."""

    name: str
    base: tuple[str, ...]
    axes: Mapping[str, Mapping[str, tuple[str, ...]]]
    """By axis and level: the words of that level."""
    seeds: tuple[int, ...]
    skip: tuple[Mapping[str, str], ...] = ()
    metrics: Mapping[str, bool] = field(default_factory=dict)
    """Metrics of the evaluations, and whether higher is better."""
    reference: tuple[str, str] | None = None
    """An axis and the level that its other levels are compared with."""
    budgets: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By kind: rounds, bytes or seconds."""
    targets: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By metric."""

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
            if not any(set(left_out.items()) <= set(cell) for left_out in self.skip):
                yield cell

    def words(self, cell: Cell) -> tuple[str, ...]:
        """The words of a cell's runs, without the seed."""
        return (*self.base, *(word for axis, level in cell for word in self.axes[axis][level]))


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
    for key in found:
        if key not in KEYS:
            raise ConfigError(f"{where}: unknown key {key!r}; there are {', '.join(KEYS)}")
    axes = _axes(found.get("axes", {}), where)
    study = Study(
        name,
        (*_words(found.get("base", []), f"{where}: base"), *_words(list(more), where)),
        axes,
        _seeds(found.get("seeds", [0]), where),
        _skip(found.get("skip", []), axes, where),
        _metrics(found.get("metrics", {}), where),
        _reference(found.get("reference"), axes, where),
        _budgets(found.get("budgets", {}), where),
        _targets(found.get("targets", {}), found.get("metrics", {}), where),
    )
    if not any(study.cells()):
        raise ConfigError(f"{where}: skip leaves no cell of the axes {', '.join(axes)}")
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
        return {str(level): _words(words, f"{here}.{level}") for level, words in found.items()}
    if not isinstance(found, list) or not found or any(isinstance(v, list | dict) for v in found):
        raise ConfigError(
            f"{here} is {found!r}; it must be a list of values of the key {axis}, or levels with "
            "the words of each"
        )
    levels: dict[str, tuple[str, ...]] = {scalar(v): (f"{axis}={scalar(v)}",) for v in found}
    if len(levels) < len(found):
        raise ConfigError(f"{here} has a value twice: {found!r}")
    _words([word for words in levels.values() for word in words], here)
    return levels


def _words(found: Any, where: str) -> tuple[str, ...]:
    """Words of Hydra's grammar from a list of them, or from one string as a shell would split it.

    Raises:
        ConfigError: for what is no word, and for keys that a study sets itself.
    """
    try:
        words = shlex.split(found) if isinstance(found, str) else found
    except ValueError as error:
        raise ConfigError(f"{where} is {found!r}: {error}") from error
    if not isinstance(words, list):
        raise ConfigError(f"{where} is {found!r}; it must be a list of words such as rounds=2")
    for word in words:
        if not isinstance(word, str) or not _WORD.match(word):
            raise ConfigError(f"{where} has {word!r}; a word is key=value, such as rounds=2")
        if (key := word.lstrip("+~").partition("=")[0]) in OURS:
            instead = "list seeds under seeds" if key == "seed" else "leave it out"
            raise ConfigError(f"{where} has {word!r}: a study sets {key} itself; {instead}")
    return tuple(words)


def _seeds(found: Any, where: str) -> tuple[int, ...]:
    right = isinstance(found, list) and found and all(type(s) is int and s >= 0 for s in found)
    if not right or len(set(found)) < len(found):
        raise ConfigError(
            f"{where}: seeds is {found!r}; it must be a list of different whole numbers from 0 up"
        )
    return tuple(found)


def _skip(
    found: Any, axes: Mapping[str, Mapping[str, Any]], where: str, key: str = "skip"
) -> tuple[dict[str, str], ...]:
    """Levels by axis, of axes and levels that there are."""
    here = f"{where}: {key}"
    if not isinstance(found, list) or not all(isinstance(s, Mapping) and s for s in found):
        raise ConfigError(f"{here} is {found!r}; it must be a list such as [{{axis: level}}]")
    entries = [{str(axis): scalar(level) for axis, level in s.items()} for s in found]
    for entry in entries:
        for axis, level in entry.items():
            if axis not in axes:
                raise ConfigError(f"{here} names {axis!r}; the axes are {', '.join(axes)}")
            if level not in axes[axis]:
                levels = ", ".join(axes[axis])
                raise ConfigError(f"{here} names {axis}={level!r}; its levels are {levels}")
    return tuple(entries)


def _metrics(found: Any, where: str) -> dict[str, bool]:
    here = f"{where}: metrics"
    if not isinstance(found, Mapping):
        raise ConfigError(f"{here} is {found!r}; it must be names with higher or lower")
    for name, better in found.items():
        if better not in BETTER:
            raise ConfigError(f"{here}.{name} is {better!r}; it must be {' or '.join(BETTER)}")
    return {str(name): BETTER[better] for name, better in found.items()}


def _reference(
    found: Any, axes: Mapping[str, Mapping[str, Any]], where: str
) -> tuple[str, str] | None:
    here = f"{where}: reference"
    if found is None:
        return None
    if not isinstance(found, Mapping) or len(found) != 1:
        raise ConfigError(f"{here} is {found!r}; it must be one axis with a level: {{axis: level}}")
    ((axis, level),) = _skip([found], axes, where, "reference")[0].items()
    return axis, level


def _budgets(found: Any, where: str) -> dict[str, tuple[float, ...]]:
    here = f"{where}: budgets"
    if not isinstance(found, Mapping) or not set(found) <= set(BUDGETS):
        raise ConfigError(f"{here} is {found!r}; it may have {', '.join(BUDGETS)}")
    budgets = {kind: _numbers(values, f"{here}.{kind}") for kind, values in found.items()}
    for kind, values in budgets.items():
        if min(values) <= 0:
            raise ConfigError(f"{here}.{kind} has {min(values):g}; a budget is more than 0")
    return budgets


def _targets(found: Any, metrics: Any, where: str) -> dict[str, tuple[float, ...]]:
    here = f"{where}: targets"
    if not isinstance(found, Mapping) or not set(found) <= set(metrics):
        listed = ", ".join(map(str, metrics)) or "none"
        raise ConfigError(f"{here} is {found!r}; it may have those of metrics: {listed}")
    return {str(name): _numbers(values, f"{here}.{name}") for name, values in found.items()}


def _numbers(found: Any, where: str) -> tuple[float, ...]:
    """Numbers; YAML takes ``1e8`` for a word."""
    values = found if isinstance(found, list) else [found]
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"{where} is {found!r}; it must be a list of numbers")
    return numbers


def scalar(value: Any) -> str:
    """A value of YAML as Hydra reads it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
