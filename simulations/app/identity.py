"""The identity of a run: the configuration keys that its results depend on."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedlora.core.errors import ModelError
from fedlora.core.reading import json_in

MODEL = "model.json"
"""The file of a run folder that describes the base model and its location."""
LABELS = "labels.json"
"""That which names the labels of a classification and counts those of each client."""
VOLATILE = (
    *("rounds", "output_dir", "resume", "report", "name", "runtime", "tracking", "analyses"),
    "experiment",
)
"""Keys that may change between a run and its continuation: results do not depend on them."""
STOPPING = ("patience", "min_delta", "watch", "watch_group", "watch_adapter", "better")
"""Keys of ``federation`` that say when a run stops early, and change no round of it."""
ELSEWHERE = {
    "federation": ("rounds", "timeout_s", "keep", "clients_per_message", *STOPPING),
    "data": ("path",),
    "model": ("path",),
}
"""Such keys within groups; data and model are identified by their contents."""


def run_hash(resolved: Mapping[str, Any], data: str, model: str) -> str:
    """Identity of everything that results depend on.

    Args:
        resolved: the whole configuration as plain values.
        data: key of the token store: the content of the data, wherever it lies.
        model: fingerprint of the base model, wherever it lies.
    """
    from fedlora.run import checkpoint  # torch, which help and names of runs do without

    return checkpoint.config_hash(stable(resolved) | {"_data": data, "_model": model})


def stable(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that results depend on, beside the number of rounds and the
    contents of data and base model.

    Args:
        resolved: the whole configuration as plain values.
    """
    kept = {k: v for k, v in resolved.items() if k not in VOLATILE}
    for group, keys in ELSEWHERE.items():
        kept[group] = {k: v for k, v in resolved[group].items() if k not in keys}
    return kept


def whole(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that results of a whole run depend on: `stable`, the number of
    rounds, and what ends it early.

    Args:
        resolved: the whole configuration as plain values, or such a part.
    """
    kept = stable(resolved) | {"rounds": resolved["rounds"]}
    kept["federation"] |= {k: v for k, v in resolved["federation"].items() if k in STOPPING}
    return kept


def digest(resolved: Mapping[str, Any]) -> str:
    """SHA-256 of what results of a whole run depend on (`whole`), without the contents of data and
    base model: to tell runs apart that have not begun.

    Args:
        resolved: the whole configuration as plain values.
    """
    content = whole(resolved)
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def changed(folder: Path, resolved: Mapping[str, Any], data: str, model: str) -> str:
    """A sentence with what differs from a run folder's files: identity keys, data and base model.

    Args:
        folder: the run folder.
        resolved: the configuration now.
        data: key of the token store now.
        model: fingerprint of the base model now.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        return ""
    try:
        before = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        return f". What differs is not known: {file} cannot be read ({type(error).__name__})"
    if not isinstance(before, dict):
        return f". What differs is not known: {file} holds no mapping"
    old, new = (dict(flat(values)) for values in (before, resolved))
    free = {*VOLATILE, *(f"{group}.{key}" for group, keys in ELSEWHERE.items() for key in keys)}
    found = [
        f"{key}={new.get(key)!r}, was {old.get(key)!r}"
        for key in dict.fromkeys([*old, *new])
        if key.split(".")[0] not in free and key not in free and old.get(key) != new.get(key)
    ]
    for what, name, now in (("data", "population.json", data), ("base model", MODEL, model)):
        try:
            then = json_in(folder / name, f"the record of the {what}").get("fingerprint", now)
        except ModelError as error:
            found.append(f"perhaps the {what}: {error}")
            continue
        if then != now:
            found.append(f"the {what} ({now}, was {then})")
    return f". What differs: {'; '.join(found)}" if found else ""


def flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values; lists are one value, and mappings without keys are left out.

    Args:
        values: a configuration.
        prefix: of the keys.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
