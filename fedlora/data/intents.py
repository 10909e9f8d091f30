"""Intent classification: short questions of users, each with one of 77 or 150 intents as its label.

CLINC150 (Larson et al., 2019; CC BY 3.0) has 150 intents in 10 domains; its out-of-scope rows are
left out. BANKING77 (Casanueva et al., 2020; CC BY 4.0) has 77 intents of one domain, some of which
differ in little. Both ship with the package, attributed in ``assets/ATTRIBUTION.md``.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, NamedTuple

from fedlora.core.checks import at_least, one_of
from fedlora.core.errors import DataError
from fedlora.core.package import places
from fedlora.data import partition
from fedlora.data.files import parquet_rows
from fedlora.data.partition import Division
from fedlora.data.records import SPLITS, Record
from fedlora.data.source import Source, file_identity
from fedlora.data.values import SPLIT_NAMES

FILE = "fedlora/data/assets/intents.parquet"
DATASETS = ("clinc150", "banking77")
TRAIN_ON = ("train", "train_valid")
PARTITIONS = ("iid", "dirichlet", "pathological", "domain")
_COLUMNS = ("dataset", "split", "text", "label", "domain")
_OUT_OF_SCOPE = "oos"
_VERSION = 2  # of the reading and dividing below: part of the fingerprint


class Row(NamedTuple):
    """One question."""

    text: str
    label: str
    domain: str
    where: str


@dataclass(frozen=True, kw_only=True)
class Intents(Source):
    """CLINC150 or BANKING77, divided over clients.

    The validation and test rows of each intent go to the clients in proportion to the training rows
    of it that they hold: a client is evaluated on what it trains on, and all clients together on
    the official split, each row once.
    """

    name: ClassVar[str] = "intents"
    licence: ClassVar[str] = "CC BY 3.0 (CLINC150), CC BY 4.0 (BANKING77)"

    dataset: str = "banking77"
    """``clinc150``: 15,000 / 3,000 / 4,500 rows for training, validation and test. ``banking77``:
    8,957 / 1,046 / 3,080; the validation rows are a tenth of the official training rows."""
    train_on: str = "train"
    """``train_valid``: validation rows are training rows too, as in published numbers of BANKING77,
    whose official training split is both together. Nothing is then left for ``evaluate.plan.split:
    eval``."""
    clients: int = 30
    partition: str = "dirichlet"
    """Partition of the training rows. ``iid``: equal random parts. ``dirichlet``: clients'
    fractions of each intent are drawn from Dir(`alpha`). ``pathological``: each client holds
    `classes_per_client` intents. ``domain``: each client holds intents of one domain (CLINC150)."""
    alpha: float = 0.1
    classes_per_client: int = 5
    min_examples: int = 10
    """Minimum of training rows per client under ``dirichlet``: fractions are drawn again until it
    is met, and a draw that cannot meet it is completed."""
    seed: int = 0
    """Seed of the partition; not the seed of the run, so that runs share their data."""
    max_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("data.dataset", self.dataset, DATASETS)
        one_of("data.train_on", self.train_on, TRAIN_ON)
        one_of("data.partition", self.partition, PARTITIONS)
        at_least("data.alpha", self.alpha, 0, strict=True)
        for field in ("clients", "classes_per_client", "min_examples"):
            at_least(f"data.{field}", getattr(self, field), 1)
        at_least("data.seed", self.seed, 0)

    @property
    def labelled(self) -> bool:
        """Every question has its intent."""
        return True

    def fingerprint(self) -> str:
        """Every option, and the content of the file."""
        options = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.train_on == "train":  # as before there was a choice
            del options["train_on"]
        return json.dumps([_VERSION, options, file_identity(intents_file())], sort_keys=True)

    def records(self) -> Iterator[Record]:
        """Records by client, then split; the file's order within held-out splits."""
        rows = self._rows()
        labels = {split: [row.label for row in held] for split, held in rows.items()}
        parts, moved = self._divided(rows["train"])
        held = {
            split: partition.follow(
                labels[split], labels["train"], parts, self.seed, f"intents {split}"
            )
            for split in SPLITS[1:]
        } | {"train": parts}
        for client in range(self.clients):
            for split in SPLITS:
                for i in held[split][client]:
                    row, given = rows[split][i], split == "train" and i in moved
                    texts = (row.text, "", row.label)
                    yield Record(
                        client,
                        split,
                        row.domain,
                        *texts,
                        label=row.label,
                        where=row.where,
                        moved=given,
                    )

    def _rows(self) -> dict[str, list[Row]]:
        """The rows of each split, in the file's order; validation rows that train come last."""
        file = intents_file()
        rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
        for i, row in enumerate(parquet_rows(file, _COLUMNS)):
            if row["dataset"] == self.dataset and row["label"] != _OUT_OF_SCOPE:
                found = Row(row["text"], row["label"], row["domain"], f"{file}, row {i}")
                rows[SPLIT_NAMES[row["split"]]].append(found)
        if self.train_on == "train_valid":
            rows["train"] += rows["eval"]
            rows["eval"] = []
        return rows

    def _divided(self, rows: Sequence[Row]) -> Division:
        """The training rows of each client."""
        labels = [row.label for row in rows]
        if self.partition == "dirichlet":
            options = (self.clients, self.alpha, self.min_examples, self.seed)
            return partition.dirichlet(labels, *options, nearest=True)
        if self.partition == "pathological":
            parts = partition.pathological(labels, self.clients, self.classes_per_client, self.seed)
        elif self.partition == "domain":
            if len({row.domain for row in rows}) == 1:
                raise DataError(
                    f"data.partition=domain: {self.dataset} has one domain, {rows[0].domain!r}; "
                    "use data.dataset=clinc150, or another data.partition"
                )
            parts = partition.by_group([row.domain for row in rows], self.clients, self.seed)
        else:
            parts = partition.iid(len(rows), self.clients, self.seed)
        return Division(parts)


def intents_file() -> Path:
    """The table of both data sets.

    Raises:
        DataError: naming every place that was tried.
    """
    tried = list(dict.fromkeys(place.absolute() for place in places(FILE)))
    for file in tried:
        if file.is_file():
            return file
    raise DataError(
        f"data=intents: the file that ships with fedlora is in none of {[str(t) for t in tried]}; "
        "install fedlora from a checkout (pip install -e .)"
    )
