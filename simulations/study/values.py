"""Values of a study's file, read and checked: words, seeds, numbers, metrics, sets of cells.

Every mistake is one sentence that names the file, the key, the value and what is allowed.
"""

import math
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from fedlora.core.errors import ConfigError

BETTER = {"higher": True, "lower": False}
OURS = ("seed", "name", "output_dir", "resume")
"""Keys that a study sets for each of its runs."""
Cell = tuple[tuple[str, str], ...]
"""Axis and level, for each axis in the order of the file."""
Where = Mapping[str, tuple[str, ...]]
"""Some cells: those that have, of each axis named, one of these levels."""
Axes = Mapping[str, Mapping[str, tuple[str, ...]]]
"""By axis and level: the words of that level."""
_WORD = re.compile(r"~[\w.@/-]+(=|$)|\+{0,2}[\w.@/-]+=")


def matches(where: Where, cell: Cell) -> bool:
    """Whether a cell is one of those, as far as it has the axes."""
    return all(level in where[axis] for axis, level in cell if axis in where)


def panel_of(metric: str) -> tuple[str, str, str]:
    """A metric's name with its group and adapter, ``accuracy@unseen_random/own``; either may be
    missing and is then empty: that of the run's first evaluation."""
    name, _, panel = metric.partition("@")
    group, _, adapter = panel.partition("/")
    return name, group, adapter


def words(found: Any, where: str) -> tuple[str, ...]:
    """Words of Hydra's grammar from a list of them, or from one string as a shell would split it.

    Raises:
        ConfigError: for what is no word, and for keys that a study sets itself.
    """
    try:
        listed = shlex.split(found) if isinstance(found, str) else found
    except ValueError as error:
        raise ConfigError(f"{where} is {found!r}: {error}") from error
    if not isinstance(listed, list):
        raise ConfigError(f"{where} is {found!r}; it must be a list of words such as rounds=2")
    for word in listed:
        if not isinstance(word, str) or not _WORD.match(word):
            raise ConfigError(f"{where} has {word!r}; a word is key=value, such as rounds=2")
        if (key := word.lstrip("+~").partition("=")[0]) in OURS:
            instead = "list seeds under seeds" if key == "seed" else "leave it out"
            raise ConfigError(f"{where} has {word!r}: a study sets {key} itself; {instead}")
    return tuple(listed)


def seeds(found: Any, where: str) -> tuple[int, ...]:
    """Different whole numbers.

    Raises:
        ConfigError: for anything else.
    """
    right = isinstance(found, list) and found and all(type(s) is int and s >= 0 for s in found)
    if not right or len(set(found)) < len(found):
        raise ConfigError(
            f"{where} is {found!r}; it must be a list of different whole numbers from 0 up"
        )
    return tuple(found)


def cells(found: Any, axes: Mapping[str, Iterable[str]], where: str) -> dict[str, tuple[str, ...]]:
    """Levels by axis, each one level or a list of them, of axes and levels that there are.

    Raises:
        ConfigError: for what no cell has.
    """
    if not isinstance(found, Mapping) or not found:
        raise ConfigError(f"{where} is {found!r}; it must name levels such as {{axis: level}}")
    read: dict[str, tuple[str, ...]] = {}
    for axis, levels in found.items():
        if axis not in axes:
            raise ConfigError(f"{where} names {axis!r}; the axes are {', '.join(axes)}")
        there = list(axes[axis])
        read[axis] = tuple(map(scalar, levels if isinstance(levels, list) else [levels]))
        for level in read[axis]:
            if level not in there:
                raise ConfigError(
                    f"{where} names {axis}={level!r}; its levels are {', '.join(there)}"
                )
    return read


def metrics(found: Any, where: str) -> dict[str, bool]:
    """By name: whether higher is better.

    Raises:
        ConfigError: for what is neither higher nor lower.
    """
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where} is {found!r}; it must be names with higher or lower")
    for name, better in found.items():
        if better not in BETTER:
            raise ConfigError(f"{where}.{name} is {better!r}; it must be {' or '.join(BETTER)}")
    return {str(name): BETTER[better] for name, better in found.items()}


def mapping(found: Any, keys: Iterable[str], where: str) -> Mapping[str, Any]:
    """A mapping with no other keys than these.

    Raises:
        ConfigError: for anything else.
    """
    allowed = list(keys)
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where} is {found!r}; it must have the keys {', '.join(allowed)}")
    for key in found:
        if key not in allowed:
            raise ConfigError(f"{where}: unknown key {key!r}; there are {', '.join(allowed)}")
    return found


def entries(found: Any, where: str) -> list[Any]:
    """A list.

    Raises:
        ConfigError: for anything else.
    """
    if not isinstance(found, list):
        raise ConfigError(f"{where} is {found!r}; it must be a list such as [{{axis: level}}]")
    return found


def numbers(found: Any, where: str) -> tuple[float, ...]:
    """Numbers; YAML takes ``1e8`` for a word."""
    values = found if isinstance(found, list) else [found]
    try:
        read = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        read = ()
    if not read or not all(map(math.isfinite, read)):
        raise ConfigError(f"{where} is {found!r}; it must be a list of numbers")
    return read


def scalar(value: Any) -> str:
    """A value of YAML as Hydra reads it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
