"""E2E NLG: restaurant attributes in, a sentence about the restaurant out, divided over clients.

The data is that of the E2E NLG challenge (Novikova, Dušek and Rieser, 2017; CC BY-SA 4.0). A
meaning representation (MR) has several references; no MR is in two of the official splits.

Texts have the form in which LoRA and SplitLoRA train on E2E. What was done to their references is
not published as a program, so one rule of our own serves training, validation and test alike, and
generated text is scored against references under the same rule:

    context    attributes in the order given, ``key : value`` joined by ``|``; eatType is Type,
               priceRange is price, familyFriendly is family friendly; spaces around every
               character of a value that is neither a word character nor white space
    reference  the same spaces around every such character, but a point or a comma between digits
               stays (10.50) and clitics keep their apostrophe (is n't, it 's, you 'll)

Contexts come out as the authors' on all of the official validation and test rows, references on
98.4 % and 99.1 % of them.
"""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from fedlora.core.checks import at_least, one_of
from fedlora.core.errors import ConfigError, DataError
from fedlora.data import partition
from fedlora.data.batches import subset
from fedlora.data.fields import required
from fedlora.data.files import csv_rows, parquet_rows
from fedlora.data.records import SPLITS, Record
from fedlora.data.source import Source, file_identity
from fedlora.data.values import split_name, text

COLUMNS = ("split", "mr_orig", "ref")
FILES = {"train": "trainset.csv", "eval": "devset.csv", "test": "testset_w_refs.csv"}
PARTITIONS = ("iid", "by_mr", "restaurant", "dirichlet")
_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
_ATTRIBUTE = re.compile(r"([^\[\],]+)\[([^\[\]]*)\]")
_VERSION = 1  # of the rules above and of the dealing below: part of the fingerprint


class Text(NamedTuple):
    """One row: where it was read, and its content."""

    split: str
    mr: str
    reference: str
    where: str


@dataclass(frozen=True)
class Row:
    """One pair of the data."""

    attributes: Mapping[str, str]
    context: str
    reference: str


@dataclass(frozen=True, kw_only=True)
class E2E(Source):
    """The E2E NLG challenge from the official CSV files or a Parquet file."""

    name: ClassVar[str] = "e2e"
    licence: ClassVar[str] = "CC BY-SA 4.0"

    path: str
    """A folder, or the official zip file, with ``trainset.csv``, ``devset.csv`` and
    ``testset_w_refs.csv``; or a Parquet file with the columns ``split`` (``train``, ``valid``,
    ``test``), ``mr_orig`` and ``ref``."""
    clients: int = 3
    partition: str = "iid"
    """Partition of the training rows. ``iid``: equal random parts. ``by_mr``: all references of an
    MR are on one client. ``restaurant``: all rows of a restaurant (attribute ``name``) are.
    ``dirichlet``: clients' fractions of each value of `by` are drawn from Dir(`alpha`). Validation
    and test rows belong to no client: their MRs are dealt evenly, each with all its references, so
    that evaluating every client is evaluating the official split."""
    alpha: float = 0.5
    by: str = "food"
    """An attribute by its name in the MR, such as ``food``, ``area`` or ``priceRange``; MRs without
    it share one value."""
    max_train: int = 0
    """Training rows of all clients together, drawn at random; 0: all."""
    max_eval: int = 0
    """MRs of the validation split, each with all its references; 0: all."""
    max_test: int = 0
    """MRs of the test split, likewise."""
    seed: int = 0
    """Seed of partition and draws; not the seed of the run, so that runs share their data."""
    template: str = "context"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("data.partition", self.partition, PARTITIONS)
        at_least("data.clients", self.clients, 1)
        at_least("data.alpha", self.alpha, 0, strict=True)
        for field in ("max_train", "max_eval", "max_test", "seed"):
            at_least(f"data.{field}", getattr(self, field), 0)

    def fingerprint(self) -> str:
        """Every option but the path, and the content of every file."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "path"}
        path = self._located()
        files = [path / name for name in FILES.values()] if path.is_dir() else [path]
        contents = [file_identity(f) for f in files if f.is_file()]
        return json.dumps([_VERSION, options, contents], sort_keys=True)

    def records(self) -> Iterator[Record]:
        """Records by client, then split; the file's order within a split unless drawn at random."""
        rows = self._rows()
        train = [rows["train"][i] for i in self._sample_mrs(len(rows["train"]), "train")]
        held = {
            "train": [[train[i] for i in part] for part in self._partition(train)],
            "eval": self._dealt(rows["eval"], "eval"),
            "test": self._dealt(rows["test"], "test"),
        }
        about = self.by if self.partition == "dirichlet" else "name"
        for client in range(self.clients):
            for split in SPLITS:
                for row in held[split][client]:
                    category = row.attributes.get(about, "")
                    yield Record(client, split, category, row.context, "", row.reference)

    def _located(self) -> Path:
        path = Path(self.path).expanduser()
        if not path.exists():
            raise DataError(
                f"data.path={self.path!r} does not exist (from {Path.cwd()}); it must be a Parquet "
                f"file, or a folder or zip file with {', '.join(FILES.values())}"
            )
        return path

    def _rows(self) -> dict[str, list[Row]]:
        """The rows of each split, in the file's order."""
        path = self._located()
        packed = path.is_dir() or zipfile.is_zipfile(path)
        rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
        read: dict[str, tuple[dict[str, str], str]] = {}
        for pair in _from_csv(path) if packed else _from_parquet(path):
            if pair.mr not in read:
                found = attributes(pair.mr, pair.where)
                read[pair.mr] = found, context(found)
            rows[pair.split].append(Row(*read[pair.mr], sentence(pair.reference)))
        for split, held in rows.items():
            if not held:
                raise DataError(f"data.path={self.path!r} has no rows of the {split} split")
        return rows

    def _sample_mrs(self, count: int, split: str) -> list[int]:
        return subset(count, getattr(self, f"max_{split}"), self.seed, f"e2e {split}")

    def _partition(self, rows: Sequence[Row]) -> list[list[int]]:
        """Row indices of each client."""
        if self.partition == "iid":
            return partition.iid(len(rows), self.clients, self.seed)
        if self.partition == "dirichlet":
            if not any(self.by in row.attributes for row in rows):
                known = sorted({key for row in rows for key in row.attributes})
                raise ConfigError(
                    f"data.by={self.by!r} is no attribute of the MRs, which are {known}"
                )
            labels = [row.attributes.get(self.by, "") for row in rows]
            return partition.dirichlet(labels, self.clients, self.alpha, 1, self.seed).parts
        by_mr = self.partition == "by_mr"
        groups = _groups([r.context if by_mr else r.attributes["name"] for r in rows])
        partition.enough(len(groups), self.clients, "MRs" if by_mr else "restaurants")
        return self._united(groups, "e2e partition")

    def _dealt(self, rows: Sequence[Row], split: str) -> list[list[Row]]:
        """The drawn MRs of a split that no client owns, as rows of each client."""
        groups = _groups([row.context for row in rows])
        groups = [groups[i] for i in self._sample_mrs(len(groups), split)]
        parts = self._united(groups, f"e2e deal {split}")
        return [[rows[i] for i in part] for part in parts]

    def _united(self, groups: Sequence[list[int]], purpose: str) -> list[list[int]]:
        """Whole groups dealt to clients; each client's members, group by group."""
        parts = partition.balanced([len(g) for g in groups], self.clients, self.seed, purpose)
        return [[i for group in part for i in groups[group]] for part in parts]


def _groups(labels: Sequence[str]) -> list[list[int]]:
    """The positions of each distinct label, labels in order of first appearance."""
    found: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        found.setdefault(label, []).append(i)
    return list(found.values())


# --- texts ---------------------------------------------------------------------------------------


def attributes(mr: str, where: str) -> dict[str, str]:
    """The attributes of an MR such as ``name[Zizzi], food[Italian]``, in its order.

    Raises:
        DataError: naming the MR and where it was read.
    """
    found: dict[str, str] = {}
    for part in re.split(r"(?<=\])\s*,\s*", mr.strip()):
        match = _ATTRIBUTE.fullmatch(part)
        if not match or match[1].strip() in found:
            raise DataError(
                f"{where}: the MR {mr!r} must be 'key[value], key[value]' with every key once; "
                f"{part!r} is not"
            )
        found[match[1].strip()] = match[2]
    if "name" not in found:
        raise DataError(f"{where}: the MR {mr!r} has no name[...]")
    return found


def context(attributes: Mapping[str, str]) -> str:
    """An MR as the model reads it: ``name : Zizzi | Type : pub | price : £ 20 - 25``."""
    return " | ".join(
        f"{_NAMES.get(key, key)} : {_spaced(value)}" for key, value in attributes.items()
    )


def sentence(reference: str) -> str:
    """A reference as the model writes it, by the rule above."""
    text = re.sub(r"(?<!\d)[.,]|[.,](?!\d)|[^\w\s.,']", r" \g<0> ", reference)
    text = re.sub(r"n't\b", r" \g<0>", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=\w)'(?:s|re|ll|ve|d|m)\b", r" \g<0>", text, flags=re.IGNORECASE)
    text = re.sub(r"'(?!(?:t|s|re|ll|ve|d|m)\b)", " ' ", text, flags=re.IGNORECASE)
    return " ".join(text.split())


def _spaced(value: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", r" \g<0> ", value).split())


# --- files ---------------------------------------------------------------------------------------


def _from_csv(path: Path) -> Iterator[Text]:
    """Rows of the three official files in a folder or zip file."""
    for split, name in FILES.items():
        where = f"{path}/{name}"
        for row, at in csv_rows(_content(path, name), where, needed=("mr", "ref")):
            cells = {column: cell or None for column, cell in row.items()}
            yield Text(split, _text(cells, "mr", at), _text(cells, "ref", at), at)


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    return text(required(row, name, where), name, where)


def _content(path: Path, name: str) -> str:
    """The text of a file in a folder, or anywhere in a zip file."""
    try:
        if path.is_dir():
            return (path / name).read_bytes().decode("utf-8-sig")
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.namelist() if m == name or m.endswith(f"/{name}")]
            return archive.read(members[0]).decode("utf-8-sig")
    except (FileNotFoundError, IndexError) as error:
        raise DataError(
            f"data.path={str(path)!r} has no file {name}; needed are {', '.join(FILES.values())}"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}/{name} is not UTF-8: {error}") from error


def _from_parquet(path: Path) -> Iterator[Text]:
    for i, row in enumerate(parquet_rows(path, COLUMNS)):
        where = f"{path}, row {i}"
        split = split_name(row["split"], "split", where)
        yield Text(split, _text(row, "mr_orig", where), _text(row, "ref", where), where)
