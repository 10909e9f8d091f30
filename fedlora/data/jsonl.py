"""Your own instruction records: JSON lines, divided over clients by a key or by a partitioner."""

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from fedlora.core.checks import (
    at_least,
    fraction,
    one_of,
)
from fedlora.core.errors import DataError
from fedlora.core.seeding import generator
from fedlora.data import partition
from fedlora.data.records import SPLITS, Record
from fedlora.data.source import Source, file_identity

PARTITIONS = ("natural", "iid", "dirichlet")
_SPLIT_NAMES = {s: s for s in SPLITS} | {"validation": "eval", "valid": "eval", "dev": "eval"}
_VERSION = 1  # of the reading below: part of the fingerprint


@dataclass(frozen=True, kw_only=True)
class Jsonl(Source):
    """Alpaca-style records from JSON-lines files."""

    name: ClassVar[str] = "jsonl"

    path: str
    """A file or a pattern such as ``data/*.jsonl``; ``**`` descends into folders."""
    instruction_field: str = "instruction"
    input_field: str = "input"
    """May be missing in a record."""
    output_field: str = "output"
    category_field: str = "category"
    """May be missing in a record."""
    split_field: str = ""
    """Names each record's split (``train``, ``eval`` or ``validation``, ``test``). Empty: records
    are drawn at random by the two fractions."""
    eval_fraction: float = 0.1
    test_fraction: float = 0.1
    """Fraction of each client's records, at least one record if the client has three or more."""
    partition: str = "natural"
    """``natural``: one client per value of `key`. ``iid``: `clients` equal random parts.
    ``dirichlet``: `clients` parts; their fractions of each value of `by` are drawn from
    Dir(`alpha`)."""
    key: str = "client"
    clients: int = 100
    alpha: float = 0.5
    by: str = "category"
    min_examples: int = 1
    """Minimum per client under ``dirichlet``: fractions are drawn again until it is met."""
    seed: int = 0
    """Seed of the partition and the split; not the seed of the run, so runs share their data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("data.partition", self.partition, PARTITIONS)
        fraction("data.eval_fraction", self.eval_fraction)
        fraction("data.test_fraction", self.test_fraction)
        at_least("data.clients", self.clients, 1)
        at_least("data.min_examples", self.min_examples, 1)
        at_least("data.alpha", self.alpha, 0, strict=True)
        at_least("data.seed", self.seed, 0)
        if self.eval_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"data.eval_fraction={self.eval_fraction} and data.test_fraction="
                f"{self.test_fraction} must leave something to train on: their sum must be < 1"
            )

    def fingerprint(self) -> str:
        """Every option but the path, and the content of every file."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "path"}
        files = [file_identity(f) for f in self._files()]
        return json.dumps([_VERSION, options, files], sort_keys=True)

    def records(self) -> Iterator[Record]:
        """Records by client, each client's in random order (in file order with `split_field`)."""
        rows = [self._checked(row, where) for row, where in self._rows()]
        if not rows:
            raise DataError(f"data.path={self.path!r}: the files have no records")
        for client, (name, members) in enumerate(self._partition(rows)):
            for i, split in self._splits(client, rows, members):
                row = rows[i]
                category = row.get(self.category_field)
                yield Record(
                    client,
                    split,
                    "" if category is None else str(category),
                    _text(row.get(self.instruction_field)),
                    _text(row.get(self.input_field)),
                    _text(row.get(self.output_field)),
                    name,
                )

    def _files(self) -> list[Path]:
        pattern = str(Path(self.path).expanduser())
        found = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
        if not found:
            raise DataError(f"data.path={self.path!r} matches no file (from {Path.cwd()})")
        return found

    def _rows(self) -> Iterator[tuple[Any, str]]:
        for file in self._files():
            with file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    where = f"{file}:{number}"
                    if not line.strip():
                        continue
                    try:
                        yield json.loads(line), where
                    except ValueError as error:  # also bytes that are not UTF-8
                        raise DataError(f"{where} is not JSON: {error}") from error

    def _checked(self, row: Any, where: str) -> dict[str, Any]:
        """The row, if it has what this configuration reads."""
        if not isinstance(row, dict):
            raise DataError(f"{where} must be an object, not {type(row).__name__}")
        needed = [self.instruction_field, self.output_field]
        needed += {"natural": [self.key], "iid": [], "dirichlet": [self.by]}[self.partition]
        needed += [self.split_field] if self.split_field else []
        for name in needed:
            if row.get(name) is None:
                raise DataError(f"{where} has no field {name!r}; found {sorted(row)}")
        for name in (self.instruction_field, self.input_field, self.output_field):
            if not isinstance(row.get(name, ""), str | int | float | None):
                kind = type(row[name]).__name__
                raise DataError(f"{where}: {name!r} must be a text or a number, not {kind}")
        if self.split_field and str(row[self.split_field]) not in _SPLIT_NAMES:
            raise DataError(
                f"{where}: {self.split_field}={row[self.split_field]!r} is not one of "
                f"{sorted(_SPLIT_NAMES)}"
            )
        return row

    def _partition(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[int]]]:
        """Name and row indices of each client."""
        if self.partition == "natural":
            for members in partition.natural([str(row[self.key]) for row in rows]):
                yield str(rows[members[0]][self.key]), members
            return
        if self.partition == "iid":
            parts = partition.iid(len(rows), self.clients, self.seed)
        else:
            labels = [str(row[self.by]) for row in rows]
            parts = partition.dirichlet(
                labels, self.clients, self.alpha, self.min_examples, self.seed
            )
        yield from (("", members) for members in parts)

    def _splits(
        self, client: int, rows: Sequence[Mapping[str, Any]], members: Sequence[int]
    ) -> Iterator[tuple[int, str]]:
        if self.split_field:
            yield from ((i, _SPLIT_NAMES[str(rows[i][self.split_field])]) for i in members)
            return
        n = len(members)
        evals, tests = (
            max(round(s * n), int(s > 0)) if n > 2 else 0
            for s in (self.eval_fraction, self.test_fraction)
        )
        order = generator(self.seed, "split", client).permutation(n).tolist()
        train = max(1, n - evals - tests)
        for position, i in enumerate(order):
            held_out = "eval" if position < train + evals else "test"
            yield members[i], "train" if position < train else held_out


def _text(value: Any) -> str:
    return "" if value is None else str(value)
