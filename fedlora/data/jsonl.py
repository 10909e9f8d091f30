"""Your own records in the forms people have, divided over clients by a key or by a partitioner."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

from fedlora.core.checks import (
    at_least,
    fraction,
    one_of,
)
from fedlora.core.errors import DataError
from fedlora.core.seeding import generator
from fedlora.data import partition
from fedlora.data.fields import Entry, Fields, Row, mapping
from fedlora.data.locations import Location
from fedlora.data.partition import Division
from fedlora.data.records import SPLITS, Record
from fedlora.data.source import Source
from fedlora.data.values import check_spellings

PARTITIONS = ("natural", "iid", "dirichlet", "pathological", "domain")
_VERSION = 3  # of the reading below: part of the fingerprint

log = logging.getLogger(__name__)


class Placed(NamedTuple):
    """A row with its client and its split."""

    client: int
    name: str
    """The client's name; empty: its id."""
    row: int
    split: str


@dataclass(frozen=True, kw_only=True)
class Jsonl(Source):
    """Alpaca-style records, conversations, and texts with labels, from files, folders and data sets
    of `datasets`."""

    name: ClassVar[str] = "jsonl"

    path: str
    """A file, a pattern such as ``data/*.jsonl`` (``**`` descends into folders), a folder of files
    or one that `datasets` saved to disk, or a hub id ``owner/name``. Files hold JSON lines, a JSON
    array, CSV, TSV, Parquet or Arrow, and may be compressed by gzip or zstd."""
    revision: str | None = None
    """Revision of a hub data set."""
    subset: str | None = None
    """Which one, of a hub data set that has several (its "config")."""
    instruction_field: str = "instruction"
    input_field: str = "input"
    """May be missing in a record."""
    output_field: str = "output"
    category_field: str = "category"
    """May be missing in a record."""
    label_field: str = ""
    """The label that is to be predicted: records are then texts with labels, and the fields of
    instructions are not read. Empty: they are instructions or conversations."""
    text_field: str = "text"
    second_text_field: str = ""
    """Field of the second text of a pair; may be missing in a record. Empty: there is one text."""
    split_field: str = ""
    """Names each record's split (``train``, ``eval`` or ``validation``, ``test``). Empty: the names
    of a folder's files or the splits of a data set decide; where these say nothing, records are
    drawn at random by the two fractions."""
    eval_fraction: float = 0.1
    test_fraction: float = 0.1
    """Fraction of each client's records, at least one record if the client has three or more."""
    partition: str = "natural"
    """``natural``: one client per value of `key`, or per file if no record has it. ``iid``:
    `clients` equal random parts. ``dirichlet``: `clients` parts; their fractions of each value of
    `by` are drawn from Dir(`alpha`). ``pathological``: each client holds `classes_per_client`
    values of `by`. ``domain``: each client holds one value of `by`, or whole values where there are
    more than clients. Where records name their split, all but ``natural`` divide the training
    records; the others follow, in each client's own proportions of `by` (``iid``: of labels)."""
    key: str = "client"
    clients: int = 100
    alpha: float = 0.5
    by: str = ""
    """A field. Empty: `label_field` if it is set, else, and for ``domain``, `category_field`."""
    classes_per_client: int = 2
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
        at_least("data.classes_per_client", self.classes_per_client, 1)
        at_least("data.alpha", self.alpha, 0, strict=True)
        at_least("data.seed", self.seed, 0)
        if self.eval_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"data.eval_fraction={self.eval_fraction} and data.test_fraction="
                f"{self.test_fraction} must leave something to train on: their sum must be < 1"
            )

        named = [n for n in (self.label_field, self.text_field, self.second_text_field) if n]
        if self.labelled and len(set(named)) < len(named):
            raise ValueError(
                f"data.label_field={self.label_field!r}, data.text_field={self.text_field!r} and "
                f"data.second_text_field={self.second_text_field!r} must name different fields"
            )
        if self.second_text_field and not self.labelled:
            raise ValueError(
                f"data.second_text_field={self.second_text_field!r} has no effect without "
                "data.label_field: name the field of the labels"
            )

    @property
    def labelled(self) -> bool:
        """Whether a field of labels is named."""
        return self.label_field != ""

    def fingerprint(self) -> str:
        """Every option but the path, and the content of every file."""
        left_out = ("path", "max_length", "truncation", "template")  # of the store's key anyway
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        return json.dumps([_VERSION, options, self._location().identity()], sort_keys=True)

    def records(self) -> Iterator[Record]:
        """Records by client, each client's in random order (in file order with given splits)."""
        rows = list(self._location().rows())
        if not rows:
            raise DataError(f"data.path={self.path!r}: the files have no records")
        by_file = self.partition == "natural" and self._is_by_file(rows)
        entries = [self._fields(by_file).read(row) for row in rows]
        given = [entry.split != "" for entry in entries]
        if any(given) and not all(given):
            where = entries[given.index(False)].where
            raise DataError(f"{where} has no split, unlike others: name a field, data.split_field")
        groups = [row.client for row in rows] if by_file else [e.group for e in entries]
        places = [e.where for e in entries]
        check_spellings(zip(groups, places, strict=True), self._group())
        if self.labelled:
            labels = [e.output for e in entries]
            check_spellings(zip(labels, places, strict=True), self.label_field)
        parts, moved = self._partition(groups, entries)
        natural = self.partition == "natural"
        placed = [
            Placed(client, groups[members[0]] if natural else "", i, split)
            for client, members in enumerate(parts)
            for i, split in self._splits(client, entries, members)
        ]
        if self.labelled and not any(given):
            placed = _taught(placed, entries)
        for client, name, i, split in placed:
            e = entries[i]
            yield Record(
                client,
                split,
                e.category,
                *(e.instruction, e.input, e.output),
                client_name=name,
                turns=e.turns,
                label=e.output if self.labelled else "",
                where=e.where,
                moved=i in moved,
            )

    def _location(self) -> Location:
        return Location(self.path, self.revision, self.subset)

    def _is_by_file(self, rows: Sequence[Row]) -> bool:
        """Whether each file is a client: no record has the key, and there are several names."""
        if any(self.key in mapping(row) for row in rows):
            return False
        names = {row.client for row in rows}
        if len(names) < 2:
            raise DataError(
                f"{rows[0].where} has no field {self.key!r}; found {sorted(rows[0].values)}: name "
                "the field that holds the client by data.key, give a folder with a file per "
                "client, or divide the records by data.partition=iid data.clients=10"
            )
        log.info("data.path=%s: each file is one client, %d in all", self.path, len(names))
        return True

    def _group(self) -> str:
        """The field by which records are divided; empty: by none."""
        if self.partition in ("natural", "iid"):
            return self.key if self.partition == "natural" else ""
        label = "" if self.partition == "domain" else self.label_field
        return self.by or label or self.category_field

    def _fields(self, by_file: bool) -> Fields:
        """What is read of a row under this configuration."""
        texts = (self.instruction_field, self.input_field, self.output_field)
        if self.labelled:
            texts = (self.text_field, self.second_text_field, self.label_field)
        group = "" if by_file else self._group()
        return Fields(*texts, self.category_field, self.split_field, group, self.labelled)

    def _partition(self, groups: Sequence[str], entries: Sequence[Entry]) -> Division:
        """Row indices of each client.

        Args:
            groups: client, label or category of each row.
            entries: the rows.
        """
        if self.partition == "natural":
            return Division(partition.natural(groups))
        splits = [e.split or "train" for e in entries]
        rows = {s: [i for i, split in enumerate(splits) if split == s] for s in SPLITS}
        if not rows["train"]:
            rows = {"train": list(range(len(entries)))}
        keys = [
            g or (e.output if self.labelled else "") for g, e in zip(groups, entries, strict=True)
        ]
        train = rows.pop("train")
        like = [keys[i] for i in train]
        divided = self._divided(like)
        parts = [[train[i] for i in part] for part in divided.parts]
        for split, own in rows.items():
            names, purpose = [keys[i] for i in own], f"jsonl {split}"
            held = partition.follow(names, like, divided.parts, self.seed, purpose)
            parts = [[*a, *(own[i] for i in b)] for a, b in zip(parts, held, strict=True)]
        return Division(parts, frozenset(train[i] for i in divided.moved))

    def _divided(self, groups: Sequence[str]) -> Division:
        """The training rows of each client, as positions in ``groups``."""
        n = self.clients
        if self.partition == "dirichlet":
            options = (n, self.alpha, self.min_examples, self.seed)
            return partition.dirichlet(groups, *options, nearest=self.labelled)
        if self.partition == "pathological":
            parts = partition.pathological(groups, n, self.classes_per_client, self.seed)
        elif self.partition == "domain":
            parts = partition.by_group(groups, n, self.seed)
        else:
            parts = partition.iid(len(groups), n, self.seed)
        return Division(parts)

    def _splits(
        self, client: int, entries: Sequence[Entry], members: Sequence[int]
    ) -> Iterator[tuple[int, str]]:
        """Each member with its split."""
        if entries[members[0]].split:
            yield from ((i, entries[i].split) for i in members)
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


def _taught(placed: Sequence[Placed], entries: Sequence[Entry]) -> list[Placed]:
    """The same rows, where a label that the draw left out of training has its first one there."""
    known = {entries[p.row].output for p in placed if p.split == "train"}
    found = []
    for p in placed:
        if entries[p.row].output not in known:
            known.add(entries[p.row].output)
            p = p._replace(split="train")
        found.append(p)
    return found
