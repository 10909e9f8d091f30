"""The silo card: a file of the silo that says who it is, where its records lie and what it can
train. The server never sees the file.

    name: hospital-a              # hospital-a.yaml, or the same keys in a .toml
    records: records.jsonl
    rank: 8                       # or {attention: 8, mlp: 4}
    device: cpu

Its SuperNode is started with ``--node-config 'silo="/srv/hospital-a.yaml"'``. Relative paths are
those from the card's folder.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedlora.core import variables
from fedlora.core.checks import at_least
from fedlora.core.errors import ConfigError

KEY = "silo"
"""Key of ``--node-config`` that holds the path of the card."""
NAME = re.compile(r"[\w][\w.-]{0,63}")
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class SiloCard:
    """One silo, as it describes itself."""

    name: str
    """By which the run's records name it; no two silos of a run have the same."""
    records: str
    """Absolute path of its records, in any of the forms that docs/data.md lists."""
    attention: int
    """Rank of its adapters in attention modules."""
    mlp: int
    """Rank in all other modules."""
    device: str = "auto"
    """``auto``: the first CUDA device, else the CPU."""
    model: str = ""
    """Absolute folder of the base model here; empty: where the run's configuration has it."""
    cache: str = ""
    """Absolute folder of token stores; empty: ``FEDLORA_CACHE``, else ``~/.cache/fedlora``."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(
                f"name={self.name!r} must be up to 64 letters, digits and any of '_.-', not "
                "starting with a dot or a hyphen"
            )
        at_least("rank in attention modules", self.attention, 1)
        at_least("rank in other modules", self.mlp, 1)
        if not DEVICE.fullmatch(self.device):
            raise ValueError(f"device={self.device!r} is not auto, cpu, cuda or cuda:N")
        if not self.records:
            raise ValueError("records='' must name the silo's own records")

    def settle(self) -> None:
        """Let this process keep what it caches where the card says."""
        if self.cache:
            os.environ[variables.CACHE] = self.cache


KNOWN = ("name", "records", "rank", "device", "model", "cache")
REQUIRED = KNOWN[:3]


def read_card(path: str | Path) -> SiloCard:
    """The card in a YAML or TOML file.

    Raises:
        ConfigError: one sentence that names the file, the key, the value and what is allowed.
    """
    file = Path(path).expanduser()
    values = _mapping(file)
    unknown, missing = sorted(values.keys() - {*KNOWN}), [k for k in REQUIRED if k not in values]
    if unknown:
        raise ConfigError(
            f"silo card {file}: unknown key {unknown[0]!r}; known: {', '.join(KNOWN)}"
        )
    if missing:
        raise ConfigError(f"silo card {file}: there is no {missing[0]!r}, which it must have")
    for key in KNOWN:
        value = values.get(key, "")
        if key != "rank" and not isinstance(value, str):
            raise ConfigError(f"silo card {file}: {key}={value!r} must be a text")
    attention, mlp = _ranks(file, values["rank"])
    texts = {key: values[key] for key in KNOWN if key in values and key != "rank"}
    for key in ("records", "model", "cache"):
        if texts.get(key):
            texts[key] = os.path.abspath(file.parent / Path(texts[key]).expanduser())
    try:
        return SiloCard(attention=attention, mlp=mlp, **texts)
    except ValueError as error:
        raise ConfigError(f"silo card {file}: {error}") from error


def _mapping(file: Path) -> Mapping[str, Any]:
    """The keys of a card's file."""
    try:
        text = file.read_text(encoding="utf-8")
        values = tomllib.loads(text) if file.suffix == ".toml" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"silo card {file} cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"silo card {file} is neither YAML nor TOML: {said}") from error
    if not isinstance(values, Mapping) or not all(isinstance(k, str) for k in values):
        raise ConfigError(f"silo card {file} holds no keys such as name: and records:")
    return values


def _ranks(file: Path, rank: object) -> tuple[int, int]:
    """The ranks in attention and in other modules."""
    if isinstance(rank, Mapping) and rank.keys() == {"attention", "mlp"}:
        pair = rank["attention"], rank["mlp"]
    else:
        pair = rank, rank
    if not all(type(r) is int for r in pair):
        raise ConfigError(
            f"silo card {file}: rank={rank!r} must be a whole number, or attention and mlp with "
            "one each"
        )
    return pair
