"""Natural Instructions, one task per client, as the FlexLoRA authors split it.

Three forms of the same records: the authors' folder of JSON files, a Parquet file, and the hub. The
first two keep the authors' client ids (0..1612); the third splits the tasks anew by their recipe.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedlora.core.errors import DataError
from fedlora.core.seeding import generator
from fedlora.data.records import SPLITS, Record
from fedlora.data.source import Source, file_identity
from fedlora.data.tables import open_parquet, require

COLUMNS = ("client_id", "split", "category", "instruction", "input", "output")
TASK_COLUMNS = ("task_name", "definition", "inputs", "targets")
DUPLICATE_CLIENT = 1613
"""In the authors' folder, client 1612 again with its rows shuffled over the splits. Using both
would leak test rows into training; the authors' own code never samples it."""

_FILE = re.compile(r"local_(training|eval|test)_(\d+)\.json")
_FILE_SPLITS = {"training": "train", "eval": "eval", "test": "test"}
_HUB_SPLITS = {"train": "train", "validation": "eval", "eval": "eval", "test": "test"}
_TASK_SHARE, _TASK_FLOOR, _TASK_CAP = 0.1, 20, 650  # the authors' subsample of each task
_VERSION = 1  # of the reading below: part of the fingerprint


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
    ``client_id, split, category, instruction, input, output``, or a hub id such as
    ``Muennighoff/natural-instructions``."""
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
            content = f"{self._hub_id()}@{self.revision} seed {self.seed}"
        return f"{_VERSION} {content}"

    def records(self) -> Iterator[Record]:
        """Records by client id (folder), in the file's order (Parquet) or by task name (hub)."""
        path = Path(self.path).expanduser()
        if path.is_dir():
            return _from_folder(path)
        return _from_parquet(path) if path.is_file() else self._from_hub()

    def _hub_id(self) -> str:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.path) or self.path.startswith("."):
            raise DataError(
                f"data.path={self.path!r} is neither a folder nor a file nor a hub id 'owner/name'"
            )
        return self.path

    def _from_hub(self) -> Iterator[Record]:
        import datasets

        hub_id = self._hub_id()
        try:
            loaded = datasets.load_dataset(hub_id, revision=self.revision)
        except Exception as error:  # offline, unknown, gated: many classes, one remedy
            raise DataError(
                f"data.path={hub_id!r} is no local file or folder and could not be loaded from the "
                f"hub ({type(error).__name__}: {error}); give a path, or go online once"
            ) from error
        parts = {name: loaded[name] for name in loaded}
        columns = list(next(iter(parts.values())).column_names)
        if set(TASK_COLUMNS) <= set(columns):
            return _from_tasks(datasets.concatenate_datasets(list(parts.values())), self.seed)
        return _from_hub_clients(hub_id, parts, columns)


# --- the authors' folder -------------------------------------------------------------------------


def _client_files(folder: Path) -> list[Path]:
    """The folder's client files by client and split, without the duplicate client."""
    found = [(f, m) for f in folder.iterdir() if (m := _FILE.fullmatch(f.name))]
    if not found:
        raise DataError(
            f"data.path={str(folder)!r} has no files local_{{training,eval,test}}_{{i}}.json"
        )
    kinds = list(_FILE_SPLITS)
    wanted = sorted(
        (int(m[2]), kinds.index(m[1]), f) for f, m in found if int(m[2]) != DUPLICATE_CLIENT
    )
    return [f for _, _, f in wanted]


def _from_folder(folder: Path) -> Iterator[Record]:
    for file in _client_files(folder):
        match = _FILE.fullmatch(file.name)
        assert match
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{file} is not JSON: {error}") from error
        if not isinstance(rows, list):
            raise DataError(f"{file} must hold a list of records, not {type(rows).__name__}")
        for i, row in enumerate(rows):
            require(row, COLUMNS[2:], f"record {i} of {file}")
            yield _record(int(match[2]), _FILE_SPLITS[match[1]], row)


def _record(client: int, split: str, row: dict[str, Any]) -> Record:
    category = str(row["category"] or "")
    instruction, input, output = (str(row[c] or "") for c in COLUMNS[3:])
    return Record(client, split, task_group(category), instruction, input, output, category)


# --- Parquet -------------------------------------------------------------------------------------


def _from_parquet(path: Path) -> Iterator[Record]:
    file = open_parquet(path, COLUMNS)
    head = file.read(columns=["client_id", "split"])
    _check_columns(head["client_id"], head["split"], str(path))
    for batch in file.iter_batches(4096, columns=list(COLUMNS)):
        for row in batch.to_pylist():
            yield _record(int(row["client_id"]), str(row["split"]), row)


def _check_columns(clients: Any, splits: Any, where: str) -> None:
    """Check two Arrow columns before any text is read."""
    import pyarrow

    if not pyarrow.types.is_integer(clients.type) or clients.null_count:
        raise DataError(
            f"{where}: client_id must be an integer in every row; it is {clients.type} with "
            f"{clients.null_count} missing"
        )
    values = splits.combine_chunks().cast(pyarrow.string())
    strange = [v for v in values.unique().to_pylist() if v not in SPLITS]
    if strange:
        row = values.to_pylist().index(strange[0])
        raise DataError(f"{where}, row {row}: split={strange[0]!r} is not one of {list(SPLITS)}")


# --- the hub -------------------------------------------------------------------------------------


def _from_hub_clients(hub_id: str, parts: dict[str, Any], columns: list[str]) -> Iterator[Record]:
    """Rows with client ids; without a column ``split``, the data set's own splits count."""
    own = "split" not in columns
    require(columns, [c for c in COLUMNS if c != "split" or not own], f"the data set {hub_id}")
    for name, part in parts.items():
        if own and name not in _HUB_SPLITS:
            raise DataError(f"the data set {hub_id} has a split {name!r}, not {list(_HUB_SPLITS)}")
        for i, row in enumerate(part):
            split = name if own else str(row["split"])
            if split not in _HUB_SPLITS:
                raise DataError(f"the data set {hub_id}, {name} row {i}: unknown split {split!r}")
            yield _record(int(row["client_id"]), _HUB_SPLITS[split], row)


def _from_tasks(rows: Any, seed: int) -> Iterator[Record]:
    """Every task becomes a client: a tenth of its rows, 20 to 650, split 80/10/10 at random."""
    names = np.asarray(rows["task_name"])
    tasks, task_of_row = np.unique(names, return_inverse=True)
    order = np.argsort(task_of_row, kind="stable")
    bounds = np.searchsorted(task_of_row[order], np.arange(len(tasks) + 1))
    for client, task in enumerate(tasks):
        held = order[bounds[client] : bounds[client + 1]]
        n = int(np.clip(_TASK_SHARE * len(held), _TASK_FLOOR, _TASK_CAP))
        drawn = generator(seed, "natural_instructions", client).permutation(held)[:n]
        held_out = max(1, len(drawn) // 10) if len(drawn) > 2 else 0
        for i, row in enumerate(rows.select(drawn.tolist())):
            left = len(drawn) - i
            split = "test" if left <= held_out else "eval" if left <= 2 * held_out else "train"
            instruction, input, output = (str(row[c] or "") for c in TASK_COLUMNS[1:])
            category = re.sub(r"^task\d+_", "", str(task))
            yield Record(client, split, category, instruction, input, output, str(task))
