"""Natural Instructions, one task per client, as the FlexLoRA authors split it.

Three forms of the same records: the authors' folder of JSON files, a Parquet file, and the hub. The
first two keep the authors' client ids (0..1612); the third splits the tasks anew by their recipe.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedlora.core.errors import DataError
from fedlora.core.seeding import generator
from fedlora.data import files
from fedlora.data.fields import Entry, Fields, Row, require
from fedlora.data.locations import Location, load_hub, table_rows
from fedlora.data.records import Record
from fedlora.data.source import Source, file_identity
from fedlora.data.values import SPLIT_NAMES, client_number, split_name

NEEDED = ("client_id", "split", "instruction", "output")
"""Columns of a table; ``input`` and ``category`` may be missing."""
TASK_COLUMNS = ("task_name", "definition", "inputs", "targets")
DUPLICATE_CLIENT = 1613
"""In the authors' folder, client 1612 again with its rows shuffled over the splits. Using both
would leak test rows into training; the authors' own code never samples it."""

_TEXTS = Fields()
_TASK_TEXTS = Fields(instruction="definition", input="inputs", output="targets")
_FILE = re.compile(r"local_(training|eval|test)_(\d+)\.json")
_FILE_KINDS = ("training", "eval", "test")
_TASK_SHARE, _TASK_FLOOR, _TASK_CAP = 0.1, 20, 650  # the authors' subsample of each task
_VERSION = 2  # of the reading below: part of the fingerprint


def task_group(category: str) -> str:
    """The task group of an authors' category: ``"Data to Text 7.json"`` is ``"Data to Text"``."""
    return re.sub(r" \d+\.json$", "", category)


@dataclass(frozen=True, kw_only=True)
class NaturalInstructions(Source):
    """Natural Instructions from a folder, a Parquet file or the hub."""

    name: ClassVar[str] = "natural_instructions"
    licence: ClassVar[str] = "Apache-2.0"

    path: str
    """A folder with ``local_{training,eval,test}_{i}.json``, a Parquet file with the columns
    ``client_id, split, category, instruction, input, output`` (category and input may be missing),
    or a hub id such as ``Muennighoff/natural-instructions``."""
    revision: str | None = None
    """Revision of the hub data set."""
    seed: int = 0
    """Draws the examples of each task when a hub data set has no clients of its own."""

    def fingerprint(self) -> str:
        """Content of the Parquet file, names, sizes and times of the folder, or id and revision."""
        path = Path(self.path).expanduser()
        if path.is_dir():
            files = [(f.name, f.stat()) for f in _client_files(path)]
            content = ",".join(f"{name}:{s.st_size}:{s.st_mtime_ns}" for name, s in files)
        elif path.is_file():
            content = file_identity(path)
        else:
            content = f"{self._location().hub_id()}@{self.revision} seed {self.seed}"
        return f"{_VERSION} {content}"

    def records(self) -> Iterator[Record]:
        """Records by client id (folder), in the file's order (Parquet) or by task name (hub)."""
        path = Path(self.path).expanduser()
        if path.is_dir():
            return _from_folder(path)
        return _from_parquet(path) if path.is_file() else self._from_hub()

    def _from_hub(self) -> Iterator[Record]:
        hub_id = self._location().hub_id()
        parts = load_hub(hub_id, self.revision)
        columns = list(next(iter(parts.values())).column_names)
        if set(TASK_COLUMNS) <= set(columns):
            return _from_tasks(hub_id, parts, self.seed)
        return _from_hub_clients(hub_id, parts, columns)

    def _location(self) -> Location:
        return Location(self.path, self.revision)


# --- the authors' folder -------------------------------------------------------------------------


def _client_files(folder: Path) -> list[Path]:
    """The folder's client files by client and split, without the duplicate client."""
    found = [(f, m) for f in folder.iterdir() if (m := _FILE.fullmatch(f.name))]
    if not found:
        raise DataError(
            f"data.path={str(folder)!r} has no files local_{{training,eval,test}}_{{i}}.json"
        )
    wanted = sorted(
        (int(m[2]), _FILE_KINDS.index(m[1]), f) for f, m in found if int(m[2]) != DUPLICATE_CLIENT
    )
    return [f for _, _, f in wanted]


def _from_folder(folder: Path) -> Iterator[Record]:
    for file in _client_files(folder):
        match = _FILE.fullmatch(file.name)
        assert match
        for row in files.read(file):
            yield _record(int(match[2]), SPLIT_NAMES[match[1]], _TEXTS.read(row))


def _record(client: int, split: str, entry: Entry) -> Record:
    category, texts = entry.category, (entry.instruction, entry.input, entry.output)
    return Record(client, split, task_group(category), *texts, category, entry.turns)


# --- tables --------------------------------------------------------------------------------------


def _from_parquet(path: Path) -> Iterator[Record]:
    _check_columns(path)
    for i, row in enumerate(files.parquet_rows(path, NEEDED)):
        yield _owned(Row(row, f"{path}, row {i}"))


def _owned(row: Row) -> Record:
    """A row that names its client and its split."""
    client = client_number(row.values["client_id"], "client_id", row.where)
    entry = _TEXTS.read(row)
    named = row.split or split_name(row.values["split"], "split", row.where)
    return _record(client, named, entry)


def _check_columns(path: Path) -> None:
    """Check clients and splits of a whole table before any text is read."""
    checks = {"client_id": client_number, "split": split_name}
    checked: set[tuple[str, Any]] = set()
    for i, row in enumerate(files.parquet_rows(path, NEEDED, only=tuple(checks))):
        for name, check in checks.items():
            if (name, row[name]) not in checked:
                check(row[name], name, f"{path}, row {i}")
                checked.add((name, row[name]))


def _from_hub_clients(
    hub_id: str, parts: Mapping[str, Any], columns: list[str]
) -> Iterator[Record]:
    """Rows with client ids; without a column ``split``, the data set's own splits count."""
    own = "split" not in columns
    require(columns, [c for c in NEEDED if c != "split" or not own], f"the data set {hub_id}")
    for name, part in parts.items():
        split = split_name(name, "split", f"the data set {hub_id}") if own else ""
        for row in table_rows(part, f"the data set {hub_id}, {name}"):
            yield _owned(row._replace(split=split))


def _from_tasks(hub_id: str, parts: Mapping[str, Any], seed: int) -> Iterator[Record]:
    """Every task becomes a client: a tenth of its rows, 20 to 650, split 80/10/10 at random."""
    import datasets

    rows = datasets.concatenate_datasets(list(parts.values()))
    names = np.asarray(rows["task_name"])
    tasks, task_of_row = np.unique(names, return_inverse=True)
    order = np.argsort(task_of_row, kind="stable")
    bounds = np.searchsorted(task_of_row[order], np.arange(len(tasks) + 1))
    for client, task in enumerate(tasks):
        held = order[bounds[client] : bounds[client + 1]]
        n = int(np.clip(_TASK_SHARE * len(held), _TASK_FLOOR, _TASK_CAP))
        drawn = generator(seed, "natural_instructions", client).permutation(held)[:n]
        held_out = max(1, len(drawn) // 10) if len(drawn) > 2 else 0
        where = f"the data set {hub_id}, task {task}"
        for i, row in enumerate(table_rows(rows.select(drawn.tolist()), where)):
            left = len(drawn) - i
            split = "test" if left <= held_out else "eval" if left <= 2 * held_out else "train"
            e = _TASK_TEXTS.read(row)
            category = re.sub(r"^task\d+_", "", str(task))
            texts = (e.instruction, e.input, e.output)
            yield Record(client, split, category, *texts, str(task), e.turns)
