"""The name of a run, which is the name of its folder: what is run, and what was changed.

    smoke-flexlora-heavy_tail_strong-sotu-tiny-s0-client.lr=0.001-population.per_round=2

Experiment, strategy, ranks, data, model, seed, then every other override that results depend on, by
key, with its value as it was understood (``1e-3`` and ``0.001`` are one). What may change between a
run and its continuation (`simulations.app.identity`) is no part of it, so that ``resume=auto``
finds the folder.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence

from omegaconf import Container, DictConfig, OmegaConf

from simulations.app.identity import ELSEWHERE, VOLATILE

LONGEST = 120
"""Characters of a name; folders may have 255 bytes."""
GROUPS = ("strategy", "ranks", "data", "model")
_FREE = {f"{group}.{key}" for group, keys in ELSEWHERE.items() for key in keys if key != "path"}
_DIGITS = 6


def run_name(cfg: DictConfig, choices: Mapping[str, str], overrides: Sequence[str]) -> str:
    """The name of a run that was given none.

    Different changes have different names: whatever is left out of a value, or cut at the end, is
    replaced by a hash of all changes.

    Args:
        cfg: the composed configuration.
        choices: the chosen file of each group.
        overrides: Hydra's words, the last of a key being the one that counts.
    """
    experiment = [str(choices["experiment"])] if choices.get("experiment") else []
    head = "-".join([*experiment, *(choices[g] for g in GROUPS), f"s{cfg.seed}"])
    changes = sorted(dict(_changes(cfg, overrides)).items())
    name = "-".join([_plain(head), *(f"{_place(k)}={_readable(v)}" for k, v in changes)])
    if len(name) <= LONGEST and all(_is_whole(value) for _, value in changes):
        return name
    digest = hashlib.sha256(repr((head, changes)).encode()).hexdigest()[:_DIGITS]
    return f"{name[: LONGEST - _DIGITS - 1].rstrip('-=,.')}-{digest}"


def _changes(cfg: DictConfig, overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Keys and values of the overrides that tell runs apart."""
    for word in overrides:
        key, _, text = word.partition("=")
        plain = key.lstrip("+~")
        first = re.split(r"[.@/]", plain)[0]
        if first in (*VOLATILE, "hydra", "seed") or plain in (*GROUPS, *_FREE):
            continue
        if key.startswith("~"):
            yield plain, "none"
            continue
        value = OmegaConf.select(cfg, plain) if re.fullmatch(r"[\w.]+", plain) else None
        yield plain, text if value is None or isinstance(value, Container) else str(value)


def _place(key: str) -> str:
    """Where an override acts: ``model.base`` of ``model@model.base``."""
    return _plain((key.partition("@")[2] or key).replace("/", "."))


def _readable(text: str) -> str:
    """A value as a part of a name: the last part of a path, a list without its brackets."""
    return _plain(_inner(text).rstrip("/").rpartition("/")[2])


def _is_whole(text: str) -> bool:
    """Whether the name shows all of a value, and nothing in it that reads as another key."""
    return _readable(text) == _inner(text) and "=" not in text


def _inner(text: str) -> str:
    return text[1:-1] if text[:1] + text[-1:] == "[]" else text


def _plain(text: str) -> str:
    """Letters, digits and what needs no quotes in a shell."""
    return re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", text)
