"""Whether a recorded configuration is still today's: what has changed since, key by key.

Configurations gain groups and keys, at defaults that change nothing, so that a hash of the whole
says of every older record that it is another. Here a recorded configuration is today's if

* every key that was recorded exists today with the same value, and
* every key that is new has the value that it has by default. That is what today's groups give for
  the choices that were recorded (``strategy=rolora``), with the recorded values in place and
  without experiment and overrides. A group that is itself new has the choice of conf/config.yaml,
  so ``robust=median`` is a difference from a record that knows no ``robust``.

Keys that results do not depend on (`simulations.app.identity`) are no part of it.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedlora.core.errors import ConfigError
from simulations.app.compose import load
from simulations.app.identity import VOLATILE, flat, whole

_DIGITS = 16
_SHOWN = 3
"""Differences that a sentence names."""


@dataclass(frozen=True)
class Configuration:
    """What a run's results depend on, as plain values that any machine can compare."""

    values: Mapping[str, Any]
    """By dotted key; lists are one value. A path is the name of its file and a hash of that."""
    choices: Mapping[str, str]
    """The chosen file of each group; empty if they are not known. New keys then have the defaults
    of conf/config.yaml's choices."""

    def record(self) -> dict[str, dict[str, Any]]:
        """For a JSON file."""
        return {"values": dict(self.values), "choices": dict(self.choices)}


def configuration(resolved: Mapping[Any, Any], choices: Mapping[str, Any]) -> Configuration:
    """What a run's results depend on.

    Args:
        resolved: the whole configuration as plain values, or the part that results depend on.
        choices: the chosen file of each group, as Hydra names both.
    """
    values = {key: _plain(value) for key, value in flat(whole(resolved))}
    return Configuration(values, {k: str(v) for k, v in choices.items() if v and _decides(k)})


def recorded(found: Mapping[str, Any]) -> Configuration:
    """What `Configuration.record` gave.

    Raises:
        ValueError: if it is no such thing.
    """
    values, choices = found.get("values"), found.get("choices")
    if not isinstance(values, Mapping) or not isinstance(choices, Mapping):
        raise ValueError("it has no configuration")
    return Configuration(dict(values), {str(k): str(v) for k, v in choices.items()})


def in_file(file: Path) -> Configuration | None:
    """The configuration of a run folder, whose choices are not known; None if there is none."""
    try:
        found = OmegaConf.to_container(OmegaConf.load(file))
        return configuration(found, {}) if isinstance(found, dict) else None
    except (OSError, ValueError, KeyError, AttributeError, YAMLError, OmegaConfBaseException):
        return None


def difference(then: Configuration, now: Configuration, search_path: Sequence[str] = ()) -> str:
    """In words, what of a recorded configuration is not today's; empty if it is today's.

    Args:
        then: the recorded one.
        now: the one of today.
        search_path: words that tell Hydra of further folders of configuration.
    """
    found = []
    for key, value in then.values.items():
        if key not in now.values:
            found.append(f"{key} is no key any more, it was {value!r}")
        elif not _same(now.values[key], value):
            found.append(f"{key}={now.values[key]!r}, was {value!r}")
    new = {key: value for key, value in now.values.items() if key not in then.values}
    if new and not found:
        usual = _defaults(then, tuple(search_path))
        for key, value in new.items():
            if key not in usual:
                found.append(f"{key}={value!r} is new and has no default")
            elif not _same(usual[key], value):
                found.append(f"{key}={value!r} is new, its default is {usual[key]!r}")
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def shared(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What all mappings have in common, and for each what it has beside that."""
    first = rows[0] if rows else {}
    common = {
        key: value
        for key, value in first.items()
        if all(key in row and _same(row[key], value) for row in rows)
    }
    return common, [{k: v for k, v in row.items() if k not in common} for row in rows]


def _decides(group: str) -> bool:
    """Whether results can depend on what is chosen of a group."""
    return group.split("/")[0].split("@")[0] not in (*VOLATILE, "hydra")


def _defaults(then: Configuration, search_path: tuple[str, ...]) -> Mapping[str, Any]:
    """All keys of today with the values that they have beside the recorded ones."""
    try:
        cfg = _chosen(tuple(sorted(then.choices.items())), search_path)
    except ConfigError:  # a file that was chosen is gone
        cfg = _chosen((), search_path)
    try:
        cfg = OmegaConf.merge(cfg, nested(then.values))
        resolved = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:  # of another shape: no default is known
        return {}
    assert isinstance(resolved, dict)
    return configuration(resolved, {}).values


@cache
def _chosen(choices: tuple[tuple[str, str], ...], search_path: tuple[str, ...]) -> Any:
    """Today's composition of some choices, without experiment and overrides."""
    cfg = load([*search_path, *(f"{group}={file}" for group, file in choices)])
    OmegaConf.set_struct(cfg, False)
    return cfg


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as a configuration that `in_file` reads."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *path, last = key.split(".")
        node = found
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return found


def _same(a: Any, b: Any) -> bool:
    """Whether two values are one, ``1`` and ``1.0`` being two."""
    return a is b or json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _plain(value: Any) -> Any:
    """A value as any machine's JSON has it."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str) and value.startswith("/"):
        return _portable(Path(value))
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _portable(path: Path) -> str:
    """A path without the folders of this machine: the name, and of a file what it holds."""
    if not path.is_file():
        return path.name
    return f"{path.name}#{hashlib.sha256(path.read_bytes()).hexdigest()[:_DIGITS]}"
