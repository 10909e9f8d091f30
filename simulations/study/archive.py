"""The runs of a study in one small file, to go on from on another day or another machine.

A zip archive with a member for each run: its configuration, what tables read of its records
(`simulations.study.results`), how it ended and what it cost; no adapters, checkpoints or reports,
and no path of the machine. Equal runs give equal bytes.
"""

import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.core.errors import ConfigError
from fedlora.core.files import write_file
from simulations.app.since import Configuration, recorded
from simulations.study.plan import Planned, label
from simulations.study.values import Cell

FORMAT = 1
ABOUT = "study.json"
"""The member that says of which study the archive is, and in which format."""
LARGEST = 2**24
"""Bytes of a member, unpacked; no run of a study comes near it."""
_MEMBER = re.compile(r"runs/[A-Za-z0-9_.,=+-]+\.json")
_LONGEST, _DIGITS = 80, 8
_FAULTS = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError),
    *(ValueError, KeyError, TypeError, AttributeError),
)

Key = tuple[str, Cell, int]
"""Stage, cell and seed: what a run is within its study, whatever its configuration."""
Table = Mapping[str, Any]
"""``keys``, and ``rows`` with a value for each of them; null is none."""


@dataclass(frozen=True)
class Packed:
    """One run of an archive."""

    key: Key
    configuration: Configuration
    status: Mapping[str, Any]
    rounds: Table
    evaluations: Table
    clients: Table
    """What was measured on each client, as far as the study's metrics are computed from it."""
    cost: Sequence[Mapping[str, Any]]
    """A line for each attempt at the run."""

    @property
    def done(self) -> int:
        """Rounds that it has."""
        return int(self.status["rounds_done"])

    def reaches(self, rounds: int) -> bool:
        """Whether it has so many rounds, or has ended early by its own rule."""
        return self.done >= rounds or bool(self.status["message"])

    @property
    def label(self) -> str:
        """The run in words."""
        return f"{label(self.key[1])}, seed {self.key[2]}"

    @property
    def member(self) -> str:
        """Its name in the archive."""
        stage, cell, seed = self.key
        texts = [*filter(None, [stage]), *(level for _, level in cell)]
        levels = "-".join(re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", text) for text in texts)
        digest = hashlib.sha256(json.dumps(self.key).encode()).hexdigest()[:_DIGITS]
        return f"runs/{levels[:_LONGEST]}-s{seed}-{digest}.json"

    def content(self) -> dict[str, Any]:
        """What the member holds."""
        stage, cell, seed = self.key
        return {
            "stage": stage,
            "cell": [list(pair) for pair in cell],
            "seed": seed,
            "configuration": self.configuration.record(),
            "status": self.status,
            "rounds": self.rounds,
            "evaluations": self.evaluations,
            "clients": self.clients,
            "cost": list(self.cost),
        }


def key_of(run: Planned) -> Key:
    """What a run of the plan is within its study."""
    return run.stage, run.cell, run.seed


def packed(found: Mapping[str, Any]) -> Packed:
    """What `Packed.content` gave.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: if it is no such thing.
    """
    cell = tuple((_text(axis), _text(level)) for axis, level in found["cell"])
    status: dict[str, Any] = {key: _text(found["status"][key]) for key in ("status", "message")}
    status["rounds_done"] = _whole(found["status"]["rounds_done"])
    cost = [
        {"cpu_s": float(line["cpu_s"]), "wall_s": float(line["wall_s"])}
        | {"machine": _text(line["machine"]), "load": float(line["load"])}
        for line in found["cost"]
    ]
    return Packed(
        (_text(found["stage"]), cell, _whole(found["seed"])),
        recorded(found["configuration"]),
        status,
        _table(found["rounds"]),
        _table(found["evaluations"]),
        _table(found["clients"]),
        cost,
    )


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows with their keys said once; what is null is missing."""
    keys = list(dict.fromkeys(key for row in rows for key in row if row[key] is not None))
    return {"keys": keys, "rows": [[row.get(key) for key in keys] for row in rows]}


def rows_of(found: Table) -> list[dict[str, Any]]:
    """The rows of a table."""
    return [
        {k: v for k, v in zip(found["keys"], row, strict=True) if v is not None}
        for row in found["rows"]
    ]


def read_archive(file: Path, study: str) -> dict[Key, Packed]:
    """The runs of an archive.

    Args:
        file: the archive.
        study: whose it must be.

    Raises:
        ConfigError: one sentence, if it is no archive of this study or is damaged.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such file; --record writes a study's runs")
    at = ABOUT
    try:
        with zipfile.ZipFile(file) as found:
            names = found.namelist()
            about = _member(found, ABOUT) if ABOUT in names else {}
            if about.get("format") != FORMAT:
                said = repr(about["format"]) if "format" in about else "none"
                raise ConfigError(f"{file} has format {said}; this version reads format {FORMAT}")
            if about.get("study") != study:
                raise ConfigError(f"{file} is of study {about.get('study')!r}, not of {study!r}")
            for name in names:
                if name != ABOUT and not _MEMBER.fullmatch(name):
                    raise ConfigError(f"{file} has a member {name!r}, which is no run of a study")
            runs: dict[Key, Packed] = {}
            for at in (name for name in names if name != ABOUT):
                one = packed(_member(found, at))
                runs[one.key] = one
            return runs
    except _FAULTS as error:
        if isinstance(error, ConfigError):
            raise
        if isinstance(error, zipfile.BadZipFile) and not zipfile.is_zipfile(file):
            raise ConfigError(f"{file} is no zip archive") from error
        fault = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{file} is damaged: {at} cannot be read ({fault})") from error


def write_archive(file: Path, study: str, runs: Mapping[Key, Packed]) -> int:
    """Write an archive, whole or not at all.

    Returns:
        Its size in bytes.
    """
    content = {one.member: one.content() for one in runs.values()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, found in [(ABOUT, {"format": FORMAT, "study": study}), *sorted(content.items())]:
            text = json.dumps(found, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
            about = zipfile.ZipInfo(name)  # of a fixed date
            about.create_system, about.external_attr = 3, 0o644 << 16
            about.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(about, text.encode(), compresslevel=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, out.getvalue())
    return len(out.getvalue())


def _member(archive: zipfile.ZipFile, name: str) -> Mapping[str, Any]:
    if archive.getinfo(name).file_size > LARGEST:
        raise ValueError(f"it has more than {LARGEST} bytes")
    found = json.loads(archive.read(name))
    if not isinstance(found, Mapping):
        raise ValueError("it holds no object")
    return found


def _table(found: Any) -> Table:
    keys, rows = [_text(key) for key in found["keys"]], found["rows"]
    for row in rows:
        if not isinstance(row, list) or len(row) != len(keys):
            raise ValueError("a row has not one value for each key")
        if not all(v is None or isinstance(v, int | float | str) for v in row):
            raise ValueError("a row holds more than numbers and texts")
    return {"keys": keys, "rows": rows}


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise ValueError(f"{found!r} is no text")
    return found


def _whole(found: Any) -> int:
    if type(found) is not int:
        raise ValueError(f"{found!r} is no whole number")
    return found
